"""Every file of hydra_conf composes, and the full-size recipes are those of the paper's Table 4."""

from itertools import pairwise
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.train.schedule import Schedule
from megatron_vl.train.settings import StageSettings, required_processes, resolve_stages

CONFIGS = Path(__file__).parents[2] / "hydra_conf"
GROUPS = sorted(
    f"{path.parent.relative_to(CONFIGS)}={path.stem}".replace("experiment/ablation=", "experiment=ablation/")
    for path in CONFIGS.rglob("*.yaml")
    if path.parent != CONFIGS
)


def compose(*overrides: str) -> PretrainConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        tree = hydra.compose("pretrain", list(overrides))
    config: PretrainConfig = OmegaConf.to_object(tree)  # type: ignore[assignment]
    return config


@pytest.mark.parametrize("choice", GROUPS)
def test_every_file_composes(choice: str) -> None:
    assert compose(choice).model.name


@pytest.mark.parametrize(
    ("experiment", "world_size", "batches", "steps"),
    [
        ("paper_1b", 128, (256, 1024, 256), (15000, 96000, 10000)),
        ("paper_7b", 512, (256, 2304, 256), (15000, 42000, 10000)),
    ],
)
def test_recipe_is_table_4(
    experiment: str, world_size: int, batches: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    config = compose(f"experiment={experiment}")
    stages = resolve_stages(config, world_size)
    assert tuple(stage.values.global_batch_size for stage in stages) == batches
    assert tuple(stage.values.steps for stage in stages) == steps
    assert [warmup_steps(stage) for stage in stages] == [128, 2000, 256]
    assert [stage.values.packing for stage in stages] == [False, True, False]
    assert [stage.values.schedule for stage in stages] == ["cosine", "multi_step", "cosine"]
    trained = [set(stage.values.train) for stage in stages]
    assert trained[0] == {"adaptor"}
    assert trained[1] == {"adaptor", "embedding", "decoder", "head"}
    assert trained[2] == trained[1] | {"siglip"}
    assert (config.train.adam_beta1, config.train.adam_beta2) == (0.9, 0.95)
    assert (config.train.weight_decay, config.train.gradient_clip) == (0.0, 1.0)
    for stage, following in pairwise(stages):
        assert following.first_global_step == stage.first_global_step + stage.values.steps


def warmup_steps(stage: StageSettings) -> int:
    values = stage.values
    return Schedule(
        kind="cosine", peak=1.0, num_steps=values.steps, warmup_fraction=values.warmup_fraction
    ).warmup_steps


def test_the_7b_run_has_no_pipeline_in_stage_1() -> None:
    config = compose("experiment=paper_7b")
    sizes = [stage.topology.pipeline_size for stage in resolve_stages(config, 512)]
    assert sizes == [1, 2, 2]
    assert required_processes(config) == 4


def test_a_world_that_the_batch_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=2304 .* 1024"):
        resolve_stages(compose("experiment=paper_7b", "stages=[joint]"), 4096)


def test_train_steps_scale_what_is_a_fraction() -> None:
    stages = resolve_stages(compose("experiment=paper_1b", "train.steps=480"), 128)
    assert [warmup_steps(stage) for stage in stages] == [4, 10, 12]


@pytest.mark.parametrize("kind", ["cosine", "multi_step", "constant"])
def test_schedule(kind: str) -> None:
    schedule = Schedule(
        kind=kind,
        peak=2.0,
        num_steps=1000,
        warmup_fraction=0.1,
        decay_boundaries=[0.8, 0.9],
        decay_factors=[10**-0.5, 0.1],
        min_ratio=0.25,
    )
    assert schedule.at(1) == pytest.approx(0.02)
    assert schedule.at(100) == 2.0
    assert all(before >= after for before, after in pairwise(map(schedule.at, range(100, 1001))))
    if kind == "cosine":
        assert schedule.at(550) == pytest.approx((2.0 + 0.5) / 2)
        assert schedule.at(1000) == pytest.approx(0.5)
    elif kind == "multi_step":  # DeepSeek LLM: full to 80 %, 31.6 % to 90 %, 10 % to the end
        assert [schedule.at(step) for step in (800, 801, 900, 901)] == pytest.approx(
            [2, 0.632456, 0.632456, 0.2]
        )
    else:
        assert schedule.at(1000) == 2.0
