"""Building: in place whole or not at all, resumed, reused, the same bytes for any number of processes."""

import hashlib
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

from data_tools import builder, part_writer
from data_tools.builder import build
from data_tools.command import CONFIG_FOLDER, source_folders, text_rule
from data_tools.quickstart import recipe as quickstart_recipe
from data_tools.quickstart.samples import document_records, page_records
from data_tools.quickstart.text import Document, Entry, installation_documents
from data_tools.quickstart.tokenizer import train_tokenizer
from data_tools.recipe import Part, Recipe, Record
from data_tools.recipes import build_and_print
from megatron_vl.config.data import DataConfig, SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.data.index import SourceIndex

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def small_parts() -> list[Part]:
    documents = [Document((Entry("", "", f"{word} {number}"),)) for number in range(30) for word in WORDS]
    pages = [f"{first}\n{second}" for first in WORDS for second in WORDS if first != second]
    return [
        Part(folders=("text",), drafts=documents, render=document_records),
        Part(folders=("pages", "chat_pages"), drafts=pages[10:], render=page_records),
        Part(folders=("heldout/pages", "heldout/chat_pages"), drafts=pages[:10], render=page_records),
    ]


SMALL = Recipe(name="small", version="1", parts=small_parts, train_tokenizer=train_tokenizer)


def config_for(root: Path, **changes: str) -> DataConfig:
    sources = {
        "text": SourceConfig(path=f"{root}/text"),
        "pages": SourceConfig(path=f"{root}/pages", heldout=f"{root}/heldout/pages", modality="multimodal"),
        "chat_pages": SourceConfig(path=f"{root}/chat_pages", heldout=f"{root}/heldout/chat_pages"),
    }
    values = {"name": "small", "tokenizer": f"{root}/tokenizer.json"} | changes
    return DataConfig(root=str(root), sources=sources, **values)


def contents(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders in this process, for tests that are not about processes."""

    class Pool:
        def map(self, function: Callable, drafts: Sequence, chunksize: int) -> Iterable:
            return map(function, drafts)

    monkeypatch.setattr(builder, "worker_pool", lambda num_processes: nullcontext(Pool()))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes built."""
    root = tmp_path_factory.mktemp("built") / "data"
    assert build(SMALL, config_for(root), num_processes=2)
    return root


def test_build_has_every_sample_indexed(built: Path) -> None:
    config = config_for(built)
    indexes = {
        name: SourceIndex.open(folder, text_rule(config), name=name)
        for name, folder in source_folders(config).items()
    }
    assert {name: index.num_samples for name, index in indexes.items()} == {
        "text": 300,
        "pages": 80,
        "chat_pages": 80,
        "heldout/pages": 10,
        "heldout/chat_pages": 10,
    }
    assert indexes["text"].num_shards == 2
    assert indexes["pages"].key(0) == "pages-000000"
    np.testing.assert_array_equal(indexes["pages"].columns(0).image_sizes, np.full((80, 2), 256))


def test_folders_of_a_part_hold_the_same_images(built: Path) -> None:
    def images(folder: str) -> list[bytes]:
        with tarfile.open(built / folder / "shard-000000.tar") as tar:
            return [tar.extractfile(member).read() for member in tar if member.name.endswith(".png")]

    assert images("pages") == images("chat_pages")
    assert len(images("pages")) == 80


def test_heldout_texts_train_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)
    seen: list[str] = []

    def train(texts: Iterable[str], path: Path, special_tokens: Sequence[str]) -> None:
        seen.extend(texts)
        train_tokenizer(seen, path, special_tokens)

    recipe = Recipe(name="small", version="1", parts=small_parts, train_tokenizer=train)
    build(recipe, config_for(tmp_path / "data"), num_processes=1)
    heldout = set(small_parts()[2].drafts)
    assert heldout.isdisjoint(seen)
    assert set(small_parts()[1].drafts) <= set(seen)  # of pages and of conversations about them
    assert "alpha 7" in seen
    assert not any("<image>" in text for text in seen)


def test_a_tokenizer_is_trained_on_some_of_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    monkeypatch.setattr(builder, "TRAINING_CHARACTERS", 60)
    seen: list[str] = []

    def train(texts: Iterable[str], path: Path, special_tokens: Sequence[str]) -> None:
        seen.extend(texts)
        train_tokenizer(seen, path, special_tokens)

    recipe = Recipe(name="small", version="1", parts=small_parts, train_tokenizer=train)
    build(recipe, config_for(tmp_path / "data"), num_processes=1)
    assert 60 <= len("".join(seen)) < 60 + max(map(len, seen))
    documents, pages, _ = small_parts()
    assert {document.text for document in documents.drafts} & set(seen)
    assert seen.count(pages.drafts[0]) == 2  # of pages and of conversations about them


