"""Which checkpoints of a run are dropped, and when: after a newer one is whole on disk. No torch."""

from collections.abc import Sequence
from pathlib import Path

from megatron_vl.checkpoint.folder import discard
from megatron_vl.checkpoint.state import RunState, find_checkpoints, read_state


def superseded(newest_first: Sequence[RunState], keep: int, keep_every: int | None) -> list[RunState]:
    """All but the newest `keep`, and but those at multiples of `keep_every` steps of the stage, which stay forever."""
    return [state for state in newest_first[keep:] if keep_every is None or state.step % keep_every != 0]


def drop_superseded(folder: Path, keep: int, keep_every: int | None) -> None:
    """Delete what `superseded` names, the oldest first, of the good checkpoints in a folder."""
    paths = find_checkpoints(folder).good
    states = [read_state(path) for path in paths]
    doomed = superseded(states, keep, keep_every)
    for path, state in reversed(list(zip(paths, states, strict=True))):
        if state in doomed:
            discard(path)
