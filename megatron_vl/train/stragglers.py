"""The rank that computes slowest among those that do the same work."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """`ratio`: its seconds of computing over the median of its pipeline stage's ranks."""

    rank: int
    ratio: float


def straggler(compute_seconds: Sequence[float], pipeline_size: int) -> Straggler | None:
    """By rank, of one step; stages are neighbours in megatron-core's order of ranks.

    None where some rank has not told its seconds (0), as at the first step.
    """
    if not all(compute_seconds):
        return None
    share = len(compute_seconds) // pipeline_size
    ratios = [
        seconds / median(stage)
        for start in range(0, len(compute_seconds), share)
        for stage in [compute_seconds[start : start + share]]
        for seconds in stage
    ]
    slowest = max(range(len(ratios)), key=ratios.__getitem__)
    return Straggler(rank=slowest, ratio=ratios[slowest])
