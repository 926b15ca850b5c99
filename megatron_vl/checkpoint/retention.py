"""Which checkpoints of a run are dropped, and when: after a newer one is whole on disk. No torch."""

from collections.abc import Sequence
from pathlib import Path

from megatron_vl.checkpoint.folder import discard
from megatron_vl.checkpoint.state import RunState, find_checkpoints, read_state


def superseded(newest_first: Sequence[RunState], keep: int, keep_every: int | None) -> list[int]:
    """Places of all but the newest `keep`, and but those at multiples of `keep_every` steps of the stage, which stay
    forever. Those that a signal made while steps were being skipped do not count: a run may go back before them."""
    num_sound, places = 0, list[int]()
    for place, state in enumerate(newest_first):
        if num_sound >= keep and (keep_every is None or state.step % keep_every != 0):
            places.append(place)
        num_sound += not state.health.get("skipped")
    return places


def drop_superseded(folder: Path, keep: int, keep_every: int | None) -> None:
    """Delete what `superseded` names, the oldest first, of the good checkpoints in a folder."""
    paths = find_checkpoints(folder).good
    for place in reversed(superseded([read_state(path) for path in paths], keep, keep_every)):
        discard(paths[place])
