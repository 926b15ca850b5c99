"""The samples of every step are the same for every data-parallel size, down to the tokens that are read."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.data.loader import Role
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_state import PlanState, merge_states
from megatron_vl.train.plan_settings import plan_settings
from megatron_vl.train.settings import resolve_stages
from megatron_vl.train.sources import build_loader, open_sources
from tests.support.runs import CHECKOUT, command

STEPS = 12
ALL = Role(reads_tokens=True, reads_images=True, reads_labels=True)


def compose(overrides: list[str]) -> PretrainConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(CHECKOUT / "hydra_conf"), version_base="1.3"):
        tree = hydra.compose("pretrain", overrides)
    config: PretrainConfig = OmegaConf.to_object(tree)  # type: ignore[assignment]
    return config


@dataclass(frozen=True)
class Leg:
    """Some steps of a run at one data-parallel size, with so many workers."""

    data_size: int
    num_steps: int = STEPS
    workers: int = 1


def global_batches(config: PretrainConfig, stage_name: str, *legs: Leg) -> list[tuple[str, Counter[tuple]]]:
    """Per step: its modality, and how often each row (its tokens, its images' bytes, its labels and which of them
    carry loss, its samples) is in the global batch. Between legs the plan goes through a checkpoint's JSON."""
    batches: list[tuple[str, Counter[tuple]]] = []
    state: PlanState | None = None
    for leg in legs:
        stages = {stage.name: stage for stage in resolve_stages(config, leg.data_size)}
        stage, data = stages[stage_name], replace(config.data, workers=leg.workers)
        sources = open_sources(data, config.model, list(stages.values()))
        settings = plan_settings(config, stage, sources)
        steps: list[tuple[str, Counter[tuple]]] = [("", Counter()) for _ in range(leg.num_steps)]
        states = []
        for rank in range(leg.data_size):
            planner, ahead = (Planner(sources.tables(), settings, rank, leg.data_size) for _ in range(2))
            for one in (planner, ahead):
                if state is not None:
                    one.restore(state)
            with build_loader(planner, sources, stage, ALL, data) as loader:
                for number, loaded in enumerate(islice(loader, leg.num_steps)):
                    steps[number] = (
                        loaded.plan.modality,
                        steps[number][1] + Counter(map(_row, loaded.microbatches)),
                    )
                    ahead.next()
            states.append(ahead.state())
        batches += steps
        state = PlanState.from_json(json.loads(json.dumps(merge_states(states).to_json())))
    return batches


def _row(batch: Microbatch) -> tuple:
    tensors = (batch.tokens_1S, batch.labels_1S, batch.loss_mask_1S)
    return (
        *(tuple(tensor.flatten().tolist()) for tensor in tensors),
        batch.images_NCHW.numpy().tobytes(),
        batch.units,
    )


@pytest.mark.parametrize("stage", ["adaptor", "joint", "sft"])
def test_global_batches_do_not_depend_on_the_data_parallel_size(stage: str, data_root: Path) -> None:
    overrides = command(data_root, data_root / "run", "data.text_ratio=0.5")[3:]
    config = compose(overrides)
    config.stages = [stage]
    expected = global_batches(config, stage, Leg(1))
    assert all(sum(rows.values()) == 4 for _, rows in expected)
    for data_size in (2, 4):
        assert global_batches(config, stage, Leg(data_size)) == expected
    other = replace(config, run=replace(config.run, seed=config.run.seed + 1))
    assert global_batches(other, stage, Leg(1)) != expected


@pytest.mark.parametrize("stage", ["joint", "sft"])
def test_a_run_may_change_its_size_and_workers_in_the_middle(stage: str, data_root: Path) -> None:
    """DP 2, then 4, then 1; workers 2, then none, then 3."""
    overrides = command(data_root, data_root / "run", "data.text_ratio=0.5", "data.flush_steps=5")[3:]
    config = compose(overrides)
    config.stages = [stage]
    whole = global_batches(config, stage, Leg(1, 3 * STEPS // 2))
    legs = [Leg(size, STEPS // 2, workers) for size, workers in ((2, 2), (4, 0), (1, 3))]
    assert global_batches(config, stage, *legs) == whole
