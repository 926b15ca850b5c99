"""Packing on metadata: best-fit decreasing over what a lane has at hand; the fullest rows are emitted.

Everything is integers and ties fall by position, so every rank and library version packs alike.

A lane keeps what it does not emit (its pool) for its next batches, for two reasons at most so long: a unit that was
passed over too often goes first, and every so many batches a lane is *flushed*, which leaves nothing in its pool.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from megatron_vl.data.types import Pack, Unit


class Waiting(NamedTuple):
    """A unit in a lane's pool; `age` counts the lane's batches of its modality that passed it over."""

    unit: Unit
    age: int


class Stream(Protocol):
    """Where a lane's units come from."""

    def draw(self) -> Unit: ...

    def undo(self) -> None:
        """Take back the last draw."""
        ...


@dataclass(frozen=True, kw_only=True)
class PackingRule:
    """How a lane fills rows."""

    sequence_length: int  # tokens in a row
    max_images: int  # in a row
    window: int  # units packed together
    max_carry_steps: int
    flush_steps: int

    def pack(
        self, waiting: Sequence[Waiting], num_rows: int, batches_left: int, stream: "Stream"
    ) -> tuple[list[Pack], tuple[Waiting, ...]]:
        """`num_rows` rows of what waits and of what `stream` gives, and the units left, a batch older.

        `batches_left` counts the lane's batches of this modality up to its next flush, this one included: at 1
        nothing is left.
        """
        if batches_left == 1:
            return self._flush(waiting, num_rows, stream)
        pool, room = _Pool(waiting), batches_left * num_rows
        while self._wants_more(pool, num_rows):
            pool.add(Waiting(stream.draw(), 0))
            if not self._surely_fits(pool, room) and len(self._best_fit(pool.waiting, by_age=False)) > room:
                pool.drop_last()
                stream.undo()
                break
        # Near a flush, rows must come out of what is left as they would have now: the order is by length alone.
        return self._emit(pool.waiting, num_rows, by_age=self._surely_fits(pool, room - num_rows))

    def _wants_more(self, pool: "_Pool", num_rows: int) -> bool:
        """Whether a pool should grow before it is packed.

        It must exceed all rows but one, as then at least `num_rows` rows come out. For choice it should reach
        the window, but not beyond half of what the lane emits until a unit is overdue, else most would be.
        """
        if pool.num_tokens <= (num_rows - 1) * self.sequence_length:
            return True
        most_tokens = num_rows * self.sequence_length * self.max_carry_steps // 2
        return len(pool.waiting) < self.window and pool.num_tokens < most_tokens

    def _surely_fits(self, pool: "_Pool", num_rows: int) -> bool:
        """Whether best fit needs at most `num_rows` rows, by a bound: two of its rows never fit into one."""
        most = 2 * pool.num_tokens // self.sequence_length + 2 * pool.num_images // self.max_images + 2
        return most <= num_rows

    def _emit(
        self, pool: Sequence[Waiting], num_rows: int, *, by_age: bool
    ) -> tuple[list[Pack], tuple[Waiting, ...]]:
        """The best rows. Those with overdue units (age >= max_carry_steps) come first, the oldest ahead, then the
        fullest. Raises ValueError where the pool does not give `num_rows` rows."""
        rows = self._best_fit(pool, by_age=by_age)
        if len(rows) < num_rows:
            raise ValueError(f"{len(pool)} units fill {len(rows)} of {num_rows} rows: draw more first")
        rows.sort(key=lambda row: (-row.oldest_overdue, row.free_tokens))
        packs, taken = [], set()
        for row in rows[:num_rows]:
            packs.append(Pack(tuple(pool[i].unit for i in sorted(row.members))))
            taken.update(row.members)
        left = tuple(Waiting(unit, age + 1) for i, (unit, age) in enumerate(pool) if i not in taken)
        return packs, left

    def _flush(
        self, waiting: Sequence[Waiting], num_rows: int, stream: "Stream"
    ) -> tuple[list[Pack], tuple[Waiting, ...]]:
        """All that waits, and what is drawn until something does not fit."""
        units, rows = [unit for unit, _ in waiting], _Rows(self)
        for i in _by_length(waiting):
            rows.place(i, units[i])
        while len(rows.rows) <= num_rows:
            units.append(stream.draw())
            rows.place(len(units) - 1, units[-1])
        if len(units) > len(waiting):
            stream.undo()
        packs = [Pack(tuple(units[i] for i in sorted(row.members))) for row in rows.rows]
        # Nothing is behind the last row, unless batches of other sizes (phases) left more than fits: it waits.
        left = sorted(i for row in rows.rows[num_rows:] for i in row.members if i < len(waiting))
        return packs[:num_rows], tuple(Waiting(units[i], waiting[i].age + 1) for i in left)

    def _best_fit(self, pool: Sequence[Waiting], *, by_age: bool) -> list["_Row"]:
        """All units of the pool in rows, by falling length; overdue ones before the others."""
        rows = _Rows(self)
        order = _by_length(pool)
        if by_age:
            order.sort(key=lambda i: not self._overdue(pool[i]))
        for i in order:
            row = rows.place(i, pool[i].unit)
            if self._overdue(pool[i]):
                row.oldest_overdue = max(row.oldest_overdue, pool[i].age)
        return rows.rows

    def _overdue(self, waiting: Waiting) -> bool:
        return waiting.age >= self.max_carry_steps


