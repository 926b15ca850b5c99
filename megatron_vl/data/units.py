"""Reads units of indexed sources: tokens and images from their shards."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.batch import UnitTokens, blank_unit, cut_unit
from megatron_vl.data.images import decode_image
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.loader import ContentRule, Role, UnitContent
from megatron_vl.data.sample import SampleError, parse_sample
from megatron_vl.data.shard_index import Location
from megatron_vl.data.shard_reader import ShardReader, Traffic
from megatron_vl.data.text import EncodedSample
from megatron_vl.data.types import Unit

MAX_CACHED_DOCUMENTS = 32  # longer than a row, of which other pieces will be asked for


def differs_from_index(location: Location, detail: str) -> UserError:
    """What the plan of every rank rests on is not so: no sample to mask, but an end."""
    where = f"sample {location.key!r} in {location.shard}"
    return UserError(f"{where} differs from its index: {detail}. Index the source anew, or restore the shard")


class IndexedUnits:
    """A loader's reader over indexed sources, by name. Images that fail are zeros, texts that fail are blank."""

    def __init__(
        self,
        sources: Mapping[str, SourceIndex],
        content: ContentRule,
        sequence_length: int,
        role: Role,
    ) -> None:
        self._sources, self._content = sources, content
        self._sequence_length, self._role = sequence_length, role
        access = next(iter(sources.values())).access  # data.access holds for all sources
        whole_samples = role.reads_images and role.sharing.size == 1
        self._shards = ShardReader(access, whole_samples=whole_samples)
        self._encode_document = lru_cache(maxsize=MAX_CACHED_DOCUMENTS)(self._encode)

    def read(self, unit: Unit, images: range) -> UnitContent:
        """See UnitReader."""
        tokens, errors = None, list[SampleError]()
        if self._role.reads_tokens or self._role.reads_labels:
            try:
                tokens = self._read_tokens(unit)
            except SampleError as error:
                errors.append(error)
                tokens = self._blank(unit)
        decoded = [self._read_image(unit, number, errors) for number in images]
        return UnitContent(tokens=tokens, images=decoded, error=errors[0] if errors else None)

    @property
    def traffic(self) -> Traffic:
        """What was read so far."""
        return self._shards.traffic

    def _read_tokens(self, unit: Unit) -> UnitTokens:
        """Raises SampleError where the text cannot be used, UserError where it is not what its index was made of."""
        location = self._sources[unit.source].locate(unit.sample)
        is_long = location.num_text_tokens > self._sequence_length
        encoded = (self._encode_document if is_long else self._encode)(unit.source, unit.sample)
        tokens = cut_unit(encoded, unit.piece, self._sequence_length)
        num_image_tokens = int((tokens.inputs == self._content.text.image_id).sum())
        expected = sum(self._tokens_per_image(location))
        if len(tokens.inputs) != unit.num_tokens or num_image_tokens != expected:
            detail = (
                f"{len(tokens.inputs)} tokens, {num_image_tokens} of images; "
                f"the index says {unit.num_tokens} and {expected}"
            )
            raise differs_from_index(location, detail)
        return tokens

    def _encode(self, source: str, row: int) -> EncodedSample:
        location = self._sources[source].locate(row)
        data = self._shards.read(location, location.text)
        sample = parse_sample(data, location.key, location.shard, self._content.max_sample_bytes)
        per_image = self._tokens_per_image(location)
        if sample.num_images != len(per_image):
            detail = f"{sample.num_images} image marks; the index says {len(per_image)}"
            raise differs_from_index(location, detail)
        return self._content.text.encode(sample, per_image)

    def _read_image(self, unit: Unit, number: int, errors: list[SampleError]) -> NDArray[np.uint8]:
        rule = self._content.image
        location = self._sources[unit.source].locate(unit.sample)
        data = self._shards.read(location, location.images[number])
        try:
            return decode_image(data, rule, location.key, location.shard)
        except SampleError as error:
            errors.append(error)
            return np.zeros((3, rule.size, rule.size), dtype=np.uint8)

    def _blank(self, unit: Unit) -> UnitTokens:
        text, location = self._content.text, self._sources[unit.source].locate(unit.sample)
        num_image_tokens = sum(self._tokens_per_image(location))
        return blank_unit(unit.num_tokens, num_image_tokens, image_id=text.image_id, filler_id=text.eos_id)

    def _tokens_per_image(self, location: Location) -> list[int]:
        return [int(count) for count in self._content.image_tokens.count(location.image_sizes)]
