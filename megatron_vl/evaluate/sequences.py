"""Items as token sequences: what is scored of an option or a text, what a generated answer continues."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.batch import cut_unit
from megatron_vl.data.images import FORMATS, ImageRule, decode_image, read_size
from megatron_vl.data.loader import ContentRule, Role, UnitContent
from megatron_vl.data.sample import Message, Sample, SampleError
from megatron_vl.data.shard_reader import NO_TRAFFIC, Traffic
from megatron_vl.data.text import EncodedSample
from megatron_vl.data.types import Unit
from megatron_vl.evaluate.items import ImageFile, Item


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """The tokens of one text (`encoded.supervised`: those that are scored) and the images of its image tokens.

    `name` is for messages.
    """

    name: str
    encoded: EncodedSample
    images: tuple[ImageFile, ...] = ()

    @property
    def num_positions(self) -> int:
        """In a row: the last token is a label only."""
        return len(self.encoded.tokens) - 1


class SequenceUnits:
    """A loader's reader over sequences in memory; a unit's `sample` is the number of its sequence."""

    def __init__(
        self, sequences: Sequence[TokenSequence], image: ImageRule, sequence_length: int, role: Role
    ) -> None:
        self._sequences, self._image = sequences, image
        self._sequence_length, self._role = sequence_length, role

    @property
    def traffic(self) -> Traffic:
        """None: all is in memory."""
        return NO_TRAFFIC

    def read(self, unit: Unit, images: range) -> UnitContent:
        """See UnitReader. Images are for ranks that take all of a sequence's."""
        sequence, role = self._sequences[unit.sample], self._role
        tokens, decoded, error = None, list[NDArray[np.uint8]](), None
        if role.reads_tokens or role.reads_labels:
            tokens = cut_unit(sequence.encoded, unit.piece, self._sequence_length)
        if images:
            decoded, error = decode_images(sequence, self._image)
        return UnitContent(tokens=tokens, images=decoded, error=error)


def decode_images(
    sequence: TokenSequence, rule: ImageRule
) -> tuple[list[NDArray[np.uint8]], SampleError | None]:
    """A sequence's images, each uint8 [3, size, size], zeros where it cannot be used; and the first such error."""
    images, errors = [], []
    for image in sequence.images:
        try:
            images.append(decode_image(_read(image, sequence.name), rule, sequence.name, image.name))
        except SampleError as error:
            errors.append(error)
            images.append(np.zeros((3, rule.size, rule.size), dtype=np.uint8))
    return images, errors[0] if errors else None


def cut_into_units(sequences: Sequence[TokenSequence], sequence_length: int) -> list[Unit]:
    """The sequences; several pieces of one that is longer than a row, which must have no images."""
    return [
        Unit(
            source="items",
            sample=number,
            piece=piece,
            num_tokens=min(sequence.num_positions - start, sequence_length),
            num_images=len(sequence.images),
        )
        for number, sequence in enumerate(sequences)
        for piece, start in enumerate(range(0, sequence.num_positions, sequence_length))
    ]


def check_length(name: str, num_positions: int, sequence_length: int) -> None:
    """Raise UserError where something takes more positions than a row has."""
    if num_positions > sequence_length:
        raise UserError(
            f"{name} takes {num_positions} positions; evaluation.sequence_length and the model's positions leave "
            f"{sequence_length}"
        )


def choices_of(items: Sequence[Item], content: ContentRule, sequence_length: int) -> list[TokenSequence]:
    """All options of all items, in order. Raises UserError where one cannot be scored or does not fit."""
    sequences = [sequence for item in items for sequence in option_sequences(item, content)]
    for sequence in sequences:
        check_length(sequence.name, sequence.num_positions, sequence_length)
    return sequences


def prompts_of(
    items: Sequence[Item], content: ContentRule, max_new_tokens: int, sequence_length: int
) -> list[TokenSequence]:
    """All prompts, in order. Raises UserError where one does not fit with `max_new_tokens` more."""
    prompts = [prompt_sequence(item, content) for item in items]
    for prompt in prompts:
        num_positions = len(prompt.encoded.tokens) + max_new_tokens
        check_length(f"{prompt.name} with {max_new_tokens} new tokens", num_positions, sequence_length)
    return prompts


