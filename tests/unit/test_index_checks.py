"""Opening an index: every way in which shards, index and configuration may disagree."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import IndexSummary, build_index
from megatron_vl.data.text import TextRule
from tests.support.tiny_data import BOS, mixed_samples, text_rule, write_source, write_tokenizer


@pytest.fixture(scope="module")
def rule(tmp_path_factory: pytest.TempPathFactory) -> TextRule:
    return text_rule(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def index_folder(folder: Path, rule: TextRule, **options: Any) -> IndexSummary:
    return build_index(folder, rule, max_sample_bytes=100_000, **options)


def open_index(folder: Path, rule: TextRule, **options: Any) -> SourceIndex:
    return SourceIndex.open(folder, rule, name="captions", **options)


def read_whole(index: SourceIndex) -> None:
    for number in range(index.num_shards):
        index.columns(number)


def replace_bytes(path: Path, size: int, fill: bytes = b"\1") -> None:
    path.write_bytes(fill * size)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda shard: shard.unlink(), "shard .*shard-000001.tar is missing"),
        (lambda shard: os.truncate(shard, 0), "shard .*shard-000001.tar is empty"),
        (
            lambda shard: os.truncate(shard, 700),
            "shard .*shard-000001.tar differs from its index: it has 700 bytes",
        ),
        (lambda shard: (shard.parent / "new.tar").touch(), "shard .*new.tar is not in .*index.json"),
        (
            lambda shard: (shard.parent / "index.json").unlink(),
            "data.sources.captions: .* has no index.json; .*data_t",
        ),
        (lambda shard: (shard.parent / "index.json").write_text("{"), "index.json is damaged"),
        (lambda shard: (shard.parent / "index.json").write_text("{}"), "index.json is damaged"),
        (
            lambda shard: (shard.parent / "index.json").write_text('{"format": "x"}'),
            "index.json is not of the format",
        ),
        (
            lambda shard: shard.with_suffix(".index.npz").unlink(),
            "shard-000001.index.npz cannot be read: .*data_tools.index",
        ),
        (lambda shard: replace_bytes(shard.with_suffix(".index.npz"), 100), "index.npz is not the one"),
        (lambda shard: (shard.parent / "shards.npy").unlink(), "has no shards.npy; .*data_tools.index"),
        (lambda shard: replace_bytes(shard.parent / "shards.npy", 600), "shards.npy is not the one"),
    ],
)
def test_shards_that_differ_from_their_index_are_named(
    tmp_path: Path, rule: TextRule, spoil: Callable[[Path], None], complaint: str
) -> None:
    write_source(tmp_path, mixed_samples(), max_samples=3)
    index_folder(tmp_path, rule)
    spoil(tmp_path / "shard-000001.tar")
    with pytest.raises(UserError, match=complaint):
        read_whole(open_index(tmp_path, rule))


def test_a_missing_folder_names_the_command_that_builds_it(tmp_path: Path, rule: TextRule) -> None:
    with pytest.raises(
        UserError, match=r"data.sources.captions: the folder .*/no does not exist; build it with `make x`"
    ):
        open_index(tmp_path / "no", rule, build_command="make x")


def test_another_tokenizer_or_template_is_refused_by_name(tmp_path: Path, rule: TextRule) -> None:
    write_source(tmp_path, mixed_samples(1))
    index_folder(tmp_path, rule)
    other = text_rule(write_tokenizer(tmp_path / "other.json"), eos_token=BOS)
    with pytest.raises(UserError, match=r"another tokenizer.*python -m data_tools.index"):
        open_index(tmp_path, other)
    content = json.loads((tmp_path / "index.json").read_text())
    content["fingerprints"]["chat template"] = "0" * 64
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another chat template.*python -m data_tools.index"):
        open_index(tmp_path, rule)


def test_an_image_beyond_the_limit_is_named(tmp_path: Path, rule: TextRule) -> None:
    write_source(tmp_path, mixed_samples(), max_samples=3)
    index_folder(tmp_path, rule)
    open_index(tmp_path, rule, max_image_pixels=33 * 44)
    with pytest.raises(
        UserError, match=r"image 0 of sample 'chat' in .*-000002.tar has 33 x 44 = 1452 pixels; .* is 1451"
    ):
        open_index(tmp_path, rule, max_image_pixels=33 * 44 - 1)


def test_an_interrupted_reindexing_is_not_taken_for_an_index(tmp_path: Path, rule: TextRule) -> None:
    """New columns of one shard, and no index.json any more."""
    write_source(tmp_path, mixed_samples(), max_samples=3)
    index_folder(tmp_path, rule)
    other = text_rule(write_tokenizer(tmp_path / "other.json", text="qqq"))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folder(tmp_path, other, on_shard=interrupt)
    for each in (rule, other):
        with pytest.raises(UserError, match=r"python -m data_tools.index"):
            open_index(tmp_path, each)


def test_arrays_are_never_unpickled(tmp_path: Path, rule: TextRule) -> None:
    """A crafted index: object arrays with a matching hash are refused by numpy, not executed."""
    write_source(tmp_path, mixed_samples(1))
    index_folder(tmp_path, rule)
    path = tmp_path / "shard-000000.index.npz"
    np.savez(path, allow_pickle=True, num_text_tokens=np.array([{}], dtype=object))
    table = np.load(tmp_path / "shards.npy", allow_pickle=False)
    table["index_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    np.save(tmp_path / "shards.npy", table)
    content = json.loads((tmp_path / "index.json").read_text())
    content["table_sha256"] = hashlib.sha256((tmp_path / "shards.npy").read_bytes()).hexdigest()
    (tmp_path / "index.json").write_text(json.dumps(content))
    index = open_index(tmp_path, rule)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        index.columns(0)
