"""Brings what planned steps hold to a rank that needs it, ahead of the loop that runs them.

planner.next() ── plan ──> units ── read and decoded in threads ──> microbatches ── prefetched ──> loop

One background thread does this step by step, in order, so a step's content does not depend on timing.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.errors import UserError
from megatron_vl.data.batch import (
    Layout,
    RowRule,
    UnitTokens,
    assemble,
    lay_out,
    mask_failed,
    microbatch_length,
    split_packs,
)
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.images import ImageRule
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.sample import SampleError
from megatron_vl.data.shard_reader import Traffic
from megatron_vl.data.sharing import WHOLE, ImageSharing, cut
from megatron_vl.data.text import TextRule
from megatron_vl.data.types import StepPlan, Unit

MAX_EXAMPLES = 5  # of failed samples, by name


class StepPlanner(Protocol):
    """What `plan_client.PlanClient` is to the loader."""

    def next(self) -> StepPlan: ...


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a rank has use for; all False reads no byte and yields shapes."""

    reads_tokens: bool
    reads_images: bool
    reads_labels: bool
    sharing: ImageSharing = WHOLE  # of the images, where it reads them

    @classmethod
    def of_stage(cls, *, is_first: bool, is_last: bool, sharing: ImageSharing = WHOLE) -> "Role":
        """The role of a pipeline stage: tokens on the first, labels on the last; images, or a share of them, on the
        first, or on all stages where they share those of whole steps."""
        reads_images = is_first or sharing.of_step
        return cls(reads_tokens=is_first, reads_images=reads_images, reads_labels=is_last, sharing=sharing)


@dataclass(frozen=True, kw_only=True)
class ContentRule:
    """How a sample's bytes become tokens and pixels."""

    text: TextRule
    image: ImageRule
    image_tokens: ImageTokens
    max_sample_bytes: int


@dataclass(frozen=True, kw_only=True)
class UnitContent:
    """What was read of a unit: tokens, where the rank's role has use for them, and the images that were asked for.

    A unit that cannot be used has its `error`, and stand-ins of the planned sizes.
    """

    tokens: UnitTokens | None
    images: list[NDArray[np.uint8]]
    error: SampleError | None


@dataclass(frozen=True, kw_only=True)
class LoadingRule:
    """`prefetch_steps` steps are prepared ahead by one thread, with the help of `num_threads`. `refuse_failed`: a
    sample that cannot be used is an error. `pin_memory`: tensors lie where a GPU copies from while it computes.
    """

    prefetch_steps: int = 2
    num_threads: int = 4
    refuse_failed: bool = False
    pin_memory: bool = False


DEFAULT_LOADING = LoadingRule()


class UnitReader(Protocol):
    """Where units come from; called from several threads."""

    @property
    def traffic(self) -> Traffic:
        """What was read so far."""
        ...

    def read(self, unit: Unit, images: range) -> UnitContent:
        """`images`: the numbers of those of the unit's images that are wanted."""
        ...


@dataclass(kw_only=True)
class Failures:
    """Units whose bytes could not be used on this rank, by cause, among all that it was given.

    `num_elsewhere`: units that failed on other ranks of the replica alone, which read what this one does not.
    """

    num_units: int = 0
    num_failed: int = 0
    num_elsewhere: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def check(self, max_fraction: float) -> None:
        """Raise UserError where more than `max_fraction` failed, once 100 units were read or 10 failed; on ranks that
        can say of what."""
        num_failed = self.num_failed + self.num_elsewhere
        enough = self.num_units >= 100 or num_failed >= 10
        if self.examples and enough and num_failed > max_fraction * self.num_units:
            causes = ", ".join(f"{cause} ({count})" for cause, count in self.causes.most_common())
            raise UserError(
                f"{num_failed} of {self.num_units} samples cannot be used, more than "
                f"data.max_failed_fraction={max_fraction}: {causes}. For example: {'; '.join(self.examples)}"
            )


