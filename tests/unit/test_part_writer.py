"""A part that is interrupted anywhere goes on at its last finished shard, and ends with the same bytes."""

import itertools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from data_tools import part_writer
from data_tools.folder_writer import FolderWriter, Position
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


@pytest.mark.parametrize("samples_per_shard", [1, 3, 100])
def test_a_crash_anywhere_changes_nothing(tmp_path: Path, samples_per_shard: int) -> None:
    """A crash is a copy of the files as they are at some moment, even between two samples of one draft, with torn
    ends; two in a row, and it goes on after the last draft that finished a shard."""
    part = part_of(24, samples_per_shard)
    told = write(part, tmp_path / "whole")
    expected = files(tmp_path / "whole")
    crashes, finishing = _crashes(part, tmp_path / "first", tmp_path / "crashes")
    assert len(crashes) > 15
    for number, draft in list(enumerate(crashes))[::2]:
        crash, pool = tmp_path / "crashes" / str(number), Pool()
        again, _ = _crashes(part, crash, tmp_path / "again", only=number // 2 % 4)
        if again:
            crash, draft = tmp_path / "again/0", again[0]
        assert write(part, crash, pool) == told
        assert files(crash) == expected
        first = max((one + 1 for one in finishing if one < draft), default=0)
        assert pool.drafts == list(range(first, 24))


def _crashes(
    part: Part, staging: Path, crashes: Path, only: int | None = None
) -> tuple[list[int], list[int]]:
    """Write on. Before sample i is written, or `only` that one of them, what there is is copied to crashes/i.

    The draft of each copy, and the drafts that finished a shard.
    """
    drafts: list[int] = []
    finishing: list[int] = []
    calls = itertools.count()
    add = part_writer.FolderWriter.write
    shutil.rmtree(crashes, ignore_errors=True)

    def counted(writer: part_writer.FolderWriter, number: int, record: Record) -> bool:
        if next(calls) == only or only is None:
            _copy_torn(staging, crashes / str(len(drafts)))
            drafts.append(number)
        is_finished = add(writer, number, record)
        finishing.extend([number] * is_finished)
        return is_finished

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_writer.FolderWriter, "write", counted)
        if only is not None:
            shutil.copytree(staging, f"{staging}-copy")
            staging = Path(f"{staging}-copy")
        write(part, staging)
    return drafts, finishing


def _copy_torn(staging: Path, copy: Path) -> None:
    """With garbage at the ends of what is being written."""
    shutil.copytree(staging, copy)
    for path in (*copy.rglob("*.partial"), *copy.rglob("*.jsonl"), *copy.rglob("kept")):
        with path.open("ab") as file:
            file.write(bytes(20_000))


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
    _crashes(part, tmp_path / "first", tmp_path / "crashes")
    crash = tmp_path / "crashes/15"
    assert (crash / part_writer.PROGRESS_NAME).exists()
    if change == "stamp":
        monkeypatch.setitem(STAMP, "version", "2")
    else:
        part = replace(part, folders=("sheets", "heldout/sheets"))
    pool = Pool()
    write(part, crash, pool)
    assert pool.drafts == list(range(40))
    if change == "stamp":
        assert files(crash) == files(tmp_path / "whole")
    else:
        assert not (crash / "pages").exists()


def test_a_shard_that_was_completed_after_the_position_is_open_again(tmp_path: Path) -> None:
    records = [Record(fields={"text": str(number)}) for number in range(4)]
    for name in ("whole", "resumed"):
        writer = FolderWriter(tmp_path / name / "x", 3, Position())
        position = Position()
        for number, record in enumerate(records):
            position = writer.position() if number == 2 else position
            writer.write(number, record)
        if name == "resumed":
            writer.close()
            writer = FolderWriter(tmp_path / name / "x", 3, position)
            for number in (2, 3):
                writer.write(number, records[number])
        writer.finish()
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 2
