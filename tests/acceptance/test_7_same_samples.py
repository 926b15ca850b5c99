"""The samples of every step are the same for every data-parallel size, down to the tokens that are read."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.data.loader import Role
from megatron_vl.train.settings import resolve_stages
from megatron_vl.train.sources import build_loader, build_planner, open_sources
from tests.support.runs import CHECKOUT, command

STEPS = 12
ALL = Role(reads_tokens=True, reads_images=True, reads_labels=True)


def compose(overrides: list[str]) -> PretrainConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(CHECKOUT / "hydra_conf"), version_base="1.3"):
        tree = hydra.compose("pretrain", overrides)
    config: PretrainConfig = OmegaConf.to_object(tree)  # type: ignore[assignment]
    return config


def global_batches(
    config: PretrainConfig, stage_name: str, data_size: int
) -> list[tuple[str, Counter[tuple]]]:
    """Per step: its modality, and how often each row (its tokens, its images' bytes) is in the global batch."""
    stages = {stage.name: stage for stage in resolve_stages(config, data_size)}
    stage = stages[stage_name]
    sources = open_sources(config.data, config.model, list(stages.values()))
    steps: list[tuple[str, Counter[tuple]]] = [("", Counter()) for _ in range(STEPS)]
    for rank in range(data_size):
        planner = build_planner(sources, stage, config.data, config.run.seed, rank)
        with build_loader(planner, sources, stage, ALL, config.data) as loader:
            for number, loaded in enumerate(islice(loader, STEPS)):
                rows = Counter(
                    (tuple(m.tokens_1S.flatten().tolist()), m.images_NCHW.numpy().tobytes(), m.units)
                    for m in loaded.microbatches
                )
                steps[number] = (loaded.plan.modality, steps[number][1] + rows)
    return steps


@pytest.mark.parametrize("stage", ["adaptor", "joint", "sft"])
def test_global_batches_do_not_depend_on_the_data_parallel_size(stage: str, data_root: Path) -> None:
    overrides = command(data_root, data_root / "run", "data.text_ratio=0.5")[3:]
    config = compose(overrides)
    config.stages = [stage]
    expected = global_batches(config, stage, 1)
    assert all(sum(rows.values()) == 4 for _, rows in expected)
    for data_size in (2, 4):
        assert global_batches(config, stage, data_size) == expected
    other = replace(config, run=replace(config.run, seed=config.run.seed + 1))
    assert global_batches(other, stage, 1) != expected
