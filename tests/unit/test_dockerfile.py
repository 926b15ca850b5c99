"""What can be said of the Dockerfile without building it: its sources exist, and its versions fit ours."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.runs import CHECKOUT
from tools.check_image import CONSTRAINTS, main, pins, problems, transformer_engine_of_megatron_core

DOCKERFILE = (CHECKOUT / "Dockerfile").read_text(encoding="utf-8")
FOUND: dict[str, str | None] = {
    "torch": "2.10.0a0",
    "megatron-core": "0.16.1",
    "transformer-engine": "2.10.0",
    "flash-attn": "2.8.3",
    "apex": "0.1",
}
BASE, OURS = {"torch": "2.10.0a0"}, {"megatron-core": "0.16.1"}
ENGINE = Requirement("transformer-engine<2.12.0,>=2.9.0a0")


def argument(name: str) -> str:
    (value,) = re.findall(rf"^ARG {name}=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return str(value)


def test_every_source_is_there() -> None:
    copies = re.findall(r"^COPY (?:--\S+ )?(.*) \S+$", DOCKERFILE, flags=re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert sources
    assert all((CHECKOUT / source).exists() for source in sources)
    ignored = (CHECKOUT / ".dockerignore").read_text().split()
    assert not {source.split("/")[0] for source in sources} & set(ignored)


def test_nobody_is_root() -> None:
    stages = DOCKERFILE.split("\nFROM ")[1:]
    assert [re.findall(r"^USER (\S+)", stage, flags=re.MULTILINE)[-1] for stage in stages] == [
        "1000:1000"
    ] * 2


def test_pinned_versions_fit_megatron_core() -> None:
    assert transformer_engine_of_megatron_core().specifier.contains(argument("TRANSFORMER_ENGINE"))
    assert f"megatron-core {pins(CONSTRAINTS)['megatron-core']}" in DOCKERFILE


def test_an_image_that_fits() -> None:
    assert problems(FOUND, BASE, OURS, ENGINE) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apex": None}, "apex is not installed"),
        ({"torch": "2.13.0"}, "torch is 2.13.0, but the base image has 2.10.0a0"),
        ({"megatron-core": "0.15.0"}, "megatron-core is 0.15.0, but constraints.txt has 0.16.1"),
        ({"transformer-engine": "2.8.0"}, "megatron-core 0.16.1 asks for <2.12.0,>=2.9.0a0"),
    ],
)
def test_an_image_that_does_not(change: dict[str, str | None], message: str) -> None:
    (problem,) = problems(FOUND | change, BASE, OURS, ENGINE)
    assert message in problem


def test_versions_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here, where there are no packages for GPUs."""
    (tmp_path / "base.txt").write_text("Torch==0.1\n")
    status = main(["--base", str(tmp_path / "base.txt"), "--versions", str(tmp_path / "versions.txt")])
    told = capsys.readouterr()
    assert status == 1
    assert told.out == (tmp_path / "versions.txt").read_text()
    assert f"megatron-core=={pins(CONSTRAINTS)['megatron-core']}\n" in told.out
    assert "but the base image has 0.1" in told.err
