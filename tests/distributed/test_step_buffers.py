"""A step makes no new buffer of the gradients' or weights' size, and what is frozen has neither gradient nor state."""

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_vl.train.step import Vote, train_step
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build

# The largest tensor that a row of 160 tokens makes is its logits; the embedding's gradient is as large as its weight.
LARGEST_OF_A_ROW = 160 * 2048
LARGEST_WEIGHT = 128 * 2048


class NewTensors(TorchDispatchMode):
    """The number of elements of the largest tensor whose memory is no argument's."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        new = [x.numel() for x in _tensors(result) if x.untyped_storage().data_ptr() not in before]
        self.numel = max([self.numel, *new])
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def largest_new_tensor(case: Case) -> tuple[int, int]:
    """Of the second step, a text one, and the number of trained weights."""
    chunks, optimizer, groups = build(case)
    train_step(chunks, optimizer, batch(case, 2, groups), groups, 1.0, Vote())
    with NewTensors() as new:
        train_step(chunks, optimizer, batch(case, 4, groups), groups, 1.0, Vote())
    return new.numel, sum(buffer.numel for buffer in chunks[0].buffers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_buffer_is_made_anew(precision: str) -> None:
    largest, buffers = run_ranks(1, largest_new_tensor, Case(precision=precision))[0]
    assert largest <= max(LARGEST_OF_A_ROW, LARGEST_WEIGHT) < buffers / 2


def sizes(case: Case) -> tuple[int, int, int]:
    """Trained weights, elements of gradient buffers, elements of the optimizer's state, after a step."""
    chunks, optimizer, groups = build(case)
    train_step(chunks, optimizer, batch(case, 1, groups), groups, 1.0, Vote())
    trained = sum(p.numel() for p in chunks[0].module.parameters() if p.requires_grad)
    buffers = sum(p.main_grad.numel() for p in chunks[0].module.parameters() if hasattr(p, "main_grad"))
    states = [x for part in optimizer._parts() for x in _tensors(part.optimizer.state)]
    return trained, buffers, sum(x.numel() for x in states)


@pytest.mark.parametrize("train", [("adaptor",), ("adaptor", "decoder")])
def test_what_is_frozen_has_neither_gradient_nor_state(train: tuple[str, ...]) -> None:
    trained, buffers, state = run_ranks(1, sizes, Case(train=train))[0]
    assert buffers == trained
    assert state == 2 * trained
