"""A part that is interrupted anywhere goes on at its last finished shard, and ends with the same bytes."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.progress import Progress

from data_tools import part_writer
from data_tools.part_writer import Crew, write_part
from data_tools.recipe import Part, Record, Rejection, Rendered
from megatron_vl.config.errors import UserError

FOLDERS = ("pages", "heldout/pages")
STAMP = {"version": "1"}


class Pool:
    """Renders in this process, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.drafts: list[Any] = []

    def map(self, function: Callable[..., Any], drafts: Sequence[Any], chunksize: int) -> Iterable[Any]:
        self.drafts += drafts
        return map(function, drafts)


class SeenBefore:
    """Keeps one sample of each trait."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def judge(self, traits: bytes) -> str:
        if traits in self._seen:
            return "seen"
        self._seen.add(traits)
        return ""


def render(draft: int) -> Rendered:
    """0 to 3 samples; every fifth draft is held out, every seventh has a bad page, every fourth an unwanted one."""
    records = tuple(
        Record(fields={"text": f"{draft} {index}"}, index=index, traits=bytes([draft * index % 11, index]))
        for index in range(draft * 7 % 4)
    )
    bad = Rejection(cause="bad", where=str(draft), detail="Straße")
    return Rendered(
        records=((), records) if draft % 5 == 0 else (records, ()),
        rejections=(bad,) * (draft % 7 == 0),
        filtered=("small",) * (draft % 4 == 0),
    )


def part_of(num_drafts: int, samples_per_shard: int, **values: Any) -> Part:
    given = {"max_rejected_fraction": 0.9, "sieve": SeenBefore} | values
    return Part(
        folders=FOLDERS,
        drafts=range(num_drafts),
        render=render,
        samples_per_shard=samples_per_shard,
        **given,
    )


def write(part: Part, staging: Path, pool: Pool | None = None) -> list[str]:
    """What is told."""
    told: list[str] = []
    crew = Crew(pool=pool or Pool(), num_processes=1, progress=Progress(disable=True), report=told.append)
    write_part(part, staging, STAMP, crew)
    return told


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@given(
    num_drafts=st.integers(12, 60),
    samples_per_shard=st.integers(1, 9),
    crash_at=st.integers(0, 80),
    second_crash_at=st.integers(0, 40),
)
@settings(max_examples=40, deadline=None)
def test_a_crash_anywhere_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    num_drafts: int,
    samples_per_shard: int,
    crash_at: int,
    second_crash_at: int,
) -> None:
    """A crash is a copy of the files as they are at some moment, even between two writes of one draft."""
    folder, part = tmp_path_factory.mktemp("part"), part_of(num_drafts, samples_per_shard)
    told = write(part, folder / "whole")
    expected = files(folder / "whole")
    source = "first"
    for number, at in enumerate((crash_at, second_crash_at)):
        crash = folder / f"crash-{number}"
        shutil.rmtree(crash, ignore_errors=True)
        _write_until(part, folder / source, at, crash)
        source = crash.name
    if (folder / source).exists():
        state = part_writer._read_progress(folder / source)
        pool = Pool()
        assert write(part, folder / source, pool) == told
        assert files(folder / source) == expected
        assert pool.drafts == list(range(state["next_draft"] if state else 0, num_drafts))


def _write_until(part: Part, staging: Path, at: int, crash: Path) -> None:
    """Write on; after `at` samples, the files of that moment are in `crash`."""
    count = 0
    add = part_writer.FolderWriter.write

    def counted(writer: part_writer.FolderWriter, number: int, record: Record) -> bool:
        nonlocal count
        if count == at:
            shutil.copytree(staging, crash)
        count += 1
        return add(writer, number, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_writer.FolderWriter, "write", counted)
        write(part, staging)


def test_what_is_left_out_is_told_and_listed(tmp_path: Path) -> None:
    told = write(part_of(40, 5), tmp_path / "staging")
    assert told[0].startswith("pages, heldout/pages: ")
    assert "6 x bad, such as 0: Straße; all are listed in rejected.jsonl" in told[0]
    assert "10 x small" in told[1]
    listed = (tmp_path / "staging/pages/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 6
    assert '"small": 10' in (tmp_path / "staging/pages/filtered.json").read_text()


def test_a_bad_page_counts_as_a_part_of_its_draft(tmp_path: Path) -> None:
    """Draft 7 gives one sample and one rejection, draft 0 a rejection and an unwanted sample: half a draft each."""
    with pytest.raises(UserError, match=r"1 of 10 records cannot be used.*max_rejected_fraction=0\.09"):
        write(part_of(10, 5, max_rejected_fraction=0.09), tmp_path / "strict")
    write(part_of(10, 5, max_rejected_fraction=0.1), tmp_path / "staging")


@pytest.mark.parametrize("change", ["stamp", "folders"])
def test_what_another_build_left_is_not_gone_on_with(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_of(40, 5)
    write(part, tmp_path / "whole")
    _write_until(part, tmp_path / "first", 30, tmp_path / "crash")
    if change == "stamp":
        monkeypatch.setitem(STAMP, "version", "2")
    else:
        part = replace(part, folders=("sheets", "heldout/sheets"))
    pool = Pool()
    write(part, tmp_path / "crash", pool)
    assert pool.drafts == list(range(40))
    if change == "stamp":
        assert files(tmp_path / "crash") == files(tmp_path / "whole")
    else:
        assert not (tmp_path / "crash/pages").exists()
