"""`python -m data_tools.index`: all folders of a data set, and errors in one line."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from data_tools.index import index_sources, summary_table
from megatron_vl.config.data import DataConfig, SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import SourceIndex
from tests.support.tiny_data import BOS, EOS, IMAGE, picture, text_rule, write_source, write_tokenizer


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two sources, one of them with held-out samples."""
    caption = ({"text": "<image>a bar"}, {"0.png": picture()})
    write_source(tmp_path / "captions", {f"k{i}": caption for i in range(3)}, max_samples=2)
    write_source(tmp_path / "heldout", {"k": caption})
    write_source(tmp_path / "books", {"k": ({"text": "words"}, {})})
    return DataConfig(
        name="mine",
        tokenizer=str(write_tokenizer(tmp_path / "tokenizer.json")),
        bos_token=BOS,
        eos_token=EOS,
        image_token=IMAGE,
        sources={
            "captions": SourceConfig(path=str(tmp_path / "captions"), heldout=str(tmp_path / "heldout")),
            "books": SourceConfig(path=str(tmp_path / "books")),
        },
    )


def test_every_folder_is_indexed_and_counted(config: DataConfig, tmp_path: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    summaries = index_sources(config, console)
    counts = {name: (each.num_shards, each.num_samples, each.num_images) for name, each in summaries.items()}
    assert counts == {"captions": (2, 3, 3), "books": (1, 1, 0), "heldout/captions": (1, 1, 1)}
    console.print(summary_table(summaries))
    assert "heldout/captions" in screen.getvalue()
    for folder in ("captions", "books", "heldout"):
        SourceIndex.open(tmp_path / folder, text_rule(Path(config.tokenizer)), name=folder)


def test_a_data_set_without_sources_is_an_error(config: DataConfig) -> None:
    config.sources = {}
    with pytest.raises(UserError, match="data=mine names no sources"):
        index_sources(config, Console(quiet=True))


def test_a_bad_shard_is_told_in_one_line_with_exit_status_1(config: DataConfig, tmp_path: Path) -> None:
    shard = tmp_path / "books" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    tokens = {"bos_token": BOS, "eos_token": EOS, "image_token": IMAGE}
    overrides = [
        f"data.tokenizer={config.tokenizer}",
        *(f'data.{name}="{token}"' for name, token in tokens.items()),
        f"data.sources.text={{path: {tmp_path / 'books'}, heldout: null}}",
    ]
    command = [sys.executable, "-m", "data_tools.index", "data=quickstart", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: shard {shard} is damaged after byte 1024: unexpected end of data"
    assert "Traceback" not in done.stdout
