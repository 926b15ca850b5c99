"""Attention with relative positions: both forms against explicit fp64 scores, which one runs, its memory.

Shapes: B images, A heads, T = H*W tokens, D head size.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vl.model import relative_attention as module
from megatron_vl.model.relative_attention import blocked_attention, folded_attention, relative_attention


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Every score by itself: q·k/sqrt(D) + q·row[h, h'] + q·column[w, w'] with h, w the query's place."""
    width = len(column)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    biases = []
    for query in range(q.shape[2]):
        vector_HWD = row[query // width][:, None] + column[query % width][None, :]
        biases.append(q[..., query, :] @ vector_HWD.flatten(0, 1).T)
    return (scores + torch.stack(biases, dim=-2)).softmax(-1) @ v


def make_inputs(
    height: int, width: int, head_size: int = 4, batch: int = 2, num_heads: int = 2, seed: int = 0
) -> list[Tensor]:
    """q, k, v [B, A, T, D] and the two tables, fp32, trainable."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, num_heads, height * width, head_size)] * 3
    shapes += [(height, height, head_size), (width, width, head_size)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def to_bias_terms(q: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    places = range(q.shape[2])
    rows = torch.stack([q[:, :, t] @ row[t // len(column)].T for t in places], dim=2)
    columns = torch.stack([q[:, :, t] @ column[t % len(column)].T for t in places], dim=2)
    return rows, columns


@pytest.mark.parametrize("form", [blocked_attention, folded_attention])
@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 11),
    width=st.integers(1, 5),
    head_size=st.sampled_from([1, 3, 8]),
    block_scores=st.integers(1, 500),
)
def test_both_forms_equal_explicit_scores(
    form: Callable[..., Tensor], height: int, width: int, head_size: int, block_scores: int
) -> None:
    inputs = make_inputs(height, width, head_size)
    q, k, v, row, column = inputs
    expected = explicit_attention(*(x.double() for x in inputs))
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_BLOCK_SCORES", block_scores)
        attended = form(q, k, v, *to_bias_terms(q, row, column))
    torch.testing.assert_close(attended.double(), expected, rtol=0, atol=1e-5)
    for gradient, reference in zip(
        torch.autograd.grad((attended * weight).sum(), inputs), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (12, 4)])
@pytest.mark.parametrize("trainable", [False, True])
def test_relative_attention_equals_explicit_scores(height: int, width: int, trainable: bool) -> None:
    inputs = make_inputs(height, width)
    expected = explicit_attention(*(x.double() for x in inputs))
    with torch.set_grad_enabled(trainable):
        torch.testing.assert_close(relative_attention(*inputs).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "side", "trainable", "form"),
    [
        ("cpu", 16, False, "blocked_attention"),
        ("cpu", 4, True, "blocked_attention"),  # few scores to keep
        ("cpu", 16, True, "folded_attention"),
        ("cuda", 16, False, "folded_attention"),
        ("cuda", 4, False, "folded_attention"),
    ],
)
def test_the_form_follows_the_device(
    device: str, side: int, trainable: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name in ("blocked_attention", "folded_attention"):
        monkeypatch.setattr(module, name, lambda q, *_, name=name: called.append(name) or q)
    with FakeTensorMode():  # computes shapes alone, so that a CUDA tensor needs no CUDA
        q = torch.empty(1, 2, side * side, 8, device=device, requires_grad=trainable)
        table = torch.empty(side, side, 8, device=device)
        relative_attention(q, q, q, table, table)
    assert called == [form]


class LargestOutput(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, backward included."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("trainable", [False, True])
def test_no_tensor_has_the_size_of_all_scores(trainable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    side, batch, num_heads = 40, 2, 3
    inputs = [x.requires_grad_(trainable) for x in make_inputs(side, side, 16, batch, num_heads)]
    monkeypatch.setattr(module, "MAX_BLOCK_SCORES", side**4)
    kept: list[int] = []
    keep = saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with LargestOutput() as largest, keep:
        attended = relative_attention(*inputs)
        if trainable:
            attended.sum().backward()
    all_scores = batch * num_heads * side**4
    assert largest.numel <= all_scores / (batch * num_heads)
    assert sum(kept) < all_scores / 2  # nor do smaller ones add up to it until the backward pass
