"""What every step trains on, computed from metadata before a byte is read.

step's modality (global, error diffusion) ─> each lane: draw units ─> pack ─> its rows of the global batch

A plan is a pure function of (settings, sources, state). Lanes know nothing of each other, and a data-parallel
rank plans for those it owns, so the global batch is the same for every data-parallel size.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from megatron_vl.config.errors import UserError
from megatron_vl.data.deal import DealSettings, SourceDeal, SourceTable
from megatron_vl.data.hashing import stream_key
from megatron_vl.data.mixture import MILLION, TextSchedule, next_modality, pick_source, unit_weights
from megatron_vl.data.packing import PackingRule, Waiting
from megatron_vl.data.plan_state import Cursor, Fingerprint, LaneState, PlanState, check_resumable
from megatron_vl.data.types import MULTIMODAL, TEXT, Pack, StepPlan, Unit

# Lanes start as if they had drawn up to so many units, lest all draw from the same source at the same time.
_MAX_HEAD_START = 256


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """One stage's values of the config's fields of the same names; `lanes` as `choose_lanes` gives them."""

    stage: str
    seed: int
    num_steps: int
    text_ratio: float
    text_warmup_fraction: float
    sources: Mapping[str, float]  # weights within their modality, by samples
    global_batch_size: int
    sequence_length: int
    packing: bool
    lanes: int
    shuffle_window: int
    packing_window: int
    max_carry_steps: int
    max_images_per_pack: int

    @property
    def text_schedule(self) -> TextSchedule:
        return TextSchedule.of_stage(self.stage, self.num_steps, self.text_ratio, self.text_warmup_fraction)


def choose_lanes(max_lanes: int, global_batch_size: int) -> int:
    """The largest number of lanes that divides both `data.lanes` and the global batch."""
    return math.gcd(max_lanes, global_batch_size)


def own_lanes(lanes: int, dp_rank: int, dp_size: int) -> range:
    """The lanes of a data-parallel rank. Raises UserError where `dp_size` does not divide `lanes`."""
    if lanes % dp_size:
        valid = [size for size in range(1, lanes + 1) if lanes % size == 0]
        raise UserError(
            f"data-parallel size {dp_size} (ranks / (parallel.tensor_size x parallel.pipeline_size)) does "
            f"not divide the {lanes} lanes, the greatest common divisor of data.lanes and the global batch "
            f"(train.global_batch_size); it may be one of {valid}, or change those two"
        )
    share = lanes // dp_size
    return range(dp_rank * share, (dp_rank + 1) * share)


class Planner:
    """Plans step after step for the lanes of one data-parallel rank.

    `tables` holds the sources by name; those that `settings.sources` does not weigh are not used.
    Raises UserError for values or sources that no plan can be made of.
    """

    def __init__(
        self, tables: Mapping[str, SourceTable], settings: PlanSettings, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        lanes = own_lanes(settings.lanes, dp_rank, dp_size)
        if settings.global_batch_size % settings.lanes:
            raise UserError(
                f"{settings.lanes} lanes do not divide the global batch of {settings.global_batch_size} rows "
                f"(stage.{settings.stage}.global_batch_size); choose_lanes gives a number that does"
            )
        self._settings = settings
        self._schedule = settings.text_schedule
        self._num_rows = settings.global_batch_size // settings.lanes
        self._rule = PackingRule(
            num_rows=self._num_rows,
            sequence_length=settings.sequence_length,
            max_images=settings.max_images_per_pack,
            window=settings.packing_window,
            max_carry_steps=settings.max_carry_steps,
        )
        self._deals = {name: self._deal(tables[name]) for name in weighed_sources(tables, settings)}
        self._weights = {modality: self._modality_weights(modality) for modality in (TEXT, MULTIMODAL)}
        self._check_modalities()
        self._fingerprint = fingerprint(tables, settings)
        self._step, self._deficit = 0, 0
        self._lanes = [self._first_state(lane) for lane in lanes]

    @property
    def left_out(self) -> dict[str, int]:
        """Per source: samples that no row can hold (see SourceDeal)."""
        return {name: deal.num_left_out for name, deal in self._deals.items()}

    @property
    def fingerprint(self) -> Fingerprint:
        return self._fingerprint

    def next(self) -> StepPlan:
        """The next step's plan: this rank's rows, lane by lane."""
        self._step += 1
        share = self._schedule.at(self._step)
        modality, self._deficit = next_modality(self._deficit, share)
        packs: list[Pack] = []
        for i, lane in enumerate(self._lanes):
            lane_packs, self._lanes[i] = self._plan_lane(lane, modality)
            packs.extend(lane_packs)
        return StepPlan(
            step=self._step,
            modality=modality,
            text_ratio=share / MILLION,
            packs=tuple(packs),
            digest=plan_digest(modality, packs),
        )

    def state(self) -> PlanState:
        """Where the plan stands after the steps so far, for this rank's lanes. Cheap: nothing is copied."""
        return PlanState(
            step=self._step, deficit=self._deficit, fingerprint=self._fingerprint, lanes=tuple(self._lanes)
        )

    def restore(self, state: PlanState) -> None:
        """Go on from `state`, made at any data-parallel size.

        Raises UserError where it belongs to another plan, ValueError where it lacks lanes of this rank.
        """
        check_resumable(state.fingerprint, self._fingerprint)
        saved = {lane.lane: lane for lane in state.lanes}
        own = [lane.lane for lane in self._lanes]
        missing = [lane for lane in own if lane not in saved]
        if missing:
            raise ValueError(
                f"the saved plan lacks lanes {missing}: merge the states of all data-parallel ranks"
            )
        self._step, self._deficit = state.step, state.deficit
        self._lanes = [saved[lane] for lane in own]

    def _plan_lane(self, lane: LaneState, modality: str) -> tuple[list[Pack], LaneState]:
        """The lane's rows of one batch, and the lane after it."""
        credits, cursors = dict(lane.credits), dict(lane.cursors)
        pool = list(lane.waiting[modality])
        num_tokens = sum(waiting.unit.num_tokens for waiting in pool)
        while self._wants_more(len(pool), num_tokens):
            source = pick_source(credits, self._weights[modality])
            unit, cursors[source] = self._draw(lane.lane, source, cursors[source])
            pool.append(Waiting(unit=unit, age=0))
            num_tokens += unit.num_tokens
        left: tuple[Waiting, ...] = ()
        if self._settings.packing:
            packs, left = self._rule.emit(pool)
        else:
            packs = [Pack(units=(waiting.unit,)) for waiting in pool]
        waiting = {**lane.waiting, modality: left}
        return packs, LaneState(lane=lane.lane, credits=credits, cursors=cursors, waiting=waiting)

    def _wants_more(self, num_units: int, num_tokens: int) -> bool:
        if self._settings.packing:
            return self._rule.wants_more(num_units, num_tokens)
        return num_units < self._num_rows

    def _draw(self, lane: int, source: str, cursor: Cursor) -> tuple[Unit, Cursor]:
        deal = self._deals[source]
        unit = deal.unit(lane, cursor.epoch, cursor.position)
        if cursor.position + 1 == deal.num_units(lane, cursor.epoch):
            return unit, Cursor(cursor.epoch + 1, 0)
        return unit, Cursor(cursor.epoch, cursor.position + 1)

    def _first_state(self, lane: int) -> LaneState:
        credits = dict.fromkeys(self._deals, 0)
        key = stream_key(self._settings.seed, self._settings.stage, "head start", lane)
        for weights in filter(None, self._weights.values()):
            for _ in range(key % _MAX_HEAD_START):
                pick_source(credits, weights)
        cursors = dict.fromkeys(self._deals, Cursor(0, 0))
        return LaneState(lane=lane, credits=credits, cursors=cursors, waiting={TEXT: (), MULTIMODAL: ()})

    def _deal(self, table: SourceTable) -> SourceDeal:
        settings = DealSettings(
            key=stream_key(self._settings.seed, self._settings.stage, table.name),
            lanes=self._settings.lanes,
            shuffle_window=self._settings.shuffle_window,
            sequence_length=self._settings.sequence_length,
            max_images_per_pack=self._settings.max_images_per_pack,
        )
        return SourceDeal(table, settings)

    def _modality_weights(self, modality: str) -> dict[str, int]:
        deals = {name: deal for name, deal in self._deals.items() if deal.table.modality == modality}
        return unit_weights(
            {name: self._settings.sources[name] for name in deals},
            {name: deal.units_per_sample for name, deal in deals.items()},
        )

    def _check_modalities(self) -> None:
        stage = self._settings.stage
        for modality in self._schedule.modalities(self._settings.num_steps):
            if not self._weights[modality]:
                raise UserError(
                    f"stage.{stage}.text_ratio {self._settings.text_ratio} (after a warm-up of "
                    f"{self._settings.text_warmup_fraction} of the steps) asks for {modality} steps, but "
                    f"stage.{stage}.sources weighs no {modality} source, only {list(self._deals)}"
                )


