"""Running out of memory, of whatever kind, is one error that says where; anything else passes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.device.machine import Device
from megatron_vl.device.trail import TRAIL
from megatron_vl.train.explain import out_of_memory_explained
from megatron_vl.train.settings import resolve_stages


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    register_schemas()
    with initialize_config_dir(str(Path(__file__).parents[2] / "hydra_conf"), version_base="1.3"):
        tree = compose("pretrain", ["parallel=pp2", "stages=[joint]", "train.precision=fp32"])
    config: PretrainConfig = OmegaConf.to_object(tree)  # type: ignore[assignment]
    return config


def cpu_allocator() -> None:
    torch.empty(1 << 60)


def python() -> None:
    raise MemoryError


def device_allocator() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


@pytest.mark.parametrize("run_out", [cpu_allocator, python, device_allocator])
def test_where_and_what_was_expected(
    run_out: object, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    (stage,) = resolve_stages(config, world_size=2)
    TRAIL.begin_stage("joint")
    TRAIL.begin_step(17)
    TRAIL.at("backward", 3)
    with (
        pytest.raises(UserError) as caught,
        out_of_memory_explained(config, stage, pipeline_rank=1, device=Device("cpu")),
    ):
        run_out()  # type: ignore[operator]
    message = str(caught.value)
    assert message.startswith("rank 1 (pipeline stage 1 of 2, ")
    assert "ran out of memory at stage joint, step 17, backward 3: " in message
    assert "the memory model expects " in message and "parameters 0." in message
    assert "\n" not in message


def test_other_errors_pass(config: PretrainConfig) -> None:
    (stage,) = resolve_stages(config, world_size=2)
    with (
        pytest.raises(RuntimeError, match="shapes"),
        out_of_memory_explained(config, stage, pipeline_rank=0, device=Device("cpu")),
    ):
        raise RuntimeError("shapes do not fit")
