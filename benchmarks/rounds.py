"""Steps that several ranks took in turns, put together: what the slowest rank took, and ratios round by round."""

from collections.abc import Mapping, Sequence

from benchmarks.paired import Interval, paired_ratio
from benchmarks.workbench import Seconds

Taken = Mapping[str, Mapping[str, Sequence[Seconds]]]  # by side and kind of step


def slowest(by_rank: Sequence[Taken], side: str, kind: str, clock: str) -> list[float]:
    """For each round what the slowest rank took: `clock` is cpu or wall."""
    rounds = zip(*(taken[side][kind] for taken in by_rank), strict=True)
    return [max(getattr(seconds, clock) for seconds in one) for one in rounds]


def mixed(by_rank: Sequence[Taken], side: str, shares: Mapping[str, float], clock: str) -> list[float]:
    """For each round the mean over kinds of steps with these shares, of what the slowest rank took."""
    by_kind = [[share * x for x in slowest(by_rank, side, kind, clock)] for kind, share in shares.items()]
    return [sum(one) for one in zip(*by_kind, strict=True)]


def speedup(
    by_rank: Sequence[Taken], side: str, peer: str, shares: Mapping[str, float], clock: str
) -> Interval:
    """How many times faster `side` is than `peer`."""
    return paired_ratio(mixed(by_rank, peer, shares, clock), mixed(by_rank, side, shares, clock))