def _by_length(pool: Sequence[Waiting]) -> list[int]:
    """Places in the pool, the longest unit's first."""
    return sorted(range(len(pool)), key=lambda i: -pool[i].unit.num_tokens)


class _Pool:
    """What a lane has at hand, and how much that is."""

    def __init__(self, waiting: Sequence[Waiting]) -> None:
        self.waiting = list(waiting)
        self.num_tokens = sum(unit.num_tokens for unit, _ in waiting)
        self.num_images = sum(unit.num_images for unit, _ in waiting)

    def add(self, waiting: Waiting) -> None:
        self.waiting.append(waiting)
        self.num_tokens += waiting.unit.num_tokens
        self.num_images += waiting.unit.num_images

    def drop_last(self) -> None:
        unit = self.waiting.pop().unit
        self.num_tokens -= unit.num_tokens
        self.num_images -= unit.num_images


@dataclass
class _Row:
    """An open row: what is free in it, its units' places in the pool, the age of its oldest overdue unit."""

    free_tokens: int
    free_images: int
    members: list[int] = field(default_factory=list)
    oldest_overdue: int = -1


class _Rows:
    """Rows as they fill, held by free tokens, so that the best fit is found by bisection."""

    def __init__(self, rule: PackingRule) -> None:
        self._rule = rule
        self.rows: list[_Row] = []
        self._by_room: list[tuple[int, int]] = []  # free tokens, place in `rows`

    def place(self, member: int, unit: Unit) -> _Row:
        """Put a unit into the row that it fills best, the first of equals, or into a new one.

        Raises ValueError where a unit exceeds a row.
        """
        at = bisect_left(self._by_room, (unit.num_tokens, -1))
        while at < len(self._by_room) and self.rows[self._by_room[at][1]].free_images < unit.num_images:
            at += 1
        if at < len(self._by_room):
            _, place = self._by_room.pop(at)
        else:
            place = len(self.rows)
            self.rows.append(_Row(self._rule.sequence_length, self._rule.max_images))
        row = self.rows[place]
        row.free_tokens -= unit.num_tokens
        row.free_images -= unit.num_images
        if row.free_tokens < 0 or row.free_images < 0:
            raise ValueError(
                f"{unit} exceeds {self._rule.sequence_length} tokens or {self._rule.max_images} images"
            )
        row.members.append(member)
        insort(self._by_room, (row.free_tokens, place))
        return row
