"""Scores and answers items with a model: a freshly loaded one, or one in the middle of its training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vl.config.evaluate import NORMALIZATIONS
from megatron_vl.data.loader import ContentRule
from megatron_vl.evaluate.generate import Generator
from megatron_vl.evaluate.items import Item, Progress, no_progress
from megatron_vl.evaluate.rows import RowScorer
from megatron_vl.evaluate.sequences import (
    SequenceUnits,
    TokenSequence,
    agree_on_sequences,
    check_length,
    choices_of,
    cut_into_units,
    prompts_of,
    raise_together,
    text_sequence,
)
from megatron_vl.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class SequenceScore:
    """Of one sequence: the summed negative log-likelihood (nats) of its scored tokens, and how many they are."""

    nll_sum: float
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Of one item: each option's normalised negative log-likelihood (nats), and the option with the lowest."""

    scores: tuple[float, ...]
    chosen: int


@dataclass(frozen=True, kw_only=True)
class TextBits:
    """Of one text: the bits that the model needs for it, and its UTF-8 bytes."""

    bits: float
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A model and how content becomes its input. Every call is collective over the world, with the same items on
    all ranks, and returns the same on all ranks, in the items' order; a UserError is raised on all of them.

    `chunks` may be wrapped for training, whose state no call changes. `sequence_length` bounds every item;
    `max_cached_positions` bounds the sequences that one replica answers at once, by their prompts and answers.
    """

    chunks: list[Any]
    groups: Groups
    content: ContentRule
    sequence_length: int
    max_cached_positions: int = 16384
    progress: Progress = no_progress

    def score(self, sequences: Sequence[TokenSequence]) -> list[SequenceScore]:
        """Sum the loss of each sequence's scored tokens. A text longer than a row is cut into rows, each on its own.

        Raises UserError where a sequence with images is longer than a row, or an image cannot be used.
        """
        for sequence in sequences:
            if sequence.images:
                check_length(sequence.name, sequence.num_positions, self.sequence_length)
        units = cut_into_units(sequences, self.sequence_length)
        rows = RowScorer(
            chunks=self.chunks,
            groups=self.groups,
            content=self.content,
            sequence_length=self.sequence_length,
            progress=self.progress,
        )
        reader = SequenceUnits(sequences, self.content.image, self.sequence_length, rows.role)
        scores = rows.score(units, reader)
        raise_together(scores.failures)
        nll_sums, num_tokens = [0.0] * len(sequences), [0] * len(sequences)
        totals = zip(units, scores.loss_sums.tolist(), scores.num_tokens.tolist(), strict=True)
        for unit, loss_sum, count in totals:
            nll_sums[unit.sample] += loss_sum
            num_tokens[unit.sample] += int(count)
        pairs = zip(nll_sums, num_tokens, strict=True)
        return [SequenceScore(nll_sum=nll_sum, num_tokens=count) for nll_sum, count in pairs]

    def choose(self, items: Sequence[Item], normalization: str = "tokens") -> list[Choice]:
        """The option of each item that the model finds likeliest (paper, section 4: the lowest perplexity of image,
        prompt and option). `normalization` is one of NORMALIZATIONS.

        Raises UserError where an item has no options, or one does not fit a row, or an image cannot be used.
        """
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization!r}; valid: {', '.join(NORMALIZATIONS)}")
        length = self.sequence_length
        scores = iter(self.score(agree_on_sequences(lambda: choices_of(items, self.content, length))))
        choices = []
        for item in items:
            of_item = tuple(_normalized(next(scores), option, normalization) for option in item.options)
            choices.append(Choice(scores=of_item, chosen=of_item.index(min(of_item))))
        return choices

    def bits_per_byte(self, items: Sequence[Item]) -> list[TextBits]:
        """What each plain text costs the model: its tokens' negative log-likelihood in bits, after begin of sentence
        and without the end of sentence; and its bytes. A long text is cut into rows, each on its own.

        Raises UserError where an item is no plain text.
        """
        sequences = agree_on_sequences(lambda: [text_sequence(item, self.content) for item in items])
        pairs = zip(items, self.score(sequences), strict=True)
        return [
            TextBits(bits=score.nll_sum / math.log(2), num_bytes=len((item.prompt.text or "").encode()))
            for item, score in pairs
        ]

    def generate(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """The model's greedy answer to each prompt, up to the end of sentence or `max_new_tokens`, stripped.

        Raises UserError where a prompt and its answer do not fit `sequence_length`, or an image cannot be used.
        """
        prompts = agree_on_sequences(
            lambda: prompts_of(items, self.content, max_new_tokens, self.sequence_length)
        )
        generator = Generator(
            chunks=self.chunks,
            groups=self.groups,
            content=self.content,
            max_new_tokens=max_new_tokens,
            max_cached_positions=self.max_cached_positions,
            progress=self.progress,
        )
        return [self.content.text.decode(tokens).strip() for tokens in generator.answer(prompts)]


def _normalized(score: SequenceScore, option: str, normalization: str) -> float:
    units = {"none": 1, "tokens": score.num_tokens, "bytes": len(option.encode())}
    return score.nll_sum / units[normalization]
