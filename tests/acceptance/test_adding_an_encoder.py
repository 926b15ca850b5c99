"""docs/adding_an_encoder.md, applied to a copy of the code: a model with a third tower trains."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.runs import CHECKOUT, command, environment, metrics

PAGE = (CHECKOUT / "docs" / "adding_an_encoder.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n--- (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
FILES = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = re.findall(r"```bash\n(.*?)\n```", PAGE, flags=re.DOTALL)


def before(diff: str) -> str:
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in " -")


def after(diff: str) -> str:
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] in " +")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code after everything that the page says."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in ("megatron_vl", "launch", "hydra_conf"):
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, diff in DIFFS:
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(before(diff)) == 1, f"{name} has changed: {before(diff)}"
        (copy / name).write_text(text.replace(before(diff), after(diff)), encoding="utf-8")
    for name, text in FILES:
        (copy / name).write_text(text, encoding="utf-8")
    return copy


def test_the_page_fits_the_code(checkout: Path) -> None:
    for name, _ in [*DIFFS, *FILES]:
        if name.endswith(".py"):
            compile((checkout / name).read_text(encoding="utf-8"), name, "exec")


@pytest.mark.slow
def test_it_trains(checkout: Path, data_root: Path, tmp_path: Path) -> None:
    (line,) = COMMANDS
    short = [
        "stages=[joint]", "stage.joint.train=[dino,adaptor,decoder]", "data.warmup_fraction=0", "data.text_ratio=0",
        "train.steps=2", "heldout.max_samples=0", "recompute.vision=true",
    ]  # fmt: skip
    words = command(data_root, tmp_path / "run", *short)
    done = subprocess.run(
        [*words[:3], *shlex.split(line)[3:], *words[3:]],
        cwd=checkout,
        env=environment() | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["num_images"] > 0 for row in metrics(tmp_path / "run")] == [True, True]
    assert "dino" in (tmp_path / "run" / "config_resolved.yaml").read_text()


def test_every_path_is_there() -> None:
    named = re.findall(r"`((?:megatron_vl|tests)/[\w/]+\.py)`", PAGE)
    assert named
    new = [name for name, _ in FILES]
    assert all((CHECKOUT / name).exists() for name in named if name not in new)
