"""What of an item is scored, and what an answer continues."""

from pathlib import Path

import numpy as np
import pytest

from megatron_vl.config.errors import UserError
from megatron_vl.data.batch import cut_unit
from megatron_vl.data.loader import ContentRule
from megatron_vl.data.sample import Message, Sample
from megatron_vl.evaluate.items import ImageFile, Item
from megatron_vl.evaluate.sequences import (
    TokenSequence,
    cut_into_units,
    decode_images,
    option_sequences,
    prompt_sequence,
    text_sequence,
)
from tests.support.evaluation import content_rule
from tests.support.tiny_data import picture, write_tokenizer

IMAGE = ImageFile(name="0.png", data=picture())


@pytest.fixture(scope="module", name="content")
def make_content(tmp_path_factory: pytest.TempPathFactory) -> ContentRule:
    return content_rule(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"), 32, 4)


def asking(*contents: str) -> Sample:
    roles = ("user", "assistant") * len(contents)
    return Sample(messages=tuple(Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)))


def scored_text(sequence: TokenSequence, content: ContentRule) -> str:
    return content.text.decode(sequence.encoded.tokens[sequence.encoded.supervised].tolist())


@pytest.mark.parametrize(
    ("prompt", "option", "scored"),
    [
        (asking("which is red?"), "the bar", " the bar"),
        (asking("a line?", "yes", "a bar?"), "no, words", " no, words"),  # not the answer in the prompt
        (Sample(text="the picture shows"), "a bar", " a bar"),  # after a space of the option's
        (Sample(text="the picture shows\n"), "a bar", "a bar"),
        (Sample(text="the picture shows"), "\na bar", "\na bar"),
        (Sample(text="图片"), "图", " 图"),
    ],
)
def test_the_option_is_scored_and_nothing_else(
    prompt: Sample, option: str, scored: str, content: ContentRule
) -> None:
    (sequence,) = option_sequences(Item(key="k", prompt=prompt, options=(option,)), content)
    assert scored_text(sequence, content) == scored
    assert sequence.encoded.tokens[-1] != content.text.eos_id  # nor its end of sentence
    assert sequence.encoded.supervised[-1]


def test_an_option_continues_the_prompt_that_is_generated_from(content: ContentRule) -> None:
    item = Item(key="k", prompt=asking("<image>which?"), images=(IMAGE,), options=("a bar",))
    prompt, (sequence,) = prompt_sequence(item, content), option_sequences(item, content)
    start = len(prompt.encoded.tokens)
    assert sequence.encoded.tokens[:start].tolist() == prompt.encoded.tokens.tolist()
    assert np.flatnonzero(sequence.encoded.supervised).tolist() == list(
        range(start, len(sequence.encoded.tokens))
    )
    assert (prompt.encoded.tokens == content.text.image_id).sum() == 4
    assert content.text.decode(prompt.encoded.tokens.tolist()).endswith("Assistant:")


def test_a_text_is_scored_whole_and_its_pieces_share_no_label(content: ContentRule) -> None:
    text = "a red bar, a blue line and words " * 5
    sequence = text_sequence(Item(key="k", prompt=Sample(text=text, supervised=((0, 3),))), content)
    assert scored_text(sequence, content) == text
    units = cut_into_units([sequence], 16)
    labels = [cut_unit(sequence.encoded, unit.piece, 16) for unit in units]
    assert np.concatenate([piece.labels for piece in labels]).tolist() == sequence.encoded.tokens[1:].tolist()
    assert all(piece.loss_mask.all() for piece in labels)
    assert [unit.num_tokens for unit in units] == [len(piece.inputs) for piece in labels]
    assert len(units) > 2


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item(key="k", prompt=asking("?")), "item 'k' has no options"),
        (Item(key="k", prompt=asking("?"), options=("a", " \n")), "item 'k', option 1 is blank"),
        (Item(key="k", prompt=asking("<image>?"), options=("a",)), "has 1 image marks for 0 images"),
        (
            Item(key="k", prompt=asking("?"), images=(IMAGE,), options=("a",)),
            "has 0 image marks for 1 images",
        ),
        (Item(key="k", prompt=asking("?"), options=("<image>",)), "option 0 has 1 image marks for 0 images"),
    ],
)
def test_options_that_cannot_be_scored_are_named(item: Item, message: str, content: ContentRule) -> None:
    with pytest.raises(UserError, match=message):
        option_sequences(item, content)


@pytest.mark.parametrize("prompt", [asking("?"), Sample(text=""), Sample(text="<image> words")])
def test_bits_are_of_plain_texts_only(prompt: Sample, content: ContentRule) -> None:
    with pytest.raises(UserError, match="item 'k' is no plain text"):
        text_sequence(Item(key="k", prompt=prompt), content)


def test_an_image_that_is_not_there_is_named(content: ContentRule, tmp_path: Path) -> None:
    missing = ImageFile(name="gone.png", path=tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"item 'k'.*gone\.png: image cannot be read"):
        prompt_sequence(Item(key="k", prompt=asking("<image>"), images=(missing,)), content)


def test_a_file_that_is_no_image_is_named(content: ContentRule) -> None:
    page = ImageFile(name="page.png", data=b"<html>")
    with pytest.raises(
        UserError, match=r"item 'k': its image page\.png cannot be decoded; it must be a whole JPEG"
    ):
        prompt_sequence(Item(key="k", prompt=asking("<image>"), images=(page,)), content)


def test_an_image_that_cannot_be_decoded_is_zeros_and_told(content: ContentRule) -> None:
    broken = ImageFile(name="broken.png", data=picture(file_format="JPEG")[:-200])
    item = Item(key="k", prompt=asking("<image><image>"), images=(broken, IMAGE))
    (first, second), error = decode_images(prompt_sequence(item, content), content.image)
    assert not first.any() and second.any() and first.shape == second.shape == (3, 32, 32)
    assert error is not None and "broken.png" in str(error)
