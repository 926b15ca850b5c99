"""What megatron-core's schedules (0.16.1) make each pipeline rank do, in order: passes, sends, receipts and waits.

Three schedules: one rank without pipelining, 1F1B, and 1F1B interleaved over virtual stages. A rank's *program* is
its passes with the messages between them, each where megatron-core posts and awaits it; `planning.simulate` gives it
times. Chunk c runs on rank c mod pipeline_size, as everywhere in planning.
"""

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Literal

from megatron_vl.config.errors import UserError

Kind = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a microbatch through a pipeline chunk."""

    kind: Kind
    chunk: int
    microbatch: int


@dataclass(frozen=True, slots=True)
class Post:
    """The rank offers to exchange messages, and goes on. A message is named by the pass that reads it."""

    messages: tuple[Pass, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """The rank goes on when these messages have arrived."""

    messages: tuple[Pass, ...]


Program = list[Pass | Post | Wait]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A step of one replica. `group_size`: how many microbatches in a row go through a virtual stage before the next
    (microbatch_group_size_per_vp_stage); 0 is the smallest that megatron-core takes: the pipeline size, its own
    default, where that divides the microbatches.

    Raises:
        UserError: megatron-core does not interleave this number of microbatches.
    """

    pipeline_size: int
    virtual_size: int
    num_microbatches: int
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.virtual_size > 1 and not interleaves(
            self.num_microbatches, self.pipeline_size, self.virtual_group
        ):
            raise UserError(
                f"{self.num_microbatches} microbatches in groups of {self.virtual_group} cannot be interleaved over "
                f"{self.pipeline_size} pipeline ranks: groups, the last one too, hold at least {self.pipeline_size}"
            )

    @property
    def num_chunks(self) -> int:
        return self.pipeline_size * self.virtual_size

    @property
    def virtual_group(self) -> int:
        return self.group_size or smallest_group(self.num_microbatches, self.pipeline_size)

    def passes(self, rank: int) -> list[Pass]:
        """What `rank` computes, in order: some forward passes, then forward and backward in turns, then backward."""
        forwards, backwards = self.order(rank, "forward"), self.order(rank, "backward")
        warmup = self.num_warmup(rank)
        turns = chain.from_iterable(zip(forwards[warmup:], backwards, strict=False))
        return [*forwards[:warmup], *turns, *backwards[len(forwards) - warmup :]]

    def num_warmup(self, rank: int) -> int:
        """How many forward passes `rank` makes before its first backward pass, but for the one right before it."""
        after = self.pipeline_size - rank - 1
        if self.virtual_size > 1:
            after = 2 * after + (self.virtual_size - 1) * self.virtual_group
        return min(after, self.virtual_size * self.num_microbatches)

    def program(self, rank: int) -> Program:
        """All that `rank` does, in order."""
        if self.virtual_size > 1:
            return _Interleaved(self, rank).run()
        return _one_forward_one_backward(self, rank)

    def order(self, rank: int, kind: Kind) -> list[Pass]:
        """The forward or backward passes of `rank`, in order."""
        return _order(self, rank, kind)

    def message_to(self, reader: Pass) -> tuple[Pass, ...]:
        """The message that `reader` needs, if another rank makes it."""
        outermost = 0 if reader.kind == "forward" else self.num_chunks - 1
        return () if reader.chunk == outermost else (reader,)

    def message_from(self, writer: Pass) -> tuple[Pass, ...]:
        """The message that `writer` makes, if another rank needs it."""
        step = 1 if writer.kind == "forward" else -1
        reader = Pass(writer.kind, writer.chunk + step, writer.microbatch)
        return (reader,) if 0 <= reader.chunk < self.num_chunks else ()


def interleaves(num_microbatches: int, pipeline_size: int, group_size: int) -> bool:
    """Whether megatron-core's interleaved schedule takes these numbers."""
    rest = num_microbatches % group_size
    return pipeline_size <= group_size <= num_microbatches and (rest == 0 or rest >= pipeline_size)


def smallest_group(num_microbatches: int, pipeline_size: int) -> int:
    """The smallest group size that the interleaved schedule takes, which keeps the fewest activations; the pipeline
    size where there is none, as with fewer microbatches than that."""
    sizes = range(pipeline_size, num_microbatches + 1)
    fitting = (size for size in sizes if interleaves(num_microbatches, pipeline_size, size))
    return next(fitting, pipeline_size)


@lru_cache(maxsize=256)
def _order(schedule: Schedule, rank: int, kind: Kind) -> list[Pass]:
    count, group = schedule.num_microbatches, schedule.virtual_group
    chunks = range(rank, schedule.num_chunks, schedule.pipeline_size)
    return [
        Pass(kind, chunk, microbatch)
        for first in range(0, count, group)
        for chunk in (chunks if kind == "forward" else reversed(chunks))
        for microbatch in range(first, min(first + group, count))
    ]