def option_sequences(item: Item, content: ContentRule) -> list[TokenSequence]:
    """The prompt with each option, of which the option's tokens are scored, its end of sentence not.

    A token counts where any of its characters does; an answer's characters begin after `Assistant:`.

    Raises:
        UserError: the item has no options, one that is blank, or not an image for every image mark.
    """
    if not item.options:
        raise UserError(f"item {item.key!r} has no options to choose from; this method needs some")
    sequences, per_image = [], _tokens_per_image(item, content)
    for number, option in enumerate(item.options):
        name = f"item {item.key!r}, option {number}"
        if not option.strip():
            raise UserError(f"{name} is blank; it must have text to score")
        sequences.append(_sequence(name, _answered(item.prompt, option), item.images, per_image, content))
    return [_without_end(sequence, content.text.eos_id) for sequence in sequences]


def text_sequence(item: Item, content: ContentRule) -> TokenSequence:
    """A whole text, of which every token is scored but the begin and end of sentence.

    Raises UserError where the item is no plain text.
    """
    if not item.prompt.text or item.images or item.prompt.num_images:
        raise UserError(f"item {item.key!r} is no plain text; bits per byte are of documents without images")
    whole = replace(item.prompt, supervised=None)
    return _without_end(_sequence(f"item {item.key!r}", whole, (), [], content), content.text.eos_id)


def prompt_sequence(item: Item, content: ContentRule) -> TokenSequence:
    """What a generated answer continues; nothing is scored. Raises UserError as `option_sequences`."""
    per_image = _tokens_per_image(item, content)
    sequence = _sequence(f"item {item.key!r}", item.prompt, item.images, per_image, content)
    tokens = sequence.encoded.tokens[:-1]
    return replace(sequence, encoded=EncodedSample(tokens=tokens, supervised=np.zeros(len(tokens), np.bool_)))


def agree_on_sequences(prepare: Callable[[], list[TokenSequence]]) -> list[TokenSequence]:
    """What `prepare` makes, after every rank has made the same. Collective over the world.

    Raises:
        UserError: the one of the first rank whose `prepare` raised it, on all ranks.
        RuntimeError: ranks made different sequences.
    """
    sequences, error, digest = list[TokenSequence](), "", hashlib.sha256()
    try:
        sequences = prepare()
    except UserError as raised:
        error = str(raised)
    for sequence in sequences:
        digest.update(
            sequence.name.encode() + bytes(sequence.encoded.tokens) + bytes(sequence.encoded.supervised)
        )
    raise_together([error] if error else [])
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest.hexdigest())
    if len(set(digests)) > 1:
        raise RuntimeError(f"ranks were given different items: their digests are {digests}")
    return sequences


def raise_together(errors: Sequence[str]) -> None:
    """Raise UserError with the first error of any rank, on all of them. Collective over the world."""
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, list(errors))
    first = next((error for of_rank in everyone for error in of_rank), None)
    if first is not None:
        raise UserError(first)


def _answered(prompt: Sample, option: str) -> Sample:
    """With the option as the assistant's answer; behind a document, after a space (which counts as the option's)."""
    if prompt.text is None:
        return replace(prompt, messages=(*prompt.messages, Message(role="assistant", content=option)))
    apart = not prompt.text or prompt.text[-1].isspace() or option[0].isspace()
    text = f"{prompt.text}{'' if apart else ' '}{option}"
    return replace(prompt, text=text, supervised=((len(prompt.text), len(text)),))


def _tokens_per_image(item: Item, content: ContentRule) -> list[int]:
    name, sizes = f"item {item.key!r}", list[tuple[int, int]]()
    for image in item.images:
        sizes.append(read_size(_read(image, name)))
        if sizes[-1] == (0, 0):
            raise UserError(
                f"{name}: its image {image.name} cannot be decoded; it must be a whole {', '.join(FORMATS)} file"
            )
    return [int(count) for count in content.image_tokens.count(np.array(sizes, np.int32).reshape(-1, 2))]


def _sequence(
    name: str, sample: Sample, images: tuple[ImageFile, ...], per_image: list[int], content: ContentRule
) -> TokenSequence:
    if sample.num_images != len(images):
        raise UserError(
            f"{name} has {sample.num_images} image marks for {len(images)} images; each image needs one"
        )
    return TokenSequence(name=name, encoded=content.text.encode(sample, per_image), images=images)


def _without_end(sequence: TokenSequence, eos_id: int) -> TokenSequence:
    """Without the last end of sentence; what an earlier one ends (answers in the prompt) is not scored."""
    tokens, supervised = sequence.encoded.tokens[:-1], sequence.encoded.supervised[:-1].copy()
    earlier = np.flatnonzero(tokens == eos_id)
    if len(earlier):
        supervised[: earlier[-1] + 1] = False
    return replace(sequence, encoded=EncodedSample(tokens=tokens, supervised=supervised))


def _read(image: ImageFile, name: str) -> bytes:
    try:
        return image.read()
    except OSError as error:
        raise SampleError("image cannot be read", name, image.name, str(error)) from error
