"""Scores, choices and greedy answers are transformers' in one process, and the same at every parallel setting."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.data.loader import ContentRule
from megatron_vl.data.sample import Sample
from megatron_vl.evaluate.items import Item
from tests.support.evaluation import (
    ITEMS,
    LONG_TEXT,
    MAX_NEW_TOKENS,
    ROW,
    SHORT_TEXT,
    Results,
    Setup,
    answer_by_recomputing,
    chat,
    choose_by_each,
    content_rule,
    evaluate,
    evaluate_one,
    generate,
    pixels,
    prompt_tokens,
)
from tests.support.ranks import run_ranks
from tests.support.reference_vlm import IMAGE_SIZE, NUM_IMAGE_TOKENS, Reference, small_model
from tests.support.tiny_data import write_tokenizer

SETTINGS = {
    "tp2": (2, ParallelConfig(tensor_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_size=2)),
    "pp2_vpp2": (2, ParallelConfig(pipeline_size=2, virtual_size=2)),
    "dp2": (2, ParallelConfig()),
    "tp2_sp_pp2_dp2": (8, ParallelConfig(tensor_size=2, pipeline_size=2, sequence_parallel=True)),
}


@cache
def tokenizer() -> Path:
    return write_tokenizer(Path(mkdtemp()) / "tokenizer.json")


@cache
def content() -> ContentRule:
    return content_rule(tokenizer(), IMAGE_SIZE, NUM_IMAGE_TOKENS)


@cache
def reference() -> Reference:
    text = content().text
    return Reference(small_model(text.vocab_size), text.image_id, text.eos_id, eos_scale=1.5)


@cache
def setup() -> Setup:
    return Setup(
        model=small_model(content().text.vocab_size),
        weights=reference().weights(),
        tokenizer=tokenizer(),
        image_size=IMAGE_SIZE,
        tokens_per_image=NUM_IMAGE_TOKENS,
    )


@cache
def serial() -> Results:
    return run_ranks(1, evaluate, setup())[0]


def expected_nll(item: Item, option: str) -> tuple[float, int]:
    """From transformers' logits: all tokens after the prompt's, which are found by encoding the prompt alone."""
    start = len(prompt_tokens(item, content()))
    if item.prompt.text is None:
        whole = chat(*(message.content for message in item.prompt.messages), option)
    else:
        whole = Sample(text=f"{item.prompt.text} {option}")
    tokens = content().text.encode(whole, [NUM_IMAGE_TOKENS] * len(item.images)).tokens[:-1].tolist()
    log_probs_TV = reference().logits(tokens, pixels(item, content().image)).log_softmax(-1)
    nll = [-float(log_probs_TV[place - 1, tokens[place]]) for place in range(start, len(tokens))]
    return sum(nll), len(nll)


def test_options_have_transformers_likelihoods() -> None:
    scores, choices = iter(serial().scores), run_ranks(1, choose_by_each, setup())[0]
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
        for normalization, of_items in choices.items():
            pairs = zip(expected, units[normalization], strict=True)
            normalized = [nll / unit for (nll, _), unit in pairs]
            choice = of_items[number]
            assert choice.scores == pytest.approx(normalized, abs=1e-4)
            assert choice.chosen == int(np.argmin(normalized))
    chosen = {tuple(choice.chosen for choice in of_items) for of_items in choices.values()}
    assert len(chosen) > 1, "the normalisations are not told apart"


def test_bits_per_byte_are_of_every_token_after_the_first() -> None:
    for item, found in zip((LONG_TEXT, SHORT_TEXT), serial().bits, strict=True):
        tokens = prompt_tokens(item, content())
        nll = 0.0
        for start in range(0, len(tokens) - 1, ROW):
            piece = tokens[start : start + ROW + 1]
            log_probs_TV = reference().logits(piece[:-1], pixels(item, content().image)).log_softmax(-1)
            nll -= float(log_probs_TV[range(len(piece) - 1), piece[1:]].sum())
        assert found.bits == pytest.approx(nll / np.log(2), rel=1e-5)
        assert found.num_bytes == len(str(item.prompt.text).encode())
    assert len(prompt_tokens(LONG_TEXT, content())) > ROW


def test_greedy_answers_are_transformers() -> None:
    expected = [
        reference().answer(prompt_tokens(item, content()), pixels(item, content().image), MAX_NEW_TOKENS)
        for item in ITEMS
    ]
    assert serial().answers == [content().text.decode(tokens).strip() for tokens in expected]
    lengths = {len(tokens) for tokens in expected}
    assert min(lengths) < MAX_NEW_TOKENS == max(lengths) and len(lengths) > 2, (
        "they should end at different times"
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if SETTINGS[name][0] > 2 else ()) for name in SETTINGS]
)
def test_every_setting_says_what_one_process_says(name: str) -> None:
    world_size, parallel = SETTINGS[name]
    expected = serial()
    for found in run_ranks(world_size, evaluate, replace(setup(), parallel=parallel)):
        assert [score.nll_sum for score in found.scores] == pytest.approx(
            [score.nll_sum for score in expected.scores], abs=1e-4
        )
        assert [score.num_tokens for score in found.scores] == [score.num_tokens for score in expected.scores]
        assert [choice.chosen for choice in found.choices] == [choice.chosen for choice in expected.choices]
        assert [bits.bits for bits in found.bits] == pytest.approx([b.bits for b in expected.bits], rel=1e-5)
        assert found.answers == expected.answers


def test_a_replica_without_work_waits_for_the_other() -> None:
    for bits, answers in run_ranks(2, evaluate_one, setup()):
        assert bits[0].bits == pytest.approx(serial().bits[1].bits, rel=1e-5)
        assert answers == serial().answers[:1]


@pytest.mark.parametrize("max_cached_positions", [1, 120])
def test_batches_change_no_answer(max_cached_positions: int) -> None:
    """Each sequence alone, or two at once."""
    assert (
        run_ranks(1, generate, replace(setup(), max_cached_positions=max_cached_positions))[0]
        == serial().answers
    )


def test_the_cache_changes_no_answer() -> None:
    assert run_ranks(1, answer_by_recomputing, setup())[0] == serial().answers
