"""One lane of a plan: draws units by the sources' weights and fills its rows of a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_vl.config.errors import UserError
from megatron_vl.data.deal import Dealt, SourceDeal
from megatron_vl.data.mixture import book_draw, pick_source
from megatron_vl.data.packing import PackingRule
from megatron_vl.data.plan_state import Cursor, LaneState
from megatron_vl.data.types import Pack, Unit


@dataclass(frozen=True, kw_only=True)
class LaneRule:
    """How lanes fill their rows of one modality. `weights` are of that modality's sources, as integers."""

    stage: str
    modality: str
    deals: Mapping[str, SourceDeal]
    weights: Mapping[str, int]
    max_epochs: Mapping[str, int]
    packing: PackingRule | None  # None: one unit a row

    def plan(self, lane: LaneState, num_rows: int, flush_offset: int) -> tuple[Sequence[Pack], LaneState]:
        """`num_rows` rows, and the lane after them. `flush_offset`: by how many batches its flushes come earlier.

        Raises UserError where the sources give no more.
        """
        draws = Draws(self, lane)
        if self.packing is None:
            packs, left = [Pack((draws.draw(),)) for _ in range(num_rows)], lane.waiting[self.modality]
        else:
            every = self.packing.flush_steps
            batches_left = every - (lane.num_batches[self.modality] + flush_offset) % every
            packs, left = self.packing.pack(lane.waiting[self.modality], num_rows, batches_left, draws)
        after = replace(
            lane,
            credits=draws.credits,
            cursors=draws.cursors,
            left_out=draws.left_out,
            waiting={**lane.waiting, self.modality: left},
            num_batches={**lane.num_batches, self.modality: lane.num_batches[self.modality] + 1},
        )
        return packs, after


class Draws:
    """A lane's draws in one step: a `Stream` that keeps account."""

    def __init__(self, rule: LaneRule, lane: LaneState) -> None:
        self.credits, self.cursors, self.left_out = (
            dict(lane.credits),
            dict(lane.cursors),
            dict(lane.left_out),
        )
        self._rule, self._lane, self._weights = rule, lane.lane, dict(rule.weights)
        self._last: tuple[str, Dealt, Cursor] | None = None

    def draw(self) -> Unit:
        while self._weights:
            source = pick_source(self.credits, self._weights)
            cursor = self.cursors[source]
            dealt = self._rule.deals[source].next(self._lane, cursor, self._rule.max_epochs.get(source))
            if dealt is not None:
                self._book(source, dealt, cursor)
                return dealt.unit
            del self._weights[source]  # it has been seen often enough; the others take its share
        raise UserError(
            f"lane {self._lane} has used up its {self._rule.modality} sources: stage.{self._rule.stage}.max_epochs "
            f"allows {dict(self._rule.max_epochs)}. Train fewer steps, raise a limit, or add sources"
        )

    def undo(self) -> None:
        """Take back the last draw."""
        if self._last is None:
            raise RuntimeError("there is no draw to take back")
        source, dealt, cursor = self._last
        book_draw(self.credits, self._weights, source, dealt.num_pieces, sign=-1)
        self.cursors[source] = cursor
        self.left_out[source] -= dealt.num_left_out
        self._last = None

    def _book(self, source: str, dealt: Dealt, cursor: Cursor) -> None:
        book_draw(self.credits, self._weights, source, dealt.num_pieces)
        self.cursors[source] = dealt.cursor
        self.left_out[source] += dealt.num_left_out
        self._last = source, dealt, cursor
