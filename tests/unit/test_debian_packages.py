"""Debian packages are fetched once, whole or not at all, and what is wrong is told."""

import os
from pathlib import Path

import pytest

from data_tools.raw.debian import FOLDER, fetch_packages
from megatron_vl.config.data import DataConfig, RawConfig, SourceConfig
from megatron_vl.config.errors import UserError

# As the real one, it leaves NAME_VERSION_ARCHITECTURE.deb in the current folder; an epoch's colon is %3a.
APT_GET = """
echo "$@" >> "$LOG"
[ "$1" = download ] || exit 9
case "$2" in
  stamps) touch stamps_1%3a2.0-1_all.deb ;;
  stamps=1:1.0) touch stamps_1%3a1.0_all.deb ;;
  offline) echo "E: Failed to fetch http://host/offline.deb  Could not connect" >&2; exit 100 ;;
  *) echo "W: a warning" >&2; echo "E: Unable to locate package $2" >&2; exit 100 ;;
esac
"""
DPKG = """
echo dpkg >> "$LOG"
[ -z "$BROKEN" ] || { echo "dpkg: error: no archive" >&2; exit 2; }
mkdir -p $3/usr
echo $2 > $3/usr/file
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the two programs were called with, in a current folder of its own."""
    for name, script in (("apt-get", APT_GET), ("dpkg", DPKG)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "log"


def fetch(*packages: str) -> list[str]:
    told: list[str] = []
    source = SourceConfig(path="data/a", raw=RawConfig(packages=list(packages)))
    fetch_packages(DataConfig(sources={"a": source, "b": SourceConfig(path="data/b")}), told.append)
    return told


def test_a_package_is_fetched_once(log: Path) -> None:
    told = fetch("stamps")
    assert (FOLDER / "stamps/usr/file").read_text() == "stamps_1%3a2.0-1_all.deb\n"
    assert told[-1] == f"{FOLDER}/stamps is version 1:2.0-1 of the package"
    assert log.read_text().splitlines() == ["download stamps", "dpkg"]
    assert fetch("stamps") == [f"{FOLDER}/stamps is version 1:2.0-1 of the package; it is used as it is"]
    assert fetch("stamps=1:2.0-1")
    assert len(log.read_text().splitlines()) == 2
    assert [path.name for path in FOLDER.iterdir() if path.is_dir()] == ["stamps"]


def test_another_version_is_fetched(log: Path) -> None:
    fetch("stamps")
    fetch("stamps=1:1.0")
    assert (FOLDER / "stamps/usr/file").read_text() == "stamps_1%3a1.0_all.deb\n"
    assert (FOLDER / "stamps/VERSION").read_text() == "1:1.0\n"


def test_a_folder_that_was_brought_is_used(log: Path) -> None:
    (FOLDER / "stamps/usr").mkdir(parents=True)
    assert fetch("stamps") == [f"{FOLDER}/stamps is version unknown of the package; it is used as it is"]
    assert not log.exists()


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (
            "unknown",
            "apt-get download cannot get unknown: E: Unable to locate package unknown .*apt-get update",
        ),
        ("offline", "apt-get download cannot get offline: E: Failed to fetch"),
        ("--option", r"data\.sources\.a\.raw\.packages has '--option'"),
        ("Up Case", "NAME or NAME=VERSION is needed"),
        ("../stamps", "NAME or NAME=VERSION is needed"),
    ],
)
def test_what_cannot_be_fetched(package: str, words: str, log: Path) -> None:
    with pytest.raises(UserError, match=words):
        fetch("stamps", package)
    assert (FOLDER / "stamps").is_dir()
    assert not (FOLDER / package).exists()


def test_an_interrupted_unpacking_leaves_nothing_in_place(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(UserError, match="dpkg -x cannot get stamps: dpkg: error: no archive"):
        fetch("stamps")
    assert not (FOLDER / "stamps").exists()
    monkeypatch.delenv("BROKEN")
    fetch("stamps")
    assert (FOLDER / "stamps/usr/file").exists()


def test_a_machine_without_apt(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"this machine has no apt-get: build on Debian or Ubuntu"):
        fetch("stamps")
