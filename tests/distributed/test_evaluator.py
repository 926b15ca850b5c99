"""Scores, choices and greedy answers are transformers' in one process, and the same at every parallel setting."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.data.images import decode_image
from megatron_vl.data.sample import Message, Sample
from megatron_vl.evaluate.evaluator import Choice, SequenceScore, TextBits
from megatron_vl.evaluate.items import ImageFile, Item
from megatron_vl.evaluate.sequences import option_sequences
from tests.support.evaluation import ROW, Setup, build_evaluator, content_rule
from tests.support.ranks import run_ranks
from tests.support.reference_vlm import IMAGE_SIZE, NUM_IMAGE_TOKENS, Reference, small_model
from tests.support.tiny_data import picture, text_rule, write_tokenizer

MAX_NEW_TOKENS = 12
SETTINGS = {
    "tp2": (2, ParallelConfig(tensor_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_size=2)),
    "pp2_vpp2": (2, ParallelConfig(pipeline_size=2, virtual_size=2)),
    "dp2": (2, ParallelConfig()),
    "tp2_sp_pp2_dp2": (8, ParallelConfig(tensor_size=2, pipeline_size=2, sequence_parallel=True)),
}


def image(seed: int) -> ImageFile:
    return ImageFile(name=f"{seed}.png", data=picture(40, 30 + seed, seed=seed))


def chat(*contents: str) -> Sample:
    roles = ("user", "assistant") * len(contents)
    return Sample(messages=tuple(Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)))


OPTIONS = ("a red bar", "the blue line of words", "words")
ITEMS = (
    Item(key="one image", prompt=chat("<image>what is in the picture?"), images=(image(1),), options=OPTIONS),
    Item(key="two images", prompt=chat("<image> or <image>?"), images=(image(2), image(3)), options=OPTIONS),
    Item(key="no image", prompt=chat("is a bar blue?"), options=("yes", "no, it is red")),
    Item(
        key="document", prompt=Sample(text="the picture shows"), options=("a line", "words and words", "图片")
    ),
    Item(key="few shots", prompt=chat("a bar?", "the line", "<image>?"), images=(image(4),), options=OPTIONS),
)
LONG_TEXT = Item(key="long", prompt=Sample(text="the picture of a blue line shows words, " * 12))
SHORT_TEXT = Item(key="short", prompt=Sample(text="图片 words"))


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one rank's evaluator says of the items."""

    scores: list[SequenceScore]
    choices: dict[str, list[Choice]]
    bits: list[TextBits]
    answers: list[str]


def evaluate(setup: Setup) -> Results:
    evaluator = build_evaluator(setup)
    sequences = [sequence for item in ITEMS for sequence in option_sequences(item, evaluator.content)]
    return Results(
        scores=evaluator.score(sequences),
        choices={name: evaluator.choose(ITEMS, name) for name in ("none", "tokens", "bytes")},
        bits=evaluator.bits_per_byte([LONG_TEXT, SHORT_TEXT]),
        answers=evaluator.generate(ITEMS, MAX_NEW_TOKENS),
    )


@cache
def tokenizer() -> Path:
    return write_tokenizer(Path(mkdtemp()) / "tokenizer.json")


@cache
def reference() -> Reference:
    text = text_rule(tokenizer())
    return Reference(small_model(text.vocab_size), text.image_id, text.eos_id, eos_scale=1.5)


@cache
def setup() -> Setup:
    return Setup(
        model=small_model(text_rule(tokenizer()).vocab_size),
        weights=reference().weights(),
        tokenizer=tokenizer(),
        image_size=IMAGE_SIZE,
        tokens_per_image=NUM_IMAGE_TOKENS,
    )


@cache
def serial() -> Results:
    return run_ranks(1, evaluate, setup())[0]


def pixels(images: Sequence[ImageFile]) -> Tensor:
    rule = content_rule(tokenizer(), IMAGE_SIZE, NUM_IMAGE_TOKENS).image
    decoded = [torch.tensor(decode_image(image.read(), rule, "", "")) for image in images]
    return torch.stack(decoded) if decoded else torch.zeros(0, 3, IMAGE_SIZE, IMAGE_SIZE)