def weighed_sources(tables: Mapping[str, SourceTable], settings: PlanSettings) -> list[str]:
    """The sources with a weight, by name. Raises UserError for an unknown one or a negative weight."""
    field = f"stage.{settings.stage}.sources"
    for name, weight in settings.sources.items():
        if not 0 <= weight < math.inf:
            raise UserError(f"{field}.{name} is {weight}; a weight must be finite and not negative")
        if weight > 0 and name not in tables:
            raise UserError(f"{field} names {name}, which data.sources lacks; it has {sorted(tables)}")
    return sorted(name for name, weight in settings.sources.items() if weight > 0)


def fingerprint(tables: Mapping[str, SourceTable], settings: PlanSettings) -> Fingerprint:
    """Everything the plan depends on but the state. The length of the stage counts by its warm-up alone."""
    stage = f"stage.{settings.stage}"
    used = weighed_sources(tables, settings)
    return {
        "run.seed": settings.seed,
        f"{stage}.global_batch_size": settings.global_batch_size,
        f"{stage}.sequence_length": settings.sequence_length,
        f"{stage}.packing": settings.packing,
        f"{stage}.text_ratio": settings.text_ratio,
        f"{stage}.text_warmup_fraction x steps": settings.text_schedule.warmup_steps,
        "lanes (data.lanes and the global batch)": settings.lanes,
        "data.shuffle_window": settings.shuffle_window,
        "data.packing_window": settings.packing_window,
        "data.max_carry_steps": settings.max_carry_steps,
        "data.max_images_per_pack": settings.max_images_per_pack,
        **{f"{stage}.sources.{name}": settings.sources[name] for name in used},
        **{f"data.sources.{name} (digest of its index)": tables[name].digest for name in used},
    }


def plan_digest(modality: str, packs: Sequence[Pack]) -> int:
    """63 bits over the modality and every unit of every pack."""
    units = [[astuple(unit) for unit in pack.units] for pack in packs]
    digest = hashlib.blake2b(json.dumps([modality, units]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
