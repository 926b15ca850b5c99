"""Packing on metadata: best-fit decreasing over what a lane has at hand; the fullest rows are emitted.

Everything is integers and ties fall by position, so every rank and library version packs alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_vl.data.types import Pack, Unit


@dataclass(frozen=True)
class Waiting:
    """A unit in a lane's pool; `age` counts the lane's batches of its modality that passed it over."""

    unit: Unit
    age: int


@dataclass(frozen=True, kw_only=True)
class PackingRule:
    """How a lane fills the rows of one batch."""

    num_rows: int
    sequence_length: int  # tokens in a row
    max_images: int  # in a row
    window: int  # units packed together
    max_carry_steps: int

    def wants_more(self, num_units: int, num_tokens: int) -> bool:
        """Whether a pool of that size should grow before it is packed.

        It must exceed all rows but one, as then at least `num_rows` rows come out. For choice it should reach
        the window, but not beyond half of what the lane emits until a unit is overdue, else most would be.
        """
        if num_tokens <= (self.num_rows - 1) * self.sequence_length:
            return True
        most_tokens = self.num_rows * self.sequence_length * self.max_carry_steps // 2
        return num_units < self.window and num_tokens < most_tokens

    def emit(self, pool: Sequence[Waiting]) -> tuple[list[Pack], tuple[Waiting, ...]]:
        """The `num_rows` best rows of the pool, and the units left, a batch older.

        Rows with overdue units (age >= max_carry_steps) come first, the oldest ahead, then the fullest.
        Raises ValueError where the pool does not give `num_rows` rows, or a unit exceeds a row.
        """
        rows = self._best_fit(pool)
        if len(rows) < self.num_rows:
            raise ValueError(f"{len(pool)} units fill {len(rows)} of {self.num_rows} rows: draw more first")
        rows.sort(key=lambda row: (-row.oldest_overdue, row.free_tokens))
        emitted = rows[: self.num_rows]
        packs = [Pack(units=tuple(pool[i].unit for i in sorted(row.members))) for row in emitted]
        taken = {i for row in emitted for i in row.members}
        left = (waiting for i, waiting in enumerate(pool) if i not in taken)
        return packs, tuple(replace(waiting, age=waiting.age + 1) for waiting in left)

    def _best_fit(self, pool: Sequence[Waiting]) -> list["_Row"]:
        """All units of the pool in rows: overdue ones first, each group by falling length."""
        rows: list[_Row] = []
        order = sorted(range(len(pool)), key=lambda i: (not self._overdue(pool[i]), -pool[i].unit.num_tokens))
        for i in order:
            unit = pool[i].unit
            if unit.num_tokens > self.sequence_length or unit.num_images > self.max_images:
                raise ValueError(f"{unit} exceeds {self.sequence_length} tokens or {self.max_images} images")
            fitting = [row for row in rows if row.fits(unit)]
            if fitting:
                row = min(fitting, key=lambda row: row.free_tokens)
            else:
                row = _Row(free_tokens=self.sequence_length, free_images=self.max_images)
                rows.append(row)
            row.free_tokens -= unit.num_tokens
            row.free_images -= unit.num_images
            row.members.append(i)
            if self._overdue(pool[i]):
                row.oldest_overdue = max(row.oldest_overdue, pool[i].age)
        return rows

    def _overdue(self, waiting: Waiting) -> bool:
        return waiting.age >= self.max_carry_steps


@dataclass
class _Row:
    """An open row: what is free in it, its units' places in the pool, the age of its oldest overdue unit."""

    free_tokens: int
    free_images: int
    members: list[int] = field(default_factory=list)
    oldest_overdue: int = -1

    def fits(self, unit: Unit) -> bool:
        return unit.num_tokens <= self.free_tokens and unit.num_images <= self.free_images
