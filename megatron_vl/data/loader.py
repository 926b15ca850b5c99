"""Brings the bytes of planned steps to a rank that needs them, ahead of the training loop.

planner.next() ── plan ──> units ── read and decoded in threads ──> microbatches ── prefetched ──> loop

One background thread does this step by step, in order, so a step's content does not depend on timing.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.batch import (
    RowRule,
    UnitTokens,
    assemble,
    blank_unit,
    cut_unit,
    lay_out,
    mask_failed,
    microbatch_length,
    split_packs,
)
from megatron_vl.data.images import ImageRule, ImageTokens, decode_image
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.plan_state import PlanState
from megatron_vl.data.sample import SampleError, parse_sample
from megatron_vl.data.shards import ShardReader
from megatron_vl.data.text import EncodedSample, TextRule
from megatron_vl.data.types import Microbatch, Pack, StepPlan, Unit

MAX_CACHED_DOCUMENTS = 32  # longer than a row, of which other pieces will be asked for
MAX_EXAMPLES = 5  # of failed samples, by name


class StepPlanner(Protocol):
    """What `plan.Planner` is to the loader."""

    def next(self) -> StepPlan: ...

    def state(self) -> PlanState: ...


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a rank has use for; all False reads no byte and yields shapes."""

    reads_tokens: bool
    reads_images: bool
    reads_labels: bool

    @classmethod
    def of_stage(cls, *, is_first: bool, is_last: bool) -> "Role":
        """The role of a pipeline stage: tokens and images on the first, labels on the last."""
        return cls(reads_tokens=is_first, reads_images=is_first, reads_labels=is_last)


@dataclass(frozen=True, kw_only=True)
class ContentRule:
    """How a sample's bytes become tokens and pixels."""

    text: TextRule
    image: ImageRule
    image_tokens: ImageTokens
    max_sample_bytes: int