def _exchange(*messages: Pass) -> Program:
    """What blocks: batched sends and receipts that are awaited at once."""
    return [Post(messages), Wait(messages)] if messages else []


def _one_forward_one_backward(schedule: Schedule, rank: int) -> Program:
    """Every exchange blocks. Without pipelining there are none, and no warm-up."""
    forwards, backwards = schedule.order(rank, "forward"), schedule.order(rank, "backward")
    warmup = schedule.num_warmup(rank)
    incoming, outgoing = schedule.message_to, schedule.message_from
    program: Program = []
    for forward in forwards[:warmup]:
        program += [*_exchange(*incoming(forward)), forward, *_exchange(*outgoing(forward))]
    steady = list(zip(forwards[warmup:], backwards, strict=False))
    if steady:
        program += _exchange(*incoming(steady[0][0]))
    for place, (forward, backward) in enumerate(steady):
        following = incoming(steady[place + 1][0]) if place + 1 < len(steady) else ()
        program += [forward, *_exchange(*outgoing(forward), *incoming(backward))]
        program += [backward, *_exchange(*outgoing(backward), *following)]
    for backward in backwards[len(steady) :]:
        program += [*_exchange(*incoming(backward)), backward, *_exchange(*outgoing(backward))]
    return program


@dataclass
class _Interleaved:
    """Exchanges block while the pipeline fills and drains; in between, sends and receipts run beside the passes.

    A rank asks for its next pass's input when it ends a pass. The rank that closes the ring (the first one forward,
    the last one backward) asks instead for what the other end of the pipeline makes pipeline_size - 1 passes later
    than it: earlier than it needs it, when groups are larger than the pipeline. A receipt posted in the steady phase
    is awaited by the next pass that reads from another rank, a send by the send after it.
    """

    schedule: Schedule
    rank: int
    program: Program = field(default_factory=list)
    posted: dict[Kind, deque[Pass]] = field(default_factory=lambda: {"forward": deque(), "backward": deque()})
    sending: dict[Kind, tuple[Pass, ...]] = field(default_factory=lambda: {"forward": (), "backward": ()})

    def run(self) -> Program:
        forwards = self.schedule.order(self.rank, "forward")
        backwards = self.schedule.order(self.rank, "backward")
        warmup = self.schedule.num_warmup(self.rank)
        self.program += _exchange(*self.schedule.message_to(forwards[0]))
        for place, forward in enumerate(forwards[:warmup]):
            self._blocking(place, forward)
        if warmup < len(forwards):
            self._post("backward", (), self.schedule.message_to(backwards[0]))
        else:
            self.program += _exchange(*self.schedule.message_to(backwards[0]))
        num_steady = len(forwards) - warmup
        for place, (forward, backward) in enumerate(zip(forwards[warmup:], backwards, strict=False)):
            self._overlapped(warmup + place, forward)
            self._overlapped(place, backward)
        for place, backward in enumerate(backwards[num_steady:], start=num_steady):
            self._await_receipt(backward)
            self._blocking(place, backward)
        self.program.append(Wait(self.sending["backward"]))
        return self.program

    def _blocking(self, place: int, now: Pass) -> None:
        outgoing = self.schedule.message_from(now)
        self.program += [now, *_exchange(*outgoing, *self._asked_for(place, now.kind))]

    def _overlapped(self, place: int, now: Pass) -> None:
        self._await_receipt(now)
        self.program.append(now)
        self._post(now.kind, self.schedule.message_from(now), self._asked_for(place, now.kind))

    def _post(self, kind: Kind, outgoing: tuple[Pass, ...], incoming: tuple[Pass, ...]) -> None:
        self.program += [Post(outgoing + incoming), Wait(self.sending[kind])]
        self.sending[kind] = outgoing
        self.posted[kind].extend(incoming)

    def _await_receipt(self, now: Pass) -> None:
        if self.schedule.message_to(now) and self.posted[now.kind]:
            self.program.append(Wait((self.posted[now.kind].popleft(),)))

    def _asked_for(self, place: int, kind: Kind) -> tuple[Pass, ...]:
        """The message whose receipt is posted after this rank's pass number `place` of its kind."""
        schedule = self.schedule
        last = schedule.pipeline_size - 1
        closes_ring = self.rank == (0 if kind == "forward" else last)
        if not closes_ring:
            following = schedule.order(self.rank, kind)[place + 1 : place + 2]
            return schedule.message_to(following[0]) if following else ()
        if place < last:
            return ()
        other_end = schedule.order(last - self.rank, kind)[place - last]
        return schedule.message_from(other_end)
