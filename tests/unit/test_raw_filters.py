"""Filters: each finds what it is for; duplicates are the first's, whatever the processes and interruptions."""

import io
import json
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.builder import build
from data_tools.raw import recipe
from data_tools.raw.duplicates import DuplicateSieve, _NearImages, traits_of
from data_tools.raw.filters import unwanted_cause
from data_tools.raw.recipe import raw_recipe
from megatron_vl.config.data import DataConfig, FilterConfig, RawConfig, SourceConfig
from megatron_vl.config.errors import UserError
from tests.support.tiny_data import BOS, EOS, picture, write_tokenizer

ENGLISH = "The harvest was gathered before the rain began, and everybody went home in the evening."
GERMAN = "Die Ernte wurde eingebracht, bevor der Regen begann, und am Abend gingen alle nach Hause."
CHINESE = "下雨之前庄稼就收完了,到了晚上大家都回家去了。"


def text(content: str) -> dict[str, Any]:
    return {"text": content}


@pytest.mark.parametrize(
    ("filters", "fields", "sizes", "cause"),
    [
        ({}, text(""), [(1, 900)], ""),
        ({"min_side": 20}, text("<image>"), [(20, 90)], ""),
        ({"min_side": 21}, text("<image>"), [(20, 90)], "min_side"),
        ({"min_side": 21}, text("<image>" * 2), [(90, 90), (90, 20)], "min_side"),
        ({"max_aspect_ratio": 3}, text("<image>"), [(20, 60)], ""),
        ({"max_aspect_ratio": 3}, text("<image>"), [(61, 20)], "max_aspect_ratio"),
        ({"min_characters": 3}, text("<image> 图片a "), [], ""),
        ({"min_characters": 4}, text("<image> 图片a "), [], "min_characters"),
        ({"max_characters": 3}, text("<image> 图片a "), [], ""),
        ({"max_characters": 2}, text("<image> 图片a "), [], "max_characters"),
        (
            {"max_characters": 5},
            {"messages": [{"content": "<image>abc"}, {"content": "def"}]},
            [],
            "max_characters",
        ),
        ({"languages": ["en", "zh"]}, text(ENGLISH), [], ""),
        ({"languages": ["en", "zh"]}, text(CHINESE), [], ""),
        ({"languages": ["en", "zh"]}, text(GERMAN), [], "languages"),
    ],
)
def test_what_is_not_wanted(
    filters: dict[str, Any], fields: dict[str, Any], sizes: list[tuple[int, int]], cause: str
) -> None:
    images = {f"{number}.png": picture(*size) for number, size in enumerate(sizes)}
    assert unwanted_cause(fields, images, FilterConfig(**filters)) == cause


@pytest.mark.parametrize(
    ("filters", "complaint"),
    [
        ({"min_side": 0}, r"books\.raw\.filters\.min_side=0 must be at least 1, or null"),
        ({"max_aspect_ratio": 0.5}, r"max_aspect_ratio=0\.5 must"),
        (
            {"near_duplicate_texts": 0.1},
            r"near_duplicate_texts=0\.1, a similarity, must be within 0\.5 and 1",
        ),
        ({"near_duplicate_images": 5}, r"near_duplicate_images=5.* within 0 and 4"),
        ({"languages": ["en", "english"]}, r"languages has english; valid: .*de, .*zh"),
    ],
)
def test_values_are_checked(filters: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        raw_recipe(of_texts(tmp_path, [], **filters))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.raw.filters.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"filters needs datasketch: pip install 'megatron-vl\[build\]'"):
        raw_recipe(of_texts(tmp_path, [], near_duplicate_texts=0.8))


def kept(samples: list[tuple[dict[str, Any], list[bytes]]], **filters: Any) -> list[int]:
    """Which of the samples a sieve keeps."""
    config = FilterConfig(**filters)
    sieve = DuplicateSieve(config)
    traits = [
        traits_of(fields, {f"{n}.png": image for n, image in enumerate(images)}, config)
        for fields, images in samples
    ]
    return [number for number, one in enumerate(traits) if not sieve.judge(one)]


def test_exact_duplicates_have_the_same_text_and_images() -> None:
    one, other = picture(seed=1), picture(seed=2)
    samples = [
        (text("a"), [one]),
        (text("a"), [other]),
        (text("b"), [one]),
        (text("a"), [one]),
        (text("a"), [one, one]),
        ({"messages": [{"content": "a"}]}, [one]),
    ]
    assert kept(samples, exact_duplicates=True) == [0, 1, 2, 4, 5]
    assert kept(samples) == list(range(6))


