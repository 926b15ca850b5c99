"""A checkpoint's folder: damage is named, and dying at any moment of a save leaves a good checkpoint."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.checkpoint import manifest
from megatron_vl.checkpoint.folder import aside_of, clear_leftovers, publish, put_aside_as_damaged
from megatron_vl.checkpoint.manifest import (
    MANIFEST_FILE,
    DigestedFile,
    FileRecord,
    damage,
    digested,
    read_manifest,
    seal,
    shares,
    sync_folder,
    wrong_digest,
)
from megatron_vl.checkpoint.retention import drop_superseded, superseded
from megatron_vl.checkpoint.state import (
    STATE_FILE,
    RunState,
    find_checkpoints,
    newest_checkpoint,
    read_state,
    whole_checkpoints,
)
from megatron_vl.config.errors import UserError


def state_at(step: int) -> RunState:
    return RunState(stage="joint", step=step, num_steps=100, global_step=step, plan={}, fingerprint={})


def save(folder: Path, step: int, content: str = "tensors", keep: int = 1) -> Path:
    """As the store does it, from the empty folder on."""
    path = folder / f"joint-{step:08d}"
    aside = aside_of(path)
    clear_leftovers(folder)
    aside.mkdir()
    with DigestedFile(aside / "__0_0.distcp") as file:
        file.write(f"{content} of step {step}".encode())
        record = file.close()
    (aside / "tokenizer").mkdir()
    (aside / "tokenizer" / "tokenizer.json").write_text("{}")
    (aside / STATE_FILE).write_text(json.dumps(asdict(state_at(step))))
    seal(aside, {"__0_0.distcp": record})
    sync_folder(aside, but={"__0_0.distcp"})
    publish(aside, path)
    drop_superseded(folder, keep, None)
    return path


def content_damage(path: Path) -> str | None:
    files = read_manifest(path)
    return damage(path) or wrong_digest(path, files, files)


def test_the_manifest_names_every_file_but_itself(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = {one.relative_to(path).as_posix() for one in path.rglob("*") if one.is_file()}
    assert read_manifest(path).keys() | {MANIFEST_FILE} == files
    assert content_damage(path) is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "by_size", "by_content"),
    [
        (lambda path: os.truncate(path / "__0_0.distcp", 5), "__0_0.distcp has 5 bytes of 17", None),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp: No such file", None),
        (lambda path: flip(path / "__0_0.distcp"), None, "content of __0_0.distcp is not what was written"),
        (lambda path: flip(path / STATE_FILE), "content of state.json is not what was written", None),
        (lambda path: (path / MANIFEST_FILE).unlink(), "manifest.json is missing", None),
        (lambda path: os.truncate(path / MANIFEST_FILE, 50), "manifest.json is torn", None),
        (lambda path: (path / MANIFEST_FILE).write_text('{"version": 9}'), "has format 9", None),
    ],
)
def test_damage_is_named_and_the_one_before_is_found(
    harm: Callable[[Path], None], by_size: str | None, by_content: str | None, tmp_path: Path
) -> None:
    before, newest = save(tmp_path, 1, keep=9), save(tmp_path, 2, keep=9)
    harm(newest)
    found = find_checkpoints(tmp_path)
    if by_size is not None:
        assert found.good == [before]
        assert [path for path, _ in found.damaged] == [newest]
        assert by_size in found.damaged[0][1]
        assert newest_checkpoint(tmp_path) == before
    else:
        assert newest_checkpoint(tmp_path) == newest
        assert str(by_content) in str(content_damage(newest))
        put_aside_as_damaged(newest)
        assert newest_checkpoint(tmp_path) == before


def test_a_run_without_a_good_checkpoint_does_not_begin_anew(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    path = save(tmp_path, 1)
    os.truncate(path / "__0_0.distcp", 5)
    with pytest.raises(
        UserError, match=r"no good checkpoint .*joint-00000001: __0_0.distcp has 5 bytes of 17"
    ):
        newest_checkpoint(tmp_path)
    put_aside_as_damaged(path)
    with pytest.raises(UserError, match=r"no good checkpoint .*joint-00000001.damaged"):
        newest_checkpoint(tmp_path)


def test_of_two_of_one_step_the_resharded_one_is_taken(tmp_path: Path) -> None:
    resharded = save(tmp_path, 1).rename(tmp_path / "joint-00000001.resharded")
    save(tmp_path, 1, keep=9)
    assert newest_checkpoint(tmp_path) == resharded


def die_at(moment: int, act: Callable[[], object]) -> bool:
    """Do `act` in a process that kills itself before its call number `moment` to the file system. Whether it died."""
    pid = os.fork()
    if pid == 0:
        left = [moment]

        def count(event: str, args: object) -> None:
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        act()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("step", [2, 1], ids=["a new name", "a name that is taken"])
def test_whoever_dies_while_saving_leaves_a_good_checkpoint(step: int, tmp_path: Path) -> None:
    """At every one of a save's calls; and the next save comes through and leaves nothing else."""
    moment, died = 0, True
    while died:
        folder = tmp_path / str(moment)
        folder.mkdir()
        save(folder, 1, "old")
        died = die_at(moment, lambda folder=folder: save(folder, step, "new"))  # type: ignore[misc]
        newest = newest_checkpoint(folder)
        assert newest is not None
        assert content_damage(newest) is None
        assert not find_checkpoints(folder).damaged
        assert read_state(newest).global_step in (1, step)
        last = save(folder, 3, "last")
        assert list(folder.iterdir()) == [last]
        moment += 1
    assert moment > 20


