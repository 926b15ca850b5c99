"""What megatron-core's schedules really do: the passes that they make on this rank, one after another.

The model is a stand-in that multiplies by one and takes as long as it is told, so that only the schedule shows.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vl.parallel.groups import Groups
from megatron_vl.planning.schedule import Kind, Pass, Schedule
from megatron_vl.planning.simulate import Span

WIDTH = 8


@dataclass(kw_only=True)
class Recorder:
    """The passes of this rank so far, in seconds since `began`. `seconds` says how long a pass is to take."""

    seconds: Callable[[Pass], float]
    spans: list[Span] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def run(self, one: Pass) -> None:
        start = time.perf_counter()
        time.sleep(self.seconds(one))
        self.spans.append(
            Span(
                kind=one.kind,
                start=start - self.began,
                end=time.perf_counter() - self.began,
                microbatch=one.microbatch,
                chunk=one.chunk,
            )
        )


class _Recorded(torch.autograd.Function):
    """Times one; its forward and backward pass are recorded."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable[[Kind], None]) -> Tensor:
        ctx.run = run
        run("forward")
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.run("backward")
        return gradients[0], None


class _Chunk(torch.nn.Module):
    """A stand-in for pipeline chunk `number`."""

    model_type = ModelType.encoder_or_decoder  # the schedule asks for it

    def __init__(self, config: TransformerConfig, number: int, recorder: Recorder) -> None:
        super().__init__()
        self.config, self.number, self.recorder = config, number, recorder
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.received: Tensor | None = None

    def set_input_tensor(self, received: list[Tensor | None]) -> None:
        self.received = received[0]

    def forward(self, microbatch: int) -> Tensor:
        received = torch.zeros(1, 1, WIDTH) if self.received is None else self.received
        hidden: Tensor = _Recorded.apply(  # type: ignore[no-untyped-call]
            received * self.weight, partial(self._record, microbatch)
        )
        return hidden

    def _record(self, microbatch: int, kind: Kind) -> None:
        self.recorder.run(Pass(kind, self.number, microbatch))


def record_schedule(
    schedule: Schedule, groups: Groups, seconds: Callable[[Pass], float] = lambda one: 0.0
) -> list[Span]:
    """Run megatron-core's schedule once on the ranks of `groups`, whose topology is that of `schedule`.

    Collective over the pipeline group. Returns this rank's passes in the order in which they ran.
    """
    config = _config(schedule)
    recorder = Recorder(seconds=seconds)
    chunks = [
        _Chunk(config, number, recorder)
        for number in range(groups.pipeline_rank, schedule.num_chunks, schedule.pipeline_size)
    ]
    run = get_forward_backward_func(
        pp_size=schedule.pipeline_size, vp_size=config.virtual_pipeline_model_parallel_size
    )
    iterators: list[Iterator[int]] = [count() for _ in chunks]
    several = len(chunks) > 1
    dist.barrier()
    recorder.began = time.perf_counter()
    run(
        forward_step_func=_forward_step,
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=schedule.num_microbatches,
        seq_length=1,
        micro_batch_size=1,
    )
    return recorder.spans


def _forward_step(
    iterator: Iterator[int], chunk: _Chunk
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Any]]]]:
    return chunk(next(iterator)), lambda hidden: (hidden.sum(), {})


def _config(schedule: Schedule) -> TransformerConfig:
    """The communication that `model.transformer_config` asks for."""
    interleaved = schedule.virtual_size > 1
    return TransformerConfig(
        num_layers=schedule.num_chunks,
        hidden_size=WIDTH,
        num_attention_heads=1,
        pipeline_model_parallel_size=schedule.pipeline_size,
        virtual_pipeline_model_parallel_size=schedule.virtual_size if interleaved else None,
        microbatch_group_size_per_vp_stage=schedule.virtual_group,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=False,
        cuda_graph_scope=[],
    )
