"""A step's losses and tokens, told apart by the source of their samples: K sources, in one order on all ranks."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vl.data.microbatch import Microbatch
from megatron_vl.parallel.pipeline import PassResult


def losses_by_source(result: PassResult, sources: Sequence[str]) -> Tensor:
    """[2K] in fp64 on the device, which nobody waits for: sums of losses, then numbers of supervised tokens. Zero off
    the last pipeline stage."""
    place: dict[str | None, int] = {source: number for number, source in enumerate(sources)}
    padding = len(sources)
    places = torch.tensor(
        [place.get(source, padding) for source in result.segment_sources], dtype=torch.int64
    )
    sums = torch.zeros(padding + 1, 2, dtype=torch.float64, device=result.loss_sum.device)
    for segments in result.segment_sums:
        here, places = places[: len(segments)], places[len(segments) :]
        sums.index_add_(0, here.to(sums.device, non_blocking=True), segments)
    return sums[:padding].T.flatten()


def tokens_by_source(microbatches: Sequence[Microbatch], sources: Sequence[str]) -> list[int]:
    """[K]: positions with content."""
    counts: Counter[str] = Counter()
    for microbatch in microbatches:
        for unit in microbatch.units:
            counts[unit.source] += unit.num_tokens
    return [counts[source] for source in sources]


def told_apart(sources: Sequence[str], values: Sequence[float]) -> tuple[dict[str, float], dict[str, int]]:
    """From [3K] that all ranks have added up (`losses_by_source`, `tokens_by_source`): loss per supervised token and
    number of tokens of each source that the step had."""
    size = len(sources)
    by_source = zip(sources, values[:size], values[size : 2 * size], values[2 * size :], strict=True)
    present = [one for one in by_source if one[3] > 0]
    losses = {source: loss / supervised for source, loss, supervised, _ in present if supervised > 0}
    return losses, {source: int(tokens) for source, _, _, tokens in present}
