"""The page about the 7B on A100 shows what the code simulates today."""

from pathlib import Path

import pytest

from benchmarks.seven_b import STAGES, paper_mfu, stage_row
from benchmarks.seven_b_variations import SENSITIVITY, ExplicitScores, FusedAccumulation, Variation
from megatron_vl.config.plan import SearchConfig
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.forecast import Forecast
from megatron_vl.planning.workload import Load
from tests.support.clusters import model_of

PAGE = Path(__file__).parents[2] / "docs" / "deepseek_vl_7b_on_a100.md"
IMAGE = Load(num_tokens=0, num_images=1, num_pairs=0)
ROW = Load(num_tokens=4096, num_images=0, num_pairs=4096**2 / 2)
# What the search finds, so that no test has to search.
FOUND = {
    "adaptor": SearchConfig(tensor_size=2, pipeline_size=1, micro_batch_size=1, vision_placement="spread"),
    "joint": SearchConfig(
        tensor_size=1,
        pipeline_size=2,
        virtual_size=6,
        micro_batch_size=1,
        vision_placement="spread",
        layout="Et|tt|" + "ttt|" * 9 + "L",
    ),
    "sft": SearchConfig(
        tensor_size=2,
        pipeline_size=2,
        virtual_size=6,
        micro_batch_size=1,
        vision_placement="replicated",
        layout="E|" + "ttt|" * 10 + "L",
    ),
}


def planned(variation: Variation) -> Forecast:
    found = variation.plan()
    assert found is not None
    return found


def test_the_headline_is_what_is_simulated_now() -> None:
    plans = {name: planned(Variation(name=name, stage=name, kept=kept)) for name, kept in FOUND.items()}
    page = PAGE.read_text()
    rows = [f"| {' | '.join(stage_row(name, plan))} |" for name, plan in plans.items()]
    assert [row for row in rows if row not in page] == []
    days = sum(plan.days for plan in plans.values())
    assert f"| {days:.2f} |" in page
    assert f"| the paper | 5 | {100 * paper_mfu(STAGES[1].problem()):.1f} |" in page
    assert plans["joint"].mfu >= 0.55


@pytest.mark.slow
@pytest.mark.parametrize("stage", FOUND)
def test_the_search_finds_the_headline(stage: str) -> None:
    found, pinned = planned(Variation(name=stage, stage=stage)), FOUND[stage]
    again = planned(Variation(name=stage, stage=stage, kept=pinned))
    assert found.setting == again.setting


def test_fused_accumulation_saves_ten_bytes_a_parameter() -> None:
    model = model_of("deepseek_vl_7b")
    language = model.language
    plain, fused = (
        kind(model=model).unit("decoder_layer", ROW).weight_gradient
        for kind in (CostModel, FusedAccumulation)
    )
    parameters = 4 * language.hidden_size**2 + 3 * language.hidden_size * language.ffn_hidden_size
    assert plain.moved_bytes - fused.moved_bytes == 10 * parameters
    assert plain.flops == fused.flops


def test_written_scores_are_passed_over_eight_times() -> None:
    model = model_of("deepseek_vl_7b")
    bias = CostModel(model=model, folded_positions=False).unit("sam_global_block", IMAGE).forward
    written = ExplicitScores(model=model).unit("sam_global_block", IMAGE).forward
    num_scores = 12 * 4096**2
    assert written.moved_bytes - bias.moved_bytes == (8 - 3) * 2 * num_scores
    assert written.flops == bias.flops


def test_assumptions_that_vary_change_the_stage() -> None:
    """A misspelt value would leave everything as it was."""
    first, *others = SENSITIVITY
    told = [one.name for one in others if one.overrides and one.problem() == first.problem()]
    assert told == []
