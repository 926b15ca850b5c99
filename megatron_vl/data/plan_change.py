"""What becomes of a saved plan when the data or the mixture have changed since.

Normally a change is refused, by name. With data.on_change=restart_sources a run goes on: sources that changed begin
anew, the others keep their place.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_vl.config.errors import UserError
from megatron_vl.data.plan_state import FIRST, Fingerprint, LaneState, PlanState

# A change of these deals every source anew; that of a digest, one source; of the batch, none: it is refused.
_DEALS_ALL = re.compile(
    r"run\.seed|lanes .*|stage\.\w+\.sequence_length|stage\.\w+\.packing|data\.shuffle_window|data\.max_images_per_pack"
)
_DEALS_ONE = re.compile(r"data\.sources\.(.+) \(digest of its index\)")
_REFUSED = re.compile(r"stage\.\w+\.global_batch_size")


def changes(saved: Fingerprint, current: Fingerprint) -> dict[str, str]:
    """What differs, by name, in words."""
    return {
        name: f"{name} was {saved.get(name, 'absent')} and is {current.get(name, 'absent')}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    }


def check_resumable(saved: Fingerprint, current: Fingerprint) -> None:
    """Raise UserError naming each value in which the saved plan differs from the current one, with both."""
    if found := changes(saved, current):
        raise UserError(
            f"this run cannot resume the saved one: {'; '.join(found.values())}. Restore them, start anew in another "
            "run.dir, or go on with data.on_change=restart_sources, which begins changed sources anew"
        )


def restart_sources(
    state: PlanState, current: Fingerprint, first_lanes: Sequence[LaneState]
) -> tuple[PlanState, list[str]]:
    """The state that goes on with the current data and mixture, and in words what happens to which source.

    `first_lanes` are all lanes as a new plan begins them. Raises UserError where a change is no matter of sources.
    """
    found = changes(state.fingerprint, current)
    for name, change in found.items():
        if _REFUSED.fullmatch(name):
            raise UserError(f"this run cannot resume the saved one: {change}. Restore it, or start anew")
    told = list(found.values())
    if any(_DEALS_ALL.fullmatch(name) for name in found):
        told.append("all sources begin anew")
        lanes: tuple[LaneState, ...] = tuple(first_lanes)
    else:
        ones = [match[1] for name in found if (match := _DEALS_ONE.fullmatch(name))]
        told += [f"source {name} begins anew" for name in ones if name in first_lanes[0].cursors]
        told += [f"source {name} ends" for name in ones if name not in first_lanes[0].cursors]
        lanes = tuple(_restart(*pair, ones) for pair in zip(state.lanes, first_lanes, strict=True))
    return replace(state, fingerprint=current, lanes=lanes), told


def _restart(saved: LaneState, first: LaneState, anew: Sequence[str]) -> LaneState:
    """The lane without its place in the sources `anew`, and without what it carries of them."""
    kept = [name for name in first.cursors if name not in anew]
    return replace(
        saved,
        credits={name: saved.credits[name] if name in kept else 0 for name in first.credits},
        cursors={name: saved.cursors[name] if name in kept else FIRST for name in first.cursors},
        left_out={name: saved.left_out[name] if name in kept else 0 for name in first.left_out},
        waiting={
            modality: tuple(waiting for waiting in pool if waiting.unit.source in kept)
            for modality, pool in saved.waiting.items()
        },
    )
