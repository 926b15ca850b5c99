"""Our RMSNorm against its formula in fp64, differentiated by autograd, and what it keeps for the backward pass.

Shapes: T tokens, H hidden size.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_vl.device.fused_norm import rms_norm

EPSILON = 1e-3


def formula(x_TH: Tensor, weight_H: Tensor) -> Tensor:
    return x_TH / (x_TH.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * weight_H


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    trains=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 99),
)
def test_equals_the_formula(shape: list[int], trains: tuple[bool, bool], seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(shape, generator=source).requires_grad_(trains[0])
    weight_H = torch.randn(shape[-1], generator=source).requires_grad_(trains[1])
    gradient_TH = torch.randn(shape, generator=source)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_TH, weight_H)]
    expected_TH = formula(*exact)
    expected_TH.backward(gradient_TH.double())
    normed_TH = rms_norm(x_TH, weight_H, EPSILON)
    normed_TH.backward(gradient_TH)
    torch.testing.assert_close(normed_TH.double(), expected_TH, rtol=1e-5, atol=1e-5)
    for ours, reference in zip((x_TH, weight_H), exact, strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
        else:
            assert ours.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_its_input_and_a_number_for_each_token(dtype: torch.dtype) -> None:
    x_TH, weight_H = torch.randn(6, 8, dtype=dtype), torch.ones(8, dtype=dtype)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        normed_TH = rms_norm(x_TH.requires_grad_(), weight_H, EPSILON)
    assert normed_TH.dtype == dtype
    assert [tensor.shape for tensor in kept] == [(6, 8), (8,), (6, 1)]
    assert kept[0].data_ptr() == x_TH.data_ptr()


def test_bf16_is_torchs_own_to_the_bit() -> None:
    x_TH, weight_H = torch.randn(40, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    assert torch.equal(
        rms_norm(x_TH, weight_H, EPSILON), torch.nn.functional.rms_norm(x_TH, (64,), weight_H, EPSILON)
    )
