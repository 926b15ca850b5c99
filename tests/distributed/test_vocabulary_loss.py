"""The loss over a divided vocabulary: against torch's in fp64, at 1 to 3 ranks, and what it keeps.

Shapes: S tokens, V vocabulary.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from megatron_vl.model import vocabulary_loss as module
from megatron_vl.model.vocabulary_loss import vocabulary_loss
from tests.support.ranks import run_ranks

VOCABULARY, TOKENS = 30, 17


def case(dtype: torch.dtype, scale: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [S, V], labels [S] and the gradient of each loss [S], some of them zero."""
    source = torch.Generator().manual_seed(seed)
    logits = (torch.randn(TOKENS, VOCABULARY, generator=source) * scale).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=source)
    gradient = torch.randn(TOKENS, generator=source) * (torch.rand(TOKENS, generator=source) > 0.3)
    return logits, labels, gradient


def expected(logits: Tensor, labels: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    exact = logits.double().requires_grad_()
    losses = cross_entropy(exact, labels, reduction="none")
    losses.backward(gradient.double())
    assert exact.grad is not None
    return losses.detach(), exact.grad


def on_this_rank(dtype: torch.dtype, scales: list[float]) -> list[tuple[Tensor, Tensor]]:
    """Losses and this rank's part of the logits' gradient, for every scale, in blocks of other sizes."""
    found = []
    for seed, scale in enumerate(scales):
        module.MAX_BLOCK_LOGITS = (1, 40, 100, 2**20)[seed % 4]  # of this rank's process alone
        logits, labels, gradient = case(dtype, scale, seed)
        part = logits.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone().requires_grad_()
        losses = vocabulary_loss(part * 1, labels, dist.group.WORLD)
        losses.backward(gradient)
        assert part.grad is not None
        found.append((losses.detach(), part.grad))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_equals_torch_in_fp64(world_size: int) -> None:
    scales = [0.0, 1.0, 30.0, 1000.0] * 2 + [1.0]  # 1000 overflows exp in fp32
    ranks = run_ranks(world_size, on_this_rank, torch.float32, scales)
    for seed, scale in enumerate(scales):
        losses, gradient = expected(*case(torch.float32, scale, seed))
        for rank in ranks:
            torch.testing.assert_close(rank[seed][0].double(), losses, rtol=1e-6, atol=1e-6)
            assert torch.equal(rank[seed][0], ranks[0][seed][0])
        whole = torch.cat([rank[seed][1] for rank in ranks], 1)
        torch.testing.assert_close(whole.double(), gradient, rtol=1e-5, atol=1e-6)


def test_bf16_is_rounded_once() -> None:
    ((losses, gradient),) = run_ranks(1, on_this_rank, torch.bfloat16, [3.0])[0]
    exact_losses, exact_gradient = expected(*case(torch.bfloat16, 3.0))
    torch.testing.assert_close(losses.double(), exact_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-8, atol=1e-6)


def kept_bytes() -> tuple[int, int]:
    """Of what is kept for the backward pass, and of bf16 logits."""
    kept: list[Tensor] = []
    part = torch.randn(64, 4096, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        vocabulary_loss(part * 1, torch.zeros(64, dtype=torch.int64), dist.group.WORLD)
    return sum(x.nbytes for x in kept), part.nbytes


def test_keeps_the_logits_and_little_more() -> None:
    kept, logits = run_ranks(1, kept_bytes)[0]
    assert kept <= 1.05 * logits


def twice() -> str:
    losses = vocabulary_loss(
        torch.randn(2, 8, requires_grad=True) * 1, torch.zeros(2, dtype=torch.int64), dist.group.WORLD
    )
    losses.sum().backward(retain_graph=True)
    try:
        losses.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_second_backward_pass_is_refused() -> None:
    assert "modified by an inplace operation" in run_ranks(1, twice)[0]