def test_a_copy_that_is_not_whole_takes_no_name(tmp_path: Path) -> None:
    path = save(tmp_path, 1, "old")
    aside = aside_of(path)
    aside.mkdir()
    (aside / "file").write_text("new")
    seal(aside, {})
    (aside / "file").write_text("other")
    os.truncate(aside / "file", 2)
    with pytest.raises(OSError, match="file has 2 bytes of 3"):
        publish(aside, path)
    assert content_damage(path) is None


def test_an_error_of_the_disk_is_told_as_the_system_told_it() -> None:
    def write() -> None:
        with DigestedFile(Path("/dev/full")) as file:
            try:
                file.write(bytes(1_000_000))
            except OSError as error:
                raise RuntimeError("what torch makes of it") from error

    with pytest.raises(OSError, match="No space left on device"):
        write()


def test_what_is_digested_while_it_is_written_is_what_lies_there(tmp_path: Path) -> None:
    with DigestedFile(tmp_path / "file") as file:
        for piece in (b"", b"abc", memoryview(b"defg")[1:], bytearray(100_000)):
            assert file.write(piece) == len(piece)
        assert file.tell() == 100_006
        assert file.close() == digested(tmp_path / "file")


def test_a_large_file_moves_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is on disk before the next, so that whoever watches a slow disk hears of it."""
    monkeypatch.setattr(manifest, "PIECE", 1000)
    sizes: list[int] = []
    with DigestedFile(tmp_path / "file", lambda: sizes.append((tmp_path / "file").stat().st_size)) as file:
        for length in (400, 700, 3500):
            file.write(os.urandom(length))
        assert sizes == [1100, 2100, 3100, 4100]
        assert file.close() == digested(tmp_path / "file")
    assert sizes[-1] == 4600


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(0, 1000), max_size=30), st.integers(1, 9))
def test_every_file_is_read_by_one_rank_and_none_reads_much_more(
    sizes: dict[str, int], num_ranks: int
) -> None:
    files = {name: FileRecord(num_bytes, "") for name, num_bytes in sizes.items()}
    dealt = shares(files, num_ranks)
    assert sorted(name for names in dealt for name in names) == sorted(files)
    loads = [sum(sizes[name] for name in names) for names in dealt]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


@given(
    st.lists(st.integers(1, 40), unique=True, max_size=20),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 10)),
)
def test_after_any_saves_the_newest_and_the_multiples_are_there(
    steps: list[int], keep: int, keep_every: int | None
) -> None:
    kept: list[int] = []
    for count, step in enumerate(steps, start=1):  # a run that goes back saves earlier steps again
        kept = sorted({*kept, step}, reverse=True)
        dropped = {kept[place] for place in superseded([state_at(one) for one in kept], keep, keep_every)}
        assert not dropped & set(kept[:keep])
        kept = [one for one in kept if one not in dropped]
        multiples = [one for one in steps[:count] if keep_every is not None and one % keep_every == 0]
        assert set(multiples) <= set(kept)
        assert len(kept) <= keep + len(multiples)


def test_what_was_saved_while_steps_were_skipped_supersedes_nothing() -> None:
    """A run that goes on being skipped goes back before it."""
    while_skipping = replace(state_at(4), health={"skipped": [4]})
    assert superseded([while_skipping, state_at(3), state_at(2)], 1, None) == [2]
    assert superseded([state_at(5), while_skipping, state_at(3)], 1, None) == [1, 2]


def test_of_two_of_one_step_one_is_dropped() -> None:
    """Such as a resharded copy, whose state is the same."""
    assert superseded([state_at(5), state_at(4), state_at(4)], 2, None) == [2]


def test_what_is_dropped_goes_from_disk(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=9)
    drop_superseded(tmp_path, keep=2, keep_every=3)
    assert [read_state(path).step for path in whole_checkpoints(tmp_path)] == [7, 6, 3]
