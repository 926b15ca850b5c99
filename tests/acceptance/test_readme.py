"""Every command of the README runs: shortened, and over small data, but as it is written there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.support.conversations import write_images
from tests.support.runs import CHECKOUT, command, finish, metrics
from tests.support.tiny_data import picture

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line and not line.startswith("#")]
OWN_IMAGES = [line for line in COMMANDS if "=images" in line]
TRAINING = [line for line in COMMANDS if "launch.pretrain" in line and line not in OWN_IMAGES]
CONVERSIONS = [line for line in COMMANDS if "launch.convert" in line]
EVALUATIONS = [line for line in COMMANDS if "launch.evaluate" in line]
TOOLS = [
    line for line in COMMANDS if "launch.preview" in line or ("data_tools." in line and "build" not in line)
]
PLANS = [line for line in COMMANDS if "launch.plan" in line]
# Run elsewhere: by CI itself, by test_1_quickstart, by tests/unit/test_build_quickstart.py.
ELSEWHERE = ["make quickstart", "make test", ".venv/bin/python -m data_tools.build data=quickstart"]


def in_this_environment(line: str) -> list[str]:
    """The command's words, with the programs of the environment that runs the tests."""
    words = shlex.split(line)
    program = Path(command(Path(), Path())[0]).parent / Path(words[0]).name
    return [str(program), *words[1:]]


def test_no_command_is_forgotten() -> None:
    assert TRAINING
    assert sorted([*TRAINING, *OWN_IMAGES, *CONVERSIONS, *EVALUATIONS, *PLANS, *TOOLS, *ELSEWHERE]) == sorted(
        COMMANDS
    )


@pytest.mark.parametrize("line", [line for line in TRAINING if "checkpoint.initial" not in line])
def test_training(line: str, data_root: Path, tmp_path: Path) -> None:
    short = ["stages=[joint]", "train.steps=2", "heldout.max_samples=0"]
    overrides = command(data_root, tmp_path / "run", *short)[3:]
    status, output = finish([*in_this_environment(line), *overrides])
    assert status == 0, output
    assert len(metrics(tmp_path / "run")) == 2


def test_own_images(tmp_path: Path) -> None:
    """In the order of the page, over a folder as it describes one."""
    for name in write_images(tmp_path / "photos", 12):
        (tmp_path / "photos" / name).with_suffix(".txt").write_text(f"Picture {name}.")
    places = {"raw.file=photos": f"raw.file={tmp_path}/photos", "run.dir=runs/": f"run.dir={tmp_path}/"}
    for line in OWN_IMAGES:
        for place, here in places.items():
            line = line.replace(place, here)
        status, output = finish([*in_this_environment(line), f"data.root={tmp_path}/data"])
        assert status == 0, output
    assert len(metrics(tmp_path / "images")) == 2


def test_a_stage_from_the_weights_of_another_run(data_root: Path, tmp_path: Path) -> None:
    (line,) = [line for line in TRAINING if "checkpoint.initial" in line]
    short = ["train.steps=2", "heldout.max_samples=0"]
    first = command(data_root, tmp_path / "one", *short, "stages=[adaptor]")
    assert finish(first)[0] == 0
    checkpoint = tmp_path / "one" / "checkpoints" / "adaptor-00000002"
    overrides = command(data_root, tmp_path / "joint", *short, f"checkpoint.initial={checkpoint}")[3:]
    status, output = finish([*in_this_environment(line), *overrides])
    assert status == 0, output
    fresh = command(data_root, tmp_path / "fresh", *short, "stages=[joint]", "data.text_ratio=0.5")
    assert finish([*fresh, "data.warmup_fraction=0"])[0] == 0
    begun, untrained = metrics(tmp_path / "joint")[0], metrics(tmp_path / "fresh")[0]
    assert begun["loss"] < untrained["loss"], "the weights were not taken"


def test_weights_and_evaluation(data_root: Path, tmp_path: Path) -> None:
    """In the order of the page, on the checkpoint of a short run; each command uses what those before it made."""
    trained = command(
        data_root, tmp_path / "runs" / "one", "train.steps=2", "stages=[sft]", "heldout.max_samples=0"
    )
    assert finish(trained)[0] == 0
    checkpoints = tmp_path / "runs" / "one" / "checkpoints"
    (checkpoints / "sft-00000002").rename(checkpoints / "sft-00000300")
    (tmp_path / "page.png").write_bytes(picture(64, 48))
    for line in [*CONVERSIONS, *EVALUATIONS]:
        words = [
            re.sub(r"=(\[?)(runs/|page\.png)", rf"=\1{tmp_path}/\2", word)
            for word in in_this_environment(line)
        ]
        words[4:4] = [f"run.dir={tmp_path / 'evaluate'}"] if line in EVALUATIONS else []
        status, output = finish(words)
        assert status == 0, output
    assert (tmp_path / "runs" / "exported" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "imported" / "model.json").exists()
    assert (tmp_path / "runs" / "resharded" / "checkpoints" / "sft-00000300" / "state.json").exists()
    assert (tmp_path / "evaluate" / "results.json").exists()


@pytest.mark.parametrize("line", TOOLS)
def test_data_tool(line: str, data_root: Path, tmp_path: Path) -> None:
    shutil.copytree(data_root, tmp_path / "data")
    overrides = command(tmp_path / "data", tmp_path / "run")[3:7]
    status, output = finish([*in_this_environment(line), *overrides])
    assert status == 0, output
    assert any(told in output for told in ("pages", "all samples decode", "stage joint, step 120: text"))


def test_plans(tmp_path: Path) -> None:
    """In the order of the page: the times that one command measures are those that the next plans with."""
    told = []
    for line in PLANS:
        words = [word.replace("=runs/", f"={tmp_path}/") for word in in_this_environment(line)]
        status, output = finish([*words, "rounds=1", "top=1"])
        assert status == 0, output
        told.append(output)
    cluster, measured, here = told
    assert "deepseek_vl_7b on a100_64x8 (512 devices)" in cluster
    assert "'stage.joint.parallel={tensor_size:" in cluster
    assert "calibrated 13 units" in measured
    assert "simulated from measured units" in here
