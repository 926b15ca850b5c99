"""A change of one source builds that one alone; what could be used is in place at all times."""

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from data_tools import builder, reuse
from data_tools.builder import build
from data_tools.raw.recipe import raw_recipe
from data_tools.verify import folder_problems
from megatron_vl.config.data import DataConfig, RawConfig, SourceConfig
from megatron_vl.config.errors import UserError
from tests.support.tiny_data import BOS, EOS, write_tokenizer

NAMES = ("books", "notes")


@pytest.fixture(autouse=True)
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Renders in this process; the sources that drafts were rendered for."""
    rendered: list[str] = []

    class Pool:
        def map(self, function: Any, drafts: Sequence[Any], chunksize: int) -> Iterable[Any]:
            rendered.extend(function.args[0].source for _ in drafts)
            return map(function, drafts)

    monkeypatch.setattr(builder, "worker_pool", lambda num_processes: nullcontext(Pool()))
    return rendered


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two sources of text, of three records each."""
    write_tokenizer(tmp_path / "tokenizer.json")
    for name in NAMES:
        write_records(tmp_path, name, [f"A red bar of {name} {number}." for number in range(3)])
    root = tmp_path / "data"
    sources = {
        name: SourceConfig(
            path=f"{root}/{name}", raw=RawConfig(format="text", file=f"{tmp_path}/{name}.jsonl")
        )
        for name in NAMES
    }
    tokenizer = f"{tmp_path}/tokenizer.json"
    return DataConfig(
        name="mine", root=str(root), sources=sources, tokenizer=tokenizer, bos_token=BOS, eos_token=EOS
    )


def write_records(folder: Path, name: str, texts: list[str]) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def run(config: DataConfig) -> list[str]:
    """What was told."""
    told: list[str] = []
    build(raw_recipe(config), config, num_processes=1, report=told.append)
    for name in config.sources:
        assert list(folder_problems(name, Path(config.root) / name, config)) == []
    return told


def shard(config: DataConfig, name: str) -> Path:
    return Path(config.root) / name / "shard-000000.tar"


@pytest.mark.parametrize("linked", [True, False])
def test_a_changed_source_is_built_alone(
    config: DataConfig, tmp_path: Path, drafts: list[str], linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:

        def refuse(source: str, target: str) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(reuse.os, "link", refuse)
    run(config)
    before = {name: shard(config, name).read_bytes() for name in NAMES}
    inode = shard(config, "notes").stat().st_ino
    drafts.clear()
    write_records(tmp_path, "books", ["Another book."])
    assert "building anew what differs" in run(config)[0]
    assert drafts == ["books"]
    assert shard(config, "books").read_bytes() != before["books"]
    assert shard(config, "notes").read_bytes() == before["notes"]
    assert (shard(config, "notes").stat().st_ino == inode) == linked
    assert "is complete" in run(config)[0]


def test_a_new_source_is_added_and_one_less_removed(config: DataConfig, drafts: list[str]) -> None:
    notes = config.sources.pop("notes")
    run(config)
    drafts.clear()
    config.sources = {"books": config.sources["books"], "notes": notes}
    run(config)
    assert set(drafts) == {"notes"}
    del config.sources["books"]
    run(config)
    assert set(drafts) == {"notes"}
    assert not shard(config, "books").parent.exists()


def test_a_source_that_an_interrupted_build_finished_may_go(
    config: DataConfig, tmp_path: Path, drafts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder, "_index", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    del config.sources["books"]
    drafts.clear()
    assert "going on with the interrupted build" in run(config)[0]
    assert drafts == []
    assert not shard(config, "books").parent.exists()


def test_a_damaged_folder_is_built_alone(config: DataConfig, drafts: list[str]) -> None:
    run(config)
    whole = shard(config, "books").read_bytes()
    shard(config, "books").write_bytes(whole[:-512])
    drafts.clear()
    assert "is damaged" in run(config)[0]
    assert set(drafts) == {"books"}
    assert shard(config, "books").read_bytes() == whole


def test_a_change_of_mind_about_rejections_goes_on(
    config: DataConfig, tmp_path: Path, drafts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last finished shard; and the data in place stays as it is until then."""
    run(config)
    before = shard(config, "books").read_bytes()
    monkeypatch.setattr("data_tools.raw.recipe.SAMPLES_PER_SHARD", 4)
    texts = [f"Number {number}." for number in range(20)]
    write_records(tmp_path, "books", [*texts[:10], " ", *texts[10:]])
    with pytest.raises(UserError, match=r"max_rejected_fraction=0\.01 allows"):
        run(config)
    assert shard(config, "books").read_bytes() == before
    drafts.clear()
    config.sources["books"].raw.max_rejected_fraction = 0.1
    run(config)
    assert len(drafts) == 21 - 8