@dataclass(frozen=True, kw_only=True)
class LoadedStep:
    """A step's plan, its microbatches, what was read for it, and how long the loop waited for it."""

    plan: StepPlan
    microbatches: list[Microbatch]
    traffic: Traffic
    wait_seconds: float


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    plan: StepPlan
    microbatches: list[Microbatch]
    num_units: int
    traffic: Traffic
    errors: list[SampleError]


class Loader:
    """Iterates over the steps of `planner`, without end. Use as a context manager, or call `close`.

    A sample whose bytes cannot be used does not change the plan: images that fail are zeros, its loss is
    masked, it is in its microbatch's `failed_units` and counted in `failures`; with `rule.refuse_failed` its
    SampleError ends the iteration. So does whatever else goes wrong.
    """

    def __init__(
        self,
        planner: StepPlanner,
        reader: UnitReader,
        content: ContentRule,
        rows: RowRule,
        role: Role,
        rule: LoadingRule = DEFAULT_LOADING,
    ) -> None:
        """`reader` reads what `role` needs."""
        self.failures = Failures()
        self._planner, self._reader, self._content = planner, reader, content
        self._rows, self._role, self._rule = rows, role, rule
        self._sample_threads = ThreadPoolExecutor(max(rule.num_threads, 1), thread_name_prefix="samples")
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="steps")
        self._pending: deque[Future[_Prepared]] = deque()
        for _ in range(rule.prefetch_steps):
            self._pending.append(self._step_thread.submit(self._prepare))

    def __iter__(self) -> Iterator[LoadedStep]:
        return self

    def __next__(self) -> LoadedStep:
        start = time.perf_counter()
        if not self._pending:
            raise StopIteration
        try:
            prepared = self._pending.popleft().result()
            if self._rule.refuse_failed and prepared.errors:
                raise prepared.errors[0]
        except BaseException:
            self.close()
            raise
        self._pending.append(self._step_thread.submit(self._prepare))
        self._count(prepared)
        return LoadedStep(
            plan=prepared.plan,
            microbatches=prepared.microbatches,
            traffic=prepared.traffic,
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
        plan, before = self._planner.next(), self._reader.traffic
        split = split_packs(plan.packs, self._rows)
        length = microbatch_length(split, self._rows)
        layouts = [lay_out(packs, self._rows, length) for packs in split]
        shares = self._role.sharing.shares([layout.num_images for layout in layouts])
        errors: list[SampleError] = []
        microbatches = [self._load(*pair, errors) for pair in zip(layouts, shares, strict=True)]
        num_units = sum(len(pack.units) for pack in plan.packs)
        traffic = self._reader.traffic.since(before)
        return _Prepared(
            plan=plan, microbatches=microbatches, num_units=num_units, traffic=traffic, errors=errors
        )

    def _load(self, layout: Layout, share: range, errors: list[SampleError]) -> Microbatch:
        role = self._role
        read = self._sample_threads.map if self._rule.num_threads else map
        wanted = cut(share if role.reads_images else range(0), [unit.num_images for unit in layout.units])
        contents = list(read(self._reader.read, layout.units, wanted))
        tokens = [content.tokens for content in contents if content.tokens is not None]
        microbatch = assemble(
            layout,
            tokens if role.reads_tokens or role.reads_labels else None,
            self._stack_images(contents) if role.reads_images else None,
            with_inputs=role.reads_tokens,
            with_labels=role.reads_labels,
            filler_id=self._content.text.eos_id,
        )
        microbatch = replace(microbatch, shares_images=role.sharing.size > 1)
        errors += [content.error for content in contents if content.error is not None]
        failed = [unit for unit, read in enumerate(contents) if read.error is not None]
        masked = mask_failed(microbatch, failed)
        return masked.pinned() if self._rule.pin_memory else masked

    def _stack_images(self, contents: Sequence[UnitContent]) -> NDArray[np.uint8]:
        size = self._content.image.size
        images = [image for content in contents for image in content.images]
        return np.stack(images) if images else np.zeros((0, 3, size, size), dtype=np.uint8)