def prompt_tokens(item: Item) -> list[int]:
    text = text_rule(tokenizer())
    return text.encode_prompt(item.prompt, [NUM_IMAGE_TOKENS] * len(item.images)).tolist()


def expected_nll(item: Item, option: str) -> tuple[float, int]:
    """From transformers' logits: all tokens after the prompt's, which are found by encoding the prompt alone."""
    text, start = text_rule(tokenizer()), len(prompt_tokens(item))
    if item.prompt.text is None:
        whole = chat(*(message.content for message in item.prompt.messages), option)
    else:
        whole = Sample(text=f"{item.prompt.text} {option}")
    tokens = text.encode(whole, [NUM_IMAGE_TOKENS] * len(item.images)).tokens[:-1].tolist()
    log_probs_TV = reference().logits_TV(tokens, pixels(item.images)).log_softmax(-1)
    nll = [-float(log_probs_TV[place - 1, tokens[place]]) for place in range(start, len(tokens))]
    return sum(nll), len(nll)


def test_options_have_transformers_likelihoods() -> None:
    results, scores = serial(), iter(serial().scores)
    for number, item in enumerate(ITEMS):
        expected = [expected_nll(item, option) for option in item.options]
        for nll_sum, num_tokens in expected:
            score = next(scores)
            assert score.nll_sum == pytest.approx(nll_sum, abs=1e-4)
            assert score.num_tokens == num_tokens
        units = {
            "none": [1] * len(item.options),
            "tokens": [count for _, count in expected],
            "bytes": [len(option.encode()) for option in item.options],
        }
        for normalization, by in units.items():
            normalized = [nll / unit for (nll, _), unit in zip(expected, by, strict=True)]
            choice = results.choices[normalization][number]
            assert choice.scores == pytest.approx(normalized, abs=1e-4)
            assert choice.chosen == int(np.argmin(normalized))
    chosen = {tuple(choice.chosen for choice in choices) for choices in results.choices.values()}
    assert len(chosen) > 1, "the normalisations are not told apart"


def test_bits_per_byte_are_of_every_token_after_the_first() -> None:
    for item, found in zip((LONG_TEXT, SHORT_TEXT), serial().bits, strict=True):
        tokens = prompt_tokens(item)
        nll = 0.0
        for start in range(0, len(tokens) - 1, ROW):
            piece = tokens[start : start + ROW + 1]
            log_probs_TV = reference().logits_TV(piece[:-1], pixels(())).log_softmax(-1)
            nll -= float(log_probs_TV[range(len(piece) - 1), piece[1:]].sum())
        assert found.bits == pytest.approx(nll / np.log(2), rel=1e-5)
        assert found.num_bytes == len(str(item.prompt.text).encode())
    assert len(prompt_tokens(LONG_TEXT)) > ROW


def test_greedy_answers_are_transformers() -> None:
    text = text_rule(tokenizer())
    expected = [
        reference().answer(prompt_tokens(item), pixels(item.images), MAX_NEW_TOKENS) for item in ITEMS
    ]
    assert serial().answers == [text.decode(tokens).strip() for tokens in expected]
    lengths = {len(tokens) for tokens in expected}
    assert min(lengths) < MAX_NEW_TOKENS == max(lengths) and len(lengths) > 2, (
        "they should end at different times"
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_says_what_one_process_says(name: str) -> None:
    world_size, parallel = SETTINGS[name]
    expected = serial()
    for found in run_ranks(world_size, evaluate, replace(setup(), parallel=parallel)):
        assert [score.nll_sum for score in found.scores] == pytest.approx(
            [score.nll_sum for score in expected.scores], abs=1e-4
        )
        assert [score.num_tokens for score in found.scores] == [score.num_tokens for score in expected.scores]
        for normalization, choices in expected.choices.items():
            assert [c.chosen for c in found.choices[normalization]] == [c.chosen for c in choices]
        assert [bits.bits for bits in found.bits] == pytest.approx([b.bits for b in expected.bits], rel=1e-5)
        assert found.answers == expected.answers
