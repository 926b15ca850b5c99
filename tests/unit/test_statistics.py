"""`data_tools.statistics` counts what is there: against plain lists, and the samples as they were written."""

import base64
import io
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from data_tools.command import text_rule
from data_tools.counting import SourceCounts, Tally
from data_tools.report.page import write_page
from data_tools.statistics import count_sources, statistics_table
from megatron_vl.config.data import DataConfig, SourceConfig
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.indexing import build_index
from tests.support.tiny_data import BOS, EOS, IMAGE, Samples, picture, write_source, write_tokenizer

TOKENS_PER_IMAGE = 7
NUMBERS = st.lists(st.integers(0, 5000) | st.integers(0, 10**9))


@given(st.lists(NUMBERS, max_size=5))
def test_a_tally_is_that_of_all_numbers(parts: list[list[int]]) -> None:
    tally, numbers = Tally(), sorted(number for part in parts for number in part)
    for part in parts:
        tally.add(np.array(part, dtype=np.int64))
    assert (tally.number, tally.total) == (len(numbers), sum(numbers))
    if numbers:
        assert tally.quantile(1.0) == numbers[-1]
        assert tally.quantile(0.5) == numbers[(len(numbers) - 1) // 2]
        assert tally.quantile(0.9) == numbers[-(-9 * len(numbers) // 10) - 1]


@given(NUMBERS)
def test_bars_hold_every_number_once(numbers: list[int]) -> None:
    tally = Tally()
    tally.add(np.array(numbers, dtype=np.int64))
    bars = tally.bars(10)
    assert len(bars) <= 11 and all(bar.first <= bar.last for bar in bars)
    assert [bar.num for bar in bars] == [sum(bar.first <= x <= bar.last for x in numbers) for bar in bars]
    assert sum(bar.num for bar in bars) == len(numbers)
    for one, following in itertools.pairwise(bars):
        assert one.last == following.first - 1
    if numbers:
        assert (bars[0].first, bars[-1].last) == (min(numbers), max(numbers))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples in shards of five, of 0 to 2 images each; five held-out texts."""
    root = tmp_path_factory.mktemp("statistics")
    write_source(root / "mixed", samples(), max_samples=5)
    write_source(root / "heldout", {f"h{i}": ({"text": "held out"}, {}) for i in range(5)})
    write_tokenizer(root / "tokenizer.json")
    for folder in ("mixed", "heldout"):
        build_index(root / folder, text_rule(config_for(root)), max_sample_bytes=10**6)
    return root


def samples() -> Samples:
    return {
        f"k{i}": (
            {"text": "<image>" * (i % 3) + f"words of <b>sample</b> {i} " * (i + 1)},
            {f"{n}.png": picture(20 + i, 12, seed=i) for n in range(i % 3)},
        )
        for i in range(12)
    }


def config_for(root: Path) -> DataConfig:
    source = SourceConfig(path=str(root / "mixed"), heldout=str(root / "heldout"), modality="multimodal")
    return DataConfig(
        name="mine",
        root=str(root),
        sources={"mixed": source},
        tokenizer=f"{root}/tokenizer.json",
        bos_token=BOS,
        eos_token=EOS,
        image_token=IMAGE,
    )


@pytest.fixture(scope="module")
def counts(root: Path) -> dict[str, SourceCounts]:
    return count_sources(
        config_for(root), ImageTokens(tokens_per_image=TOKENS_PER_IMAGE), Console(quiet=True)
    )


def lengths(root: Path) -> list[int]:
    """Text tokens and the end of sentence of each sample, by the tokenizer alone."""
    tokenizer = text_rule(config_for(root))._tokenizer
    pieces = [fields["text"].replace("<image>", "") for fields, _ in samples().values()]
    return [len(tokenizer.encode(piece).ids) + 1 for piece in pieces]


def test_the_table_counts_samples_images_and_tokens(root: Path, counts: dict[str, SourceCounts]) -> None:
    table = statistics_table("mine", counts)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    expected = sorted(lengths(root))
    assert cells["source"] == ["mixed", "heldout/mixed"]
    assert cells["samples"] == ["12", "5"]
    assert cells["images"] == ["12", "0"]
    assert cells["tokens"][0] == f"{sum(expected):,}"
    assert cells["median"][0] == str(expected[5])
    assert cells["max"][0] == str(expected[-1])


def test_image_tokens_and_sizes_are_counted(root: Path, counts: dict[str, SourceCounts]) -> None:
    found = counts["mixed"]
    images = [len(files) for _, files in samples().values()]
    expected = [length + TOKENS_PER_IMAGE * num for length, num in zip(lengths(root), images, strict=True)]
    assert found.positions.total == sum(expected) and found.positions.quantile(1.0) == max(expected)
    assert found.images.quantile(1.0) == max(images)
    assert found.long_sides.number == sum(images) and found.num_unreadable == 0
    assert found.long_sides.quantile(1.0) == max(20 + i for i, num in enumerate(images) if num)


def test_the_page_stands_alone_and_shows_samples(
    root: Path, counts: dict[str, SourceCounts], tmp_path: Path
) -> None:
    path = tmp_path / "pages" / "mine.html"
    write_page(path, config_for(root), counts, "a model: 7 tokens an image")
    page = path.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import', page), "nothing is fetched"
    assert "words of &lt;b&gt;sample&lt;/b&gt; 0" in page, "texts are no HTML"
    assert counts["mixed"].index.digest in page
    keys = re.findall(r"<b>(k\d+)</b> · (shard-\d+\.tar)", page)
    assert keys == [(f"k{i}", f"shard-{i // 5:06d}.tar") for i in range(0, 12, 2)]
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in pictures]
    assert sizes == [(20 + i, 12) for i in range(0, 12, 2) if i % 3]
    assert list(path.parent.iterdir()) == [path]


def test_a_sample_that_cannot_be_shown_does_not_end_the_page(root: Path, tmp_path: Path) -> None:
    config = config_for(root)
    config.max_image_pixels = 10
    counts = count_sources(config, ImageTokens(tokens_per_image=1), Console(quiet=True))
    write_page(tmp_path / "mine.html", config, counts, "")
    page = (tmp_path / "mine.html").read_text(encoding="utf-8")
    assert "the first image cannot be shown: 22 x 12 pixels; data.max_image_pixels is 10" in page
    assert "base64" not in page