def test_one_process_builds_what_two_do_after_interruptions(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    root = tmp_path / "data"
    messages: list[str] = []
    write = part_writer.FolderWriter.write

    def stop_at_page_40(writer: part_writer.FolderWriter, number: int, record: Record) -> bool:
        if writer.folder.name == "pages" and number == 40:
            raise KeyboardInterrupt
        return write(writer, number, record)

    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(part_writer.FolderWriter, "write", stop_at_page_40)
        with pytest.raises(KeyboardInterrupt):
            build(SMALL, config_for(root), num_processes=1, report=messages.append)
    assert not root.exists()
    aside = root.with_name("data.unfinished")
    finished = (aside / "text" / "shard-000001.tar").stat().st_ino
    assert not (aside / "pages").exists()

    with monkeypatch.context() as patch:
        patch.setattr(builder, "build_index", stop)
        with pytest.raises(KeyboardInterrupt):
            build(SMALL, config_for(root), num_processes=1, report=messages.append)
    assert not root.exists()

    assert build(SMALL, config_for(root), num_processes=1, report=messages.append)
    assert sum("interrupted build" in message for message in messages) == 2
    assert (root / "text" / "shard-000001.tar").stat().st_ino == finished  # kept, not built again
    assert not aside.exists()
    assert contents(root) == contents(built)


def test_complete_build_is_used_as_it_is(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    messages: list[str] = []
    assert not build(SMALL, config_for(built), num_processes=1, report=messages.append)
    assert "is complete" in messages[0]
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


@pytest.mark.parametrize("reason", ["version", "damage", "unfinished version"])
def test_outdated_or_damaged_build_is_replaced(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_processes(monkeypatch)
    config = config_for(tmp_path / "data")
    fewer = Recipe(
        name="small",
        version="2" if reason != "damage" else "1",
        parts=lambda: [small_parts()[0], *small_parts()[1:]],
        train_tokenizer=train_tokenizer,
    )
    build(SMALL, config, num_processes=1)
    expected = contents(tmp_path / "data")
    if reason == "damage":
        (tmp_path / "data" / "heldout" / "pages" / "shard-000000.tar").unlink()
    if reason == "unfinished version":  # what another version left is not mixed in
        (tmp_path / "data").rename(tmp_path / "data.unfinished")
        (tmp_path / "data.unfinished" / "text" / "shard-000000.tar").write_bytes(b"another")
    messages: list[str] = []
    assert build(fewer, config, num_processes=1, report=messages.append)
    found = contents(tmp_path / "data")
    if reason != "damage":
        for stamp in [path for path in expected if path.endswith("build.json")]:
            assert found.pop(stamp) != expected.pop(stamp)
    assert found == expected
    if reason != "unfinished version":
        assert "building anew" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".data.lock", "data"]


def test_folder_that_no_build_made_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no build made"):
        build(SMALL, config_for(root), num_processes=1)
    assert (root / "thesis.txt").read_text() == "mine"


def test_given_tokenizer_is_used(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_processes(monkeypatch)
    config = config_for(tmp_path / "data")
    given = tmp_path / "given.json"
    train_tokenizer(["other text"], given, [config.bos_token, config.eos_token, config.image_token])
    config.tokenizer = str(given)
    assert build(SMALL, config, num_processes=1)
    assert not (tmp_path / "data" / "tokenizer.json").exists()
    index = SourceIndex.open(tmp_path / "data" / "text", text_rule(config), name="text")
    trained = SourceIndex.open(built / "text", text_rule(config_for(built)), name="text")
    assert index.num_text_tokens > trained.num_text_tokens  # it has not merged our words
    assert not build(SMALL, config, num_processes=1)


def test_missing_tokenizer_is_named_before_anything_is_built(tmp_path: Path) -> None:
    config = config_for(tmp_path / "data", tokenizer=str(tmp_path / "nowhere.json"))
    with pytest.raises(UserError, match=r"nowhere\.json"):
        build(SMALL, config, num_processes=1)
    assert not (tmp_path / "data.unfinished").exists()


def test_source_that_the_recipe_lacks_is_named(tmp_path: Path) -> None:
    config = config_for(tmp_path / "data")
    config.sources["audio"] = SourceConfig(path=f"{tmp_path}/data/audio")
    with pytest.raises(UserError, match=r"data/audio for audio.*it builds text, pages"):
        build(SMALL, config, num_processes=1)


def test_source_elsewhere_is_not_the_builds_business(built: Path, tmp_path: Path) -> None:
    config = config_for(built)
    config.sources["own"] = SourceConfig(path=f"{tmp_path}/own")
    assert not build(SMALL, config, num_processes=1)


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(UserError, match="'laion', which no recipe has; valid: quickstart"):
        build_and_print(DataConfig(name="laion"))


def test_configuration_names_all_that_the_quickstart_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    monkeypatch.setattr(
        quickstart_recipe, "installation_documents", lambda: installation_documents(library / "asyncio")
    )
    size = quickstart_recipe.Size(documents=1, questions=1, pages=1, figures=1, heldout_documents=1)
    parts = quickstart_recipe.quickstart(size).parts()
    register_schemas()
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = OmegaConf.to_object(hydra.compose("pretrain", ["data=quickstart", "data.root=/r"]))
    assert isinstance(config, PretrainConfig)
    folders = {path.relative_to("/r").as_posix() for path in source_folders(config.data).values()}
    assert folders == {folder for part in parts for folder in part.folders}
    for name, source in config.data.sources.items():
        assert source.modality == ("text" if name in ("text", "chat_text") else "multimodal")


def test_workers_end_with_a_killed_build(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, time\n"
        "from data_tools.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(CONFIG_FOLDER.parent)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as parent:
        worker = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