@dataclass(kw_only=True)
class Failures:
    """Units whose bytes could not be used on this rank, by cause, among all that it read."""

    num_units: int = 0
    num_failed: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def check(self, max_fraction: float) -> None:
        """Raise UserError where more than `max_fraction` failed, once 100 units were read or 10 failed."""
        enough = self.num_units >= 100 or self.num_failed >= 10
        if enough and self.num_failed > max_fraction * self.num_units:
            causes = ", ".join(f"{cause} ({count})" for cause, count in self.causes.most_common())
            raise UserError(
                f"{self.num_failed} of {self.num_units} samples cannot be used, more than "
                f"data.max_failed_fraction={max_fraction}: {causes}. For example: {'; '.join(self.examples)}"
            )


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """A step's plan, its microbatches, the planner's state after it, and how long the loop waited for it."""

    plan: StepPlan
    microbatches: list[Microbatch]
    state: PlanState
    wait_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What was read of a unit; what the role has no use for is None."""

    tokens: UnitTokens | None
    images: list[NDArray[np.uint8]] | None
    error: SampleError | None


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    plan: StepPlan
    microbatches: list[Microbatch]
    state: PlanState
    num_units: int
    errors: list[SampleError]


class Loader:
    """Iterates over the steps of `planner`, without end. Use as a context manager, or call `close`.

    A sample whose bytes cannot be used does not change the plan: images that fail are zeros, its loss is
    masked, it is in its microbatch's `failed_units` and counted in `failures`. Whatever else goes wrong ends
    the iteration with its exception.
    """

    def __init__(
        self,
        planner: StepPlanner,
        sources: Mapping[str, SourceIndex],
        content: ContentRule,
        rows: RowRule,
        role: Role,
        *,
        prefetch_steps: int = 2,
        num_threads: int = 4,
    ) -> None:
        """`prefetch_steps` steps are prepared ahead; `num_threads` read and decode samples."""
        self.failures = Failures()
        self._planner, self._sources, self._content = planner, sources, content
        self._rows, self._role = rows, role
        self._reader = ShardReader()
        self._encode_document = lru_cache(maxsize=MAX_CACHED_DOCUMENTS)(self._encode)
        self._sample_threads = ThreadPoolExecutor(num_threads, thread_name_prefix="samples")
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._pending: deque[Future[_Prepared]] = deque()
        for _ in range(max(prefetch_steps, 1)):
            self._pending.append(self._step_thread.submit(self._prepare))

    def __iter__(self) -> Iterator[LoadedStep]:
        return self

    def __next__(self) -> LoadedStep:
        start = time.perf_counter()
        if not self._pending:
            raise StopIteration
        try:
            prepared = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._pending.append(self._step_thread.submit(self._prepare))
        self._count(prepared)
        return LoadedStep(
            plan=prepared.plan,
            microbatches=prepared.microbatches,
            state=prepared.state,
            wait_seconds=time.perf_counter() - start,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads once they are done with the step in hand; iteration stops."""
        self._pending.clear()
        self._step_thread.shutdown(cancel_futures=True)
        self._sample_threads.shutdown(cancel_futures=True)

    def _count(self, prepared: _Prepared) -> None:
        self.failures.num_units += prepared.num_units
        self.failures.num_failed += len(prepared.errors)
        self.failures.causes.update(error.cause for error in prepared.errors)
        free = MAX_EXAMPLES - len(self.failures.examples)
        self.failures.examples += [str(error) for error in prepared.errors[:free]]

    def _prepare(self) -> _Prepared:
        plan = self._planner.next()
        state = self._planner.state()
        split = split_packs(plan.packs, self._rows)
        length = microbatch_length(split, self._rows)
        errors: list[SampleError] = []
        microbatches = [self._load(packs, length, errors) for packs in split]
        num_units = sum(len(pack.units) for pack in plan.packs)
        return _Prepared(
            plan=plan, microbatches=microbatches, state=state, num_units=num_units, errors=errors
        )

    def _load(self, packs: Sequence[Pack], length: int, errors: list[SampleError]) -> Microbatch:
        role, layout = self._role, lay_out(packs, self._rows, length)
        contents = list(self._sample_threads.map(self._read_unit, layout.units))
        tokens = [content.tokens for content in contents if content.tokens is not None]
        microbatch = assemble(
            layout,
            tokens if role.reads_tokens or role.reads_labels else None,
            self._stack_images(contents) if role.reads_images else None,
            with_inputs=role.reads_tokens,
            with_labels=role.reads_labels,
            filler_id=self._content.text.eos_id,
        )
        errors += [content.error for content in contents if content.error is not None]
        return mask_failed(microbatch, [unit for unit, read in enumerate(contents) if read.error is not None])

    def _stack_images(self, contents: Sequence[_Content]) -> NDArray[np.uint8]:
        size = self._content.image.size
        images = [image for content in contents for image in content.images or []]
        return np.stack(images) if images else np.zeros((0, 3, size, size), dtype=np.uint8)

    def _read_unit(self, unit: Unit) -> _Content:
        tokens, images, errors = None, None, []
        if self._role.reads_tokens or self._role.reads_labels:
            try:
                tokens = self._read_tokens(unit)
            except SampleError as error:
                errors.append(error)
                tokens = self._blank(unit)
        if self._role.reads_images:
            images = [self._read_image(unit, number, errors) for number in range(unit.num_images)]
        return _Content(tokens=tokens, images=images, error=errors[0] if errors else None)

    def _read_tokens(self, unit: Unit) -> UnitTokens:
        """Raises SampleError where the sample's text is not what its index was made of."""
        index = self._sources[unit.source]
        is_long = index.num_text_tokens[unit.sample] > self._rows.sequence_length
        encoded = (self._encode_document if is_long else self._encode)(unit.source, unit.sample)
        tokens = cut_unit(encoded, unit.piece, self._rows.sequence_length)
        num_image_tokens = int((tokens.inputs == self._content.text.image_id).sum())
        expected = self._num_image_tokens(unit)
        if len(tokens.inputs) != unit.num_tokens or num_image_tokens != expected:
            location = index.locate(unit.sample)
            detail = (
                f"{len(tokens.inputs)} tokens, {num_image_tokens} of images; "
                f"the index says {unit.num_tokens} and {expected}"
            )
            raise SampleError("differs from its index", location.key, location.shard, detail)
        return tokens

    def _encode(self, source: str, row: int) -> EncodedSample:
        index = self._sources[source]
        location = index.locate(row)
        data = self._reader.read(location, location.text)
        sample = parse_sample(data, location.key, location.shard, self._content.max_sample_bytes)
        per_image = self._tokens_per_image(index, row)
        if sample.num_images != len(per_image):
            detail = f"{sample.num_images} image marks; the index says {len(per_image)}"
            raise SampleError("differs from its index", location.key, location.shard, detail)
        return self._content.text.encode(sample, per_image)

    def _read_image(self, unit: Unit, number: int, errors: list[SampleError]) -> NDArray[np.uint8]:
        rule = self._content.image
        location = self._sources[unit.source].locate(unit.sample)
        data = self._reader.read(location, location.images[number])
        try:
            return decode_image(data, rule, location.key, location.shard)
        except SampleError as error:
            errors.append(error)
            return np.zeros((3, rule.size, rule.size), dtype=np.uint8)

    def _blank(self, unit: Unit) -> UnitTokens:
        text = self._content.text
        return blank_unit(
            unit.num_tokens, self._num_image_tokens(unit), image_id=text.image_id, filler_id=text.eos_id
        )

    def _num_image_tokens(self, unit: Unit) -> int:
        return sum(self._tokens_per_image(self._sources[unit.source], unit.sample))

    def _tokens_per_image(self, index: SourceIndex, row: int) -> list[int]:
        sizes = index.image_sizes[index.image_starts[row] : index.image_starts[row + 1]]
        return [int(count) for count in self._content.image_tokens.count(sizes)]