def test_near_texts() -> None:
    """A word of a long text is another; a text of other sentences is not the same; one sees no case or spaces."""
    words = random.Random(1)
    long = " ".join(str(words.randrange(10**6)) for _ in range(200))
    edited = long.replace(long.split()[100], "another")
    spaced = "  " + long.upper().replace(" ", "\n ")
    half = long[: len(long) // 2] + " ".join(str(words.randrange(10**6)) for _ in range(100))
    samples = [
        (text(content), []) for content in (long, edited, spaced, half, ENGLISH, ENGLISH[:40], CHINESE)
    ]
    assert kept(samples, near_duplicate_texts=0.8) == [0, 3, 4, 5, 6]


def test_texts_that_share_a_third_are_not_near() -> None:
    """Some agree in a band of their signatures, and are compared as a whole."""
    words = random.Random(5)
    base = [str(words.randrange(10**6)) for _ in range(100)]
    for _ in range(30):
        other = base[:50] + [str(words.randrange(10**6)) for _ in range(50)]
        pair = [(text(" ".join(base)), []), (text(" ".join(other)), [])]
        assert kept(pair, near_duplicate_texts=0.5) == [0, 1]


def scene(seed: int, size: int = 128, quality: int = 90) -> bytes:
    """A smooth picture, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_near_images() -> None:
    """Of another size or quality it is the same picture. Several images are near where each of them is."""
    samples = [
        (text("a"), [scene(1)]),
        (text("b"), [scene(1, size=200, quality=60)]),
        (text("c"), [scene(2)]),
        (text("d"), [scene(1, size=90), scene(2, size=90)]),
        (text("e"), [scene(1), scene(3)]),
        (text("f"), []),
        (text("f"), []),
    ]
    assert kept(samples, near_duplicate_images=4) == [0, 2, 4, 5, 6]


@given(
    start=st.integers(0, 2**64 - 1),
    flips=st.lists(st.sets(st.integers(0, 63), max_size=5), max_size=4),
    bits=st.integers(0, 4),
)
@example(start=0, flips=[{1, 17, 33, 49}, {2, 3}], bits=4)
@example(start=2**64 - 1, flips=[{1, 63}], bits=2)
@settings(max_examples=60)
def test_near_hashes_are_those_of_few_differing_bits(start: int, flips: list[set[int]], bits: int) -> None:
    found, hashes = _NearImages(bits), [start ^ sum(1 << bit for bit in flip) for flip in [set(), *flips]]
    for number, one in enumerate(hashes):
        expected = any(bin(one ^ other).count("1") <= bits for other in hashes[:number])
        assert found.has(one) == expected
        found.add(one)


def of_texts(folder: Path, texts: list[str], **filters: Any) -> DataConfig:
    folder.mkdir(exist_ok=True)
    (folder / "books.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in texts))
    root = folder / "data"
    raw = RawConfig(
        format="text",
        file=f"{folder}/books.jsonl",
        heldout_fraction=0.3,
        filters=FilterConfig(**filters),
    )
    source = SourceConfig(path=f"{root}/books", heldout=f"{root}/heldout/books", raw=raw)
    write_tokenizer(folder / "tokenizer.json")
    tokenizer = f"{folder}/tokenizer.json"
    return DataConfig(
        name="mine",
        root=str(root),
        sources={"books": source},
        tokenizer=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
    )


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_one_process_interrupted_keeps_what_two_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates of every distance, across shards, and across what is trained on and what is held out."""
    order = random.Random(3)
    originals = [" ".join(str(order.randrange(10**6)) for _ in range(30)) for _ in range(30)]
    texts = originals + [one.replace("1", "7", 1) for one in originals] + ["short"] + originals
    order.shuffle(texts)
    filters = {"exact_duplicates": True, "near_duplicate_texts": 0.8, "min_characters": 10}
    monkeypatch.setattr(recipe, "SAMPLES_PER_SHARD", 3)
    expected, told = of_texts(tmp_path / "two", texts, **filters), list[str]()
    build(raw_recipe(expected), expected, num_processes=2, report=told.append)
    assert "61 samples are filtered out" in told[0]
    counts = json.loads((tmp_path / "two/data/books/filtered.json").read_text())
    assert counts["min_characters"] == 1
    assert sum(counts.values()) == 61

    config = of_texts(tmp_path / "one", texts, **filters)
    raw = raw_recipe(config)
    (part,) = raw.parts()
    render, calls = part.render, 0

    class Pool:
        def map(self, function: Any, drafts: Any, chunksize: int) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise KeyboardInterrupt
            return map(render, drafts)

    monkeypatch.setattr("data_tools.builder.worker_pool", lambda count: nullcontext(Pool()))
    with pytest.raises(KeyboardInterrupt):
        build(raw, config, num_processes=1, report=told.append)
    build(raw, config, num_processes=1, report=told.append)
    found, wanted = files(tmp_path / "one/data/"), files(tmp_path / "two/data")
    for stamp in [name for name in wanted if name.endswith("build.json")]:
        del found[stamp], wanted[stamp]  # of another folder
    assert found == wanted
