"""Where a plan stands: small, explicit, and good for any data-parallel size.

A plan's state is that of the step's modality, which all ranks share, and of each lane. A rank holds its own
lanes; `merge_states` joins those of all ranks, and a planner of any data-parallel size takes its own from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from megatron_vl.config.errors import UserError
from megatron_vl.data.balance import RowCost
from megatron_vl.data.packing import Waiting
from megatron_vl.data.types import Unit

VERSION = 2

# What a plan was made for: values under the names that users know (`run.seed`, `data.shuffle_window` …).
Fingerprint = Mapping[str, int | float | str | bool]


class Cursor(NamedTuple):
    """The next unit of a lane in a source: `position` in a `window` of the lane's share of `epoch`."""

    epoch: int
    window: int
    position: int


FIRST = Cursor(0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class LaneState:
    """One lane. Planning a step makes a new one and leaves this as it is, so keeping it costs nothing."""

    lane: int
    credits: Mapping[str, int]  # per source: how far its draws lag behind its weight
    cursors: Mapping[str, Cursor]  # per source
    left_out: Mapping[str, int]  # per source: samples that no row can hold, so far
    waiting: Mapping[str, tuple[Waiting, ...]]  # per modality: the carried units, oldest first
    num_batches: Mapping[str, int]  # per modality: planned so far, which tells when to flush


@dataclass(frozen=True, kw_only=True)
class PlanState:
    """A plan after `step` steps, for some or all lanes."""

    step: int
    deficit: int  # text owed by a lane, in millionths of a row
    cost: RowCost  # that rows are dealt by
    fingerprint: Fingerprint
    lanes: tuple[LaneState, ...]

    @property
    def left_out(self) -> dict[str, int]:
        """Per source: samples so far that no row can hold."""
        counts: dict[str, int] = {}
        for lane in self.lanes:
            for source, count in lane.left_out.items():
                counts[source] = counts.get(source, 0) + count
        return counts

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts; a carried unit is [source, sample, piece, tokens, images, age]."""
        return {
            "version": VERSION,
            "step": self.step,
            "deficit": self.deficit,
            "cost": asdict(self.cost),
            "fingerprint": dict(self.fingerprint),
            "lanes": [_lane_to_json(lane) for lane in self.lanes],
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "PlanState":
        """The inverse of `to_json`. Raises UserError for a state of another version."""
        if saved["version"] != VERSION:
            raise UserError(
                f"the saved plan has version {saved['version']}; this code reads version {VERSION}"
            )
        return cls(
            step=saved["step"],
            deficit=saved["deficit"],
            cost=RowCost(**saved["cost"]),
            fingerprint=saved["fingerprint"],
            lanes=tuple(_lane_from_json(lane) for lane in saved["lanes"]),
        )


def merge_states(states: Sequence[PlanState]) -> PlanState:
    """One state with all lanes, in order. Raises ValueError where they are not of the same plan and step."""
    first = states[0]
    for state in states:
        if (state.step, state.deficit, state.fingerprint) != (first.step, first.deficit, first.fingerprint):
            raise ValueError(f"plan states of steps {first.step} and {state.step} do not belong together")
    lanes = {lane.lane: lane for state in states for lane in state.lanes}
    merged = tuple(lanes[lane] for lane in sorted(lanes))
    return PlanState(
        step=first.step, deficit=first.deficit, cost=first.cost, fingerprint=first.fingerprint, lanes=merged
    )


def _lane_to_json(lane: LaneState) -> dict[str, Any]:
    return {
        "lane": lane.lane,
        "credits": dict(lane.credits),
        "cursors": {source: list(cursor) for source, cursor in lane.cursors.items()},
        "left_out": dict(lane.left_out),
        "waiting": {
            modality: [[*waiting.unit, waiting.age] for waiting in pool]
            for modality, pool in lane.waiting.items()
        },
        "num_batches": dict(lane.num_batches),
    }


def _lane_from_json(saved: Mapping[str, Any]) -> LaneState:
    return LaneState(
        lane=saved["lane"],
        credits=saved["credits"],
        cursors={source: Cursor(*cursor) for source, cursor in saved["cursors"].items()},
        left_out=saved["left_out"],
        waiting={
            modality: tuple(Waiting(Unit(*unit), age) for *unit, age in pool)
            for modality, pool in saved["waiting"].items()
        },
        num_batches=saved["num_batches"],
    )
