"""Cross-entropy over logits whose vocabulary is divided among tensor-parallel ranks, without a copy of them in fp32.

megatron-core's keeps an fp32 copy of all probabilities for the backward pass, three times what bf16 logits take with
the gradient that is made of it. This keeps the logits alone, and their gradient takes their place.

Shapes: S tokens, V this rank's part of the vocabulary, R rows of a block.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BLOCK_LOGITS = 2**20  # in fp32 at once: 4 MB, which a core's caches hold


def vocabulary_loss(logits_SV: Tensor, labels_S: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Cross-entropy of every position, [S] in fp32, the same on all ranks of `group`.

    The ranks hold parts of the vocabulary in their order; labels count over the whole. The backward pass overwrites the
    logits, so it runs once.
    """
    losses_S: Tensor = _VocabularyLoss.apply(logits_SV, labels_S, group)  # type: ignore[no-untyped-call]
    return losses_S


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, labels_S: Tensor, group: dist.ProcessGroup) -> Tensor:
        num_logits = logits_SV.shape[1]
        own_labels_S = labels_S - group.rank() * num_logits
        elsewhere_S = (own_labels_S < 0) | (own_labels_S >= num_logits)
        own_labels_S1 = own_labels_S.masked_fill(elsewhere_S, 0)[:, None]
        chosen_S = logits_SV.gather(1, own_labels_S1)[:, 0].float().masked_fill(elsewhere_S, 0.0)
        normalizer_S = torch.cat([logits_SV[rows].float().logsumexp(1) for rows in _blocks(logits_SV)])
        if group.size() > 1:
            largest_S = normalizer_S.clone()
            dist.all_reduce(largest_S, op=dist.ReduceOp.MAX, group=group)
            sums_2S = torch.stack([(normalizer_S - largest_S).exp(), chosen_S])
            dist.all_reduce(sums_2S, group=group)
            normalizer_S, chosen_S = largest_S + sums_2S[0].log(), sums_2S[1]
        ctx.save_for_backward(logits_SV, normalizer_S, own_labels_S1, elsewhere_S)
        return normalizer_S - chosen_S

    @staticmethod
    def backward(ctx: Any, gradient_S: Tensor) -> tuple[Tensor, None, None]:
        logits_SV, normalizer_S, own_labels_S1, elsewhere_S = ctx.saved_tensors
        minus_one_S1 = elsewhere_S[:, None].float() - 1.0
        for rows in _blocks(logits_SV):
            block_RV = logits_SV[rows].float()  # in fp32 these are the logits themselves
            block_RV.sub_(normalizer_S[rows, None]).exp_()
            block_RV.scatter_add_(1, own_labels_S1[rows], minus_one_S1[rows]).mul_(gradient_S[rows, None])
            logits_SV[rows] = block_RV
        return logits_SV, None, None


def _blocks(logits_SV: Tensor) -> Iterator[slice]:
    """Rows of at most MAX_BLOCK_LOGITS logits, at least one."""
    num_rows = max(1, MAX_BLOCK_LOGITS // logits_SV.shape[1])
    return (slice(start, start + num_rows) for start in range(0, len(logits_SV), num_rows))
