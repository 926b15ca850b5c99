"""What a plan is made by: the stage's values, who owns which lanes, and what a resume must find unchanged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_vl.config.errors import UserError
from megatron_vl.data.balance import RowCost
from megatron_vl.data.deal import DealSettings, SourceTable
from megatron_vl.data.hashing import stream_key
from megatron_vl.data.mixture import TextSchedule
from megatron_vl.data.packing import PackingRule
from megatron_vl.data.plan_state import Fingerprint

STEP, PHASE = "step", "phase"  # groupings: modalities alternate by steps, or by phases within each


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """One stage's values of the config's fields of the same names; `lanes` as `choose_lanes` gives them.

    Raises UserError, naming the field, where values make no plan.
    """

    stage: str
    seed: int
    num_steps: int
    text_ratio: float
    text_warmup_fraction: float
    grouping: str
    sources: Mapping[str, float]  # weights within their modality, by samples
    max_epochs: Mapping[str, int]  # after which a source gives no more; without an entry it repeats
    global_batch_size: int
    micro_batch_size: int
    sequence_length: int
    packing: bool
    lanes: int
    shuffle_window: int
    packing_window: int
    max_carry_steps: int
    flush_steps: int
    max_images_per_pack: int
    balance_lanes: int
    cost: RowCost

    def __post_init__(self) -> None:
        if self.global_batch_size % self.lanes:
            raise UserError(
                f"{self.lanes} lanes do not divide the global batch of {self.global_batch_size} rows "
                f"(stage.{self.stage}.global_batch_size); choose_lanes gives a number that does"
            )
        if self.grouping not in (STEP, PHASE):
            raise UserError(f"stage.{self.stage}.grouping={self.grouping}: must be {STEP} or {PHASE}")
        if self.num_rows % self.text_quantum:
            raise UserError(
                f"stage.{self.stage}.grouping={PHASE} makes whole microbatches of text within each lane's "
                f"{self.num_rows} rows (the global batch over {self.lanes} lanes), which micro_batch_size="
                f"{self.micro_batch_size} does not divide; lower data.lanes or micro_batch_size"
            )
        for field, value, least in (
            ("data.flush_steps", self.flush_steps, 1),
            ("data.shuffle_window", self.shuffle_window, 1),
            ("data.balance_lanes", self.balance_lanes, 0),
        ):
            if value < least:
                raise UserError(f"{field}={value}: must be at least {least}")
        for name, epochs in self.max_epochs.items():
            if name not in self.sources or epochs < 1:
                raise UserError(
                    f"stage.{self.stage}.max_epochs.{name}={epochs}: it must be at least 1, for a source with a weight"
                )

    @property
    def num_rows(self) -> int:
        """Of a lane in a step."""
        return self.global_batch_size // self.lanes

    @property
    def text_quantum(self) -> int:
        """How many rows of a lane turn to text at once."""
        return self.num_rows if self.grouping == STEP else self.micro_batch_size

    @property
    def text_schedule(self) -> TextSchedule:
        return TextSchedule.of_stage(self.stage, self.num_steps, self.text_ratio, self.text_warmup_fraction)

    @property
    def packing_rule(self) -> PackingRule:
        return PackingRule(
            sequence_length=self.sequence_length,
            max_images=self.max_images_per_pack,
            window=self.packing_window,
            max_carry_steps=self.max_carry_steps,
            flush_steps=self.flush_steps,
        )

    def deal_settings(self, source: str) -> DealSettings:
        return DealSettings(
            key=stream_key(self.seed, self.stage, source),
            lanes=self.lanes,
            shuffle_window=self.shuffle_window,
            sequence_length=self.sequence_length,
            max_images_per_pack=self.max_images_per_pack,
        )


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """Data-parallel ranks that deal the rows of their lanes among themselves, and these lanes."""

    ranks: range
    lanes: range

    def own_lanes(self, dp_rank: int) -> range:
        """The lanes whose state a rank keeps."""
        share = len(self.lanes) // len(self.ranks)
        start = self.lanes.start + self.ranks.index(dp_rank) * share
        return range(start, start + share)


def choose_lanes(max_lanes: int, global_batch_size: int) -> int:
    """The largest number of lanes that divides both `data.lanes` and the global batch."""
    return math.gcd(max_lanes, global_batch_size)


def rank_group(lanes: int, balance_lanes: int, dp_rank: int, dp_size: int) -> RankGroup:
    """The group of a data-parallel rank: it alone, where `balance_lanes` are not more than it owns, or none (0).

    Raises UserError where `dp_size` does not divide `lanes`.
    """
    if lanes % dp_size:
        valid = [size for size in range(1, lanes + 1) if lanes % size == 0]
        raise UserError(
            f"data-parallel size {dp_size} (ranks / (parallel.tensor_size x parallel.pipeline_size)) does "
            f"not divide the {lanes} lanes, the greatest common divisor of data.lanes and the global batch "
            f"(train.global_batch_size); it may be one of {valid}, or change those two"
        )
    share = lanes // dp_size
    size = math.lcm(share, math.gcd(balance_lanes, lanes)) if balance_lanes else share
    group = dp_rank * share // size
    return RankGroup(
        ranks=range(group * size // share, (group + 1) * size // share),
        lanes=range(group * size, (group + 1) * size),
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
    """Everything that decides which rows a step has, but the state. The length of the stage counts by its warm-up
    alone; who computes a row does not count."""
    stage = f"stage.{settings.stage}"
    used = weighed_sources(tables, settings)
    return {
        "run.seed": settings.seed,
        f"{stage}.global_batch_size": settings.global_batch_size,
        f"{stage}.sequence_length": settings.sequence_length,
        f"{stage}.packing": settings.packing,
        f"{stage}.text_ratio": settings.text_ratio,
        f"{stage}.text_warmup_fraction x steps": settings.text_schedule.warmup_steps,
        f"{stage}.grouping": settings.grouping
        if settings.grouping == STEP
        else f"{PHASE} of {settings.text_quantum} rows",
        "lanes (data.lanes and the global batch)": settings.lanes,
        "data.shuffle_window": settings.shuffle_window,
        "data.packing_window": settings.packing_window,
        "data.max_carry_steps": settings.max_carry_steps,
        "data.flush_steps": settings.flush_steps,
        "data.max_images_per_pack": settings.max_images_per_pack,
        **{f"{stage}.sources.{name}": settings.sources[name] for name in used},
        **{f"{stage}.max_epochs.{name}": epochs for name, epochs in sorted(settings.max_epochs.items())},
        **{source_entry(name): tables[name].digest for name in used},
    }


def _phase(settings: PlanSettings) -> str:
    return f"{PHASE}, by {settings.text_quantum} row(s) of a lane"


def source_entry(name: str) -> str:
    """Under which a fingerprint has a source's digest."""
    return f"data.sources.{name} (digest of its index)"
