"""The paper's ablations: jobs have the paper's values, can be trained, and lie in folders of their own."""

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launch.command import CONFIG_FOLDER
from megatron_vl.config.model_check import ADAPTOR_TOWERS
from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.train.settings import required_processes, resolve_stages

FOLDER = CONFIG_FOLDER / "experiment" / "ablation"
TABLE_10 = [f"{name}_mlp_gelu" for name in ("pool_width", "pool_height", "hybrid", "shared", "separate")]
# From the paper: what each experiment varies, by a field of the job's configuration
VALUES = {
    "modality_ratio": ("data.text_ratio", [0.0, 0.3, 0.4, 0.7]),  # Figure 4, section 3.2.2
    "modality_grouping": ("stage.joint.grouping", ["step", "phase"]),  # Figure 8
    "modality_warmup": ("stage.joint.text_warmup_fraction", [0.0, 0.1]),  # Figure 9
    "stage1_length": ("stage.adaptor.steps", [80, 320, 800, 3200]),  # Table 8, a 25th of it
    "stage_subsets": (
        "stages",
        [["adaptor", "sft"], ["joint", "sft"], ["adaptor", "joint", "sft"]],
    ),  # Table 9
    "adaptors": ("model.vision.adaptor.kind", TABLE_10),
    "encoders": ("model.vision.adaptor.kind", ["hybrid_mlp_gelu", "mlp_gelu", "mlp_gelu"]),  # Figure 10
}
TEXT_SHARE = {"modality_grouping": 0.4, "modality_warmup": 0.4}  # "Multimodal:Language=60%:40%"


@pytest.fixture(autouse=True, scope="module")
def configuration() -> Iterator[None]:
    register_schemas()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        yield


def jobs(name: str) -> list[list[str]]:
    """The overrides of each job that Hydra's own sweeper would make of the experiment."""
    experiment = f"experiment=ablation/{name}"
    params = compose("pretrain", [experiment], return_hydra_config=True).hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [[experiment, *words] for words in batch]


def configured(overrides: list[str]) -> PretrainConfig:
    config: Any = OmegaConf.to_object(compose("pretrain", overrides))
    return config


def test_every_ablation_is_known() -> None:
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted(VALUES)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_ablation(name: str) -> None:
    field, expected = VALUES[name]
    values, folders = [], set()
    for number, overrides in enumerate(jobs(name)):
        job = compose("pretrain", [*overrides, f"hydra.job.num={number}"], return_hydra_config=True)
        assert job.hydra.mode.name == "MULTIRUN", "without -m it would train one run of them"
        values.append(OmegaConf.select(job, field))
        folders.add(f"{job.hydra.sweep.dir}/{job.hydra.sweep.subdir}")
        assert job.data.text_ratio == TEXT_SHARE.get(name, job.data.text_ratio)
        config = configured(overrides)
        assert resolve_stages(config, required_processes(config))
    assert values == expected
    assert len(folders) == len(expected)
    assert all(folder.startswith(f"runs/ablation/{name}/") for folder in folders)


def test_every_adaptor_for_two_towers_is_compared() -> None:
    assert {kind for kind, towers in ADAPTOR_TOWERS.items() if towers == 2} == set(TABLE_10)


def test_encoders_leave_towers_out() -> None:
    vision = [configured(overrides).model.vision for overrides in jobs("encoders")]
    towers = [(one.siglip is not None, one.sam is not None) for one in vision]
    assert towers == [(True, True), (True, False), (False, True)]
