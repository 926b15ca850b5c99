"""What every step trains on, computed from metadata before a byte is read.

step's modality (global, error diffusion) ─> each lane: draw units ─> pack ─> rows ─ dealt by cost ─> ranks

A plan is a pure function of (settings, sources, state). Lanes know nothing of each other, so the global batch is the
same for every data-parallel size; rows are dealt within a group of ranks that plan the same lanes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

from megatron_vl.config.errors import UserError
from megatron_vl.data.balance import deal_rows
from megatron_vl.data.deal import SourceDeal, SourceTable
from megatron_vl.data.hashing import stream_key
from megatron_vl.data.lane import LaneRule
from megatron_vl.data.mixture import MILLION, book_draw, next_text_rows, pick_source, sample_weights
from megatron_vl.data.plan_change import check_resumable
from megatron_vl.data.plan_settings import PlanSettings, fingerprint, rank_group, weighed_sources
from megatron_vl.data.plan_state import FIRST, Fingerprint, LaneState, PlanState
from megatron_vl.data.types import MIXED, MULTIMODAL, TEXT, Pack, StepPlan

# Lanes start as if they had drawn up to so many units, lest all draw from the same source at the same time.
_MAX_HEAD_START = 256
_DIGEST_BITS = 52  # exact as a floating-point number of 64


class Planner:
    """Plans step after step for a data-parallel rank and those that it shares rows with.

    `tables` holds the sources by name; those that `settings.sources` does not weigh are not used.
    Raises UserError for values or sources that no plan can be made of.
    """

    def __init__(
        self, tables: Mapping[str, SourceTable], settings: PlanSettings, dp_rank: int = 0, dp_size: int = 1
    ) -> None:
        self.group = rank_group(settings.lanes, settings.balance_lanes, dp_rank, dp_size)
        self._rank, self._settings, self._schedule = dp_rank, settings, settings.text_schedule
        deals = {
            name: SourceDeal(tables[name], settings.deal_settings(name))
            for name in weighed_sources(tables, settings)
        }
        self._rules = {modality: self._rule(modality, deals) for modality in (MULTIMODAL, TEXT)}
        self._check_modalities(list(deals))
        self._fingerprint = fingerprint(tables, settings)
        self._step, self._deficit, self._cost = 0, 0, settings.cost
        self._lanes = [self._first_state(lane) for lane in self.group.lanes]

    @property
    def fingerprint(self) -> Fingerprint:
        return self._fingerprint

    @property
    def step(self) -> int:
        """The last step that was planned; 0 before the first."""
        return self._step

    def next(self) -> StepPlan:
        """The next step's plan for this rank."""
        return self.next_of_group()[self._rank]

    def next_of_group(self) -> dict[int, StepPlan]:
        """The next step's plan for every rank of the group. Where it raises, the plan stands where it was."""
        step, lanes = self._step + 1, list(self._lanes)
        share, num_rows = self._schedule.at(step), self._settings.num_rows
        num_text, deficit = next_text_rows(self._deficit, share, num_rows, self._settings.text_quantum)
        phases = [(MULTIMODAL, num_rows - num_text), (TEXT, num_text)]
        shares: list[list[Pack]] = [[] for _ in self.group.ranks]
        for modality, count in phases:
            if count:
                for rank, packs in enumerate(self._deal(self._plan_lanes(lanes, modality, count))):
                    shares[rank] += packs
        modality = MIXED if 0 < num_text < num_rows else TEXT if num_text else MULTIMODAL
        digest = plan_digest(step, modality, shares)
        self._step, self._deficit, self._lanes = step, deficit, lanes
        return {
            rank: StepPlan(
                step=step,
                modality=modality,
                text_ratio=share / MILLION,
                text_share=num_text / num_rows,
                packs=tuple(packs),
                group=self.group.ranks.start,
                digest=digest,
            )
            for rank, packs in zip(self.group.ranks, shares, strict=True)
        }

    def state(self, dp_rank: int | None = None) -> PlanState:
        """Where the plan stands after the steps so far, for the lanes of one rank. Cheap: nothing is copied."""
        own = self.group.own_lanes(self._rank if dp_rank is None else dp_rank)
        start = own.start - self.group.lanes.start
        return PlanState(
            step=self._step,
            deficit=self._deficit,
            cost=self._cost,
            fingerprint=self._fingerprint,
            lanes=tuple(self._lanes[start : start + len(own)]),
        )

    def restore(self, state: PlanState) -> None:
        """Go on from `state`, made at any data-parallel size. Rows are dealt by the costs that it has.

        Raises UserError where it belongs to another plan, ValueError where it lacks lanes of this rank's group.
        """
        check_resumable(state.fingerprint, self._fingerprint)
        saved = {lane.lane: lane for lane in state.lanes}
        missing = [lane for lane in self.group.lanes if lane not in saved]
        if missing:
            raise ValueError(
                f"the saved plan lacks lanes {missing}: merge the states of all data-parallel ranks"
            )
        self._step, self._deficit, self._cost = state.step, state.deficit, state.cost
        self._lanes = [saved[lane] for lane in self.group.lanes]

    def _plan_lanes(self, lanes: list[LaneState], modality: str, num_rows: int) -> list[Pack]:
        """`num_rows` rows of each lane, lane by lane; `lanes` become what they are after these."""
        settings = self._settings
        packs: list[Pack] = []
        for i, lane in enumerate(lanes):
            # Lanes are flushed one after the other, lest the whole batch be emptier at once.
            offset = lane.lane * settings.flush_steps // settings.lanes
            rows, lanes[i] = self._rules[modality].plan(lane, num_rows, offset)
            packs += rows
        return packs

    def _deal(self, packs: list[Pack]) -> list[list[Pack]]:
        """The rows of each rank of the group. A rank alone has nobody to deal with."""
        num_ranks = len(self.group.ranks)
        return [packs] if num_ranks == 1 else deal_rows(packs, num_ranks, self._cost)

    def _rule(self, modality: str, deals: Mapping[str, SourceDeal]) -> LaneRule:
        settings = self._settings
        weights = {name: settings.sources[name] for name in deals if deals[name].table.modality == modality}
        return LaneRule(
            stage=settings.stage,
            modality=modality,
            deals=deals,
            weights=sample_weights(weights),
            max_epochs={name: settings.max_epochs[name] for name in weights if name in settings.max_epochs},
            packing=settings.packing_rule if settings.packing else None,
        )

    def _first_state(self, lane: int) -> LaneState:
        names = sorted(name for rule in self._rules.values() for name in rule.weights)
        credits = dict.fromkeys(names, 0)
        key = stream_key(self._settings.seed, self._settings.stage, "head start", lane)
        for rule in self._rules.values():
            for _ in range(key % _MAX_HEAD_START if rule.weights else 0):
                book_draw(credits, rule.weights, pick_source(credits, rule.weights), num_pieces=1)
        return LaneState(
            lane=lane,
            credits=credits,
            cursors=dict.fromkeys(names, FIRST),
            left_out=dict.fromkeys(names, 0),
            waiting={TEXT: (), MULTIMODAL: ()},
            num_batches={TEXT: 0, MULTIMODAL: 0},
        )

    def _check_modalities(self, names: list[str]) -> None:
        stage = self._settings.stage
        for modality in self._schedule.modalities(self._settings.num_steps):
            if not self._rules[modality].weights:
                raise UserError(
                    f"stage.{stage}.text_ratio {self._settings.text_ratio} (after a warm-up of "
                    f"{self._settings.text_warmup_fraction} of the steps) asks for {modality} steps, but "
                    f"stage.{stage}.sources weighs no {modality} source, only {names}"
                )


def plan_digest(step: int, modality: str, shares: Sequence[Sequence[Pack]]) -> int:
    """52 bits over step, modality and every unit of every row of every rank."""
    rows = [[pack.units for pack in packs] for packs in shares]
    digest = hashlib.blake2b(json.dumps([step, modality, rows]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _DIGEST_BITS)
