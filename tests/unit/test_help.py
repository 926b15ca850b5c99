"""What --help prints: it fits a terminal, and what it shows as examples can be composed."""

import re
import shlex
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from launch.command import CONFIG_FOLDER
from megatron_vl.config.convert import register_convert_schema
from megatron_vl.config.evaluate import register_evaluate_schema
from megatron_vl.config.plan import register_plan_schema
from megatron_vl.config.preview import register_preview_schema
from megatron_vl.config.root import register_schemas

COMMANDS = ("pretrain", "plan", "preview", "evaluate", "convert")
WIDTH = 110


@pytest.fixture(autouse=True, scope="module")
def configuration() -> Iterator[None]:
    for register in (
        register_schemas,
        register_plan_schema,
        register_preview_schema,
        register_evaluate_schema,
        register_convert_schema,
    ):
        register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        yield


def header(command: str) -> str:
    return str(OmegaConf.load(CONFIG_FOLDER / f"{command}.yaml").hydra.help.header)


def examples(command: str) -> list[str]:
    """The first column of indented lines: two spaces or more end it."""
    lines = [line for line in header(command).splitlines() if line.startswith("  ")]
    spread = [re.sub(r"^(direction=\w+)\s+", r"\1 ", line.strip()) for line in lines]
    return [re.split(r" {2,}", line)[0] for line in spread]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_fits(command: str) -> None:
    assert max(map(len, header(command).splitlines())) <= WIDTH
    assert f"python -m launch.{command}" in header(command)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_compose(command: str) -> None:
    """All of a command's together, where one field is set twice the last; of sweeps the first job."""
    words = [
        word for example in examples(command) for word in shlex.split(example) if word not in ("-m", "…")
    ]
    single = [re.sub(r"interval\(([^,]*),.*\)", r"\1", word) for word in words]
    overrides = OverridesParser.create().parse_overrides(single)
    first_job = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0][0]
    assert compose(command, first_job)


def test_pretrain_names_what_most_runs_set() -> None:
    shown = " ".join(examples("pretrain"))
    for field in (
        "experiment=",
        "model=",
        "data=",
        "stages=",
        "run.dir=",
        "parallel.",
        "run.num_processes",
        "-m ",
    ):
        assert field in shown
