"""Sources as arrays, and planners of them for any data-parallel size."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from benchmarks import length_mix
from megatron_vl.data.balance import RowCost
from megatron_vl.data.deal import SourceTable
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_settings import PlanSettings
from megatron_vl.data.plan_state import PlanState, merge_states
from megatron_vl.data.types import MULTIMODAL, TEXT, Pack, Unit

LANES, ROW, CAP = 4, 128, 4
MODALITIES = {"pages": MULTIMODAL, "figures": MULTIMODAL, "docs": TEXT, "code": TEXT}

Tables = dict[str, SourceTable]


def table(name: str, num_tokens: Sequence[int], num_images: Sequence[int]) -> SourceTable:
    return array_table(name, num_tokens, num_images, [0, len(num_tokens) // 3])


def array_table(
    name: str, num_tokens: Sequence[int], num_images: Sequence[int], first_samples: Sequence[int]
) -> SourceTable:
    """A source that lies in memory."""
    tokens, images = np.array(num_tokens, dtype=np.int32), np.array(num_images, dtype=np.int32)
    return SourceTable(
        name=name,
        modality=MODALITIES[name],
        num_samples=len(tokens),
        num_images=int(images.sum()),
        first_samples=np.array(first_samples, dtype=np.int64),
        read=lambda start, stop: (tokens[start:stop], images[start:stop]),
        digest=f"digest of {name}",
    )


def small_tables() -> Tables:
    """Four sources of 30 to 60 samples, with long documents, and pages that fit no row."""
    words = np.random.default_rng(0).integers(1, 100, size=(4, 60)).tolist()
    return {
        "pages": table("pages", [*words[0], 500, 20], [*([1, 2] * 30), 1, CAP + 1]),
        "figures": table("figures", words[1][:30], [1] * 30),
        "docs": table("docs", [*words[2], 1000, 300], [0] * 62),
        "code": table("code", words[3][:40], [0] * 40),
    }


def plan_settings(**changes: object) -> PlanSettings:
    values = PlanSettings(
        stage="joint",
        seed=1234,
        num_steps=100,
        text_ratio=0.5,
        text_warmup_fraction=0.1,
        grouping="step",
        sources={"pages": 1.0, "figures": 2.0, "docs": 1.0, "code": 3.0},
        max_epochs={},
        global_batch_size=8,
        micro_batch_size=1,
        sequence_length=ROW,
        packing=True,
        lanes=LANES,
        shuffle_window=2,
        packing_window=12,
        max_carry_steps=4,
        flush_steps=1000,
        max_images_per_pack=CAP,
        balance_lanes=0,
        cost=RowCost(per_token=10, per_image=700, per_pair=3000),
    )
    return replace(values, **changes)  # type: ignore[arg-type]


def planners(settings: PlanSettings, dp_size: int) -> list[Planner]:
    return [Planner(small_tables(), settings, rank, dp_size) for rank in range(dp_size)]


def step_packs(ranks: list[Planner]) -> tuple[str, list[Pack]]:
    """One step of all ranks: its modality and the rows of the global batch, whoever computes them."""
    plans = [rank.next() for rank in ranks]
    assert len({(plan.step, plan.modality, plan.text_ratio) for plan in plans}) == 1
    return plans[0].modality, sorted(
        (pack for plan in plans for pack in plan.packs), key=lambda pack: pack.units
    )


def through_json(ranks: list[Planner]) -> PlanState:
    states = [PlanState.from_json(json.loads(json.dumps(rank.state().to_json()))) for rank in ranks]
    return merge_states(states)


SETTINGS = st.builds(
    plan_settings,
    seed=st.integers(0, 2**40),
    text_ratio=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    text_warmup_fraction=st.sampled_from([0.0, 0.1]),
    packing=st.booleans(),
    global_batch_size=st.sampled_from([4, 8, 12]),
    packing_window=st.integers(1, 30),
    max_carry_steps=st.integers(0, 6),
    flush_steps=st.sampled_from([1, 2, 7, 1000]),
    grouping=st.sampled_from(["step", "phase"]),
    balance_lanes=st.sampled_from([0, 2, 4]),
    shuffle_window=st.integers(1, 5),
)


def unit_id(unit: Unit) -> tuple[str, int, int]:
    return unit.source, unit.sample, unit.piece


def all_units(name: str, source: SourceTable) -> set[tuple[str, int, int]]:
    """Every unit of a source that fits a row, from the definition."""
    units = set()
    for sample, (tokens, images) in enumerate(zip(*source.read(0, source.num_samples), strict=True)):
        if images == 0 or (tokens <= ROW and images <= CAP):
            units |= {(name, sample, piece) for piece in range(-(-int(tokens) // ROW))}
    return units


def realistic_settings() -> PlanSettings:
    return plan_settings(
        sources={"pages": 1.0, "docs": 1.0},
        text_warmup_fraction=0.0,
        global_batch_size=18,
        lanes=2,
        sequence_length=4096,
        packing_window=64,
        max_carry_steps=8,
        max_images_per_pack=16,
    )


def realistic_tables(num: int = 4000) -> Tables:
    return {
        "pages": length_mix.source("pages", MULTIMODAL, num),
        "docs": length_mix.source("docs", TEXT, num),
    }
