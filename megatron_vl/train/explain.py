"""What a rank can say of a failure that its exception does not: where it was, and what was to be expected."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist

from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.machine import Device
from megatron_vl.device.trail import TRAIL
from megatron_vl.planning.memory import RankMemory, rank_memory
from megatron_vl.train.division import stage_problem, stage_setting
from megatron_vl.train.settings import StageSettings

# How the allocator of CPU tensors begins its RuntimeError, in torch's c10/core/alignment and c10/core/impl/alloc_cpu.
_CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_GIB = 1 << 30


class CorruptionError(RuntimeError):
    """Memory or arithmetic of some rank has failed without a sign; the same start on other hosts goes on."""


@contextmanager
def out_of_memory_explained(
    config: PretrainConfig, stage: StageSettings, pipeline_rank: int, device: Device
) -> Iterator[None]:
    """Turns any kind of running out of memory into a UserError that says where, and what planning expects here."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        forecast = _forecast(config, stage, pipeline_rank)
        parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in asdict(forecast).items() if size)
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"rank {dist.get_rank()} (pipeline stage {pipeline_rank} of {stage.topology.pipeline_size}, "
            f"{socket.gethostname()}) ran out of memory at {TRAIL}: {reason} Its peak is "
            f"{device.peak_memory_bytes() / _GIB:.2f} GiB; the memory model expects {forecast.total / _GIB:.2f} GiB "
            f"({parts}) beside what the device itself takes. Lower stage.{stage.name}.micro_batch_size, "
            "sequence_length or data.max_images_per_pack, set recompute.language, or ask launch.plan for a division "
            "that fits"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return named or any(words in str(error) for words in _CPU_ALLOCATOR)


def _forecast(config: PretrainConfig, stage: StageSettings, pipeline_rank: int) -> RankMemory:
    problem = stage_problem(config, stage.name, stage.values)
    setting = stage_setting(config, stage.values, stage.parallel, stage.topology, stage.layout)
    return rank_memory(config.model, problem.workload, setting, pipeline_rank, problem.execution)


def corruption(stage: str, step: int, ranks: list[int]) -> CorruptionError:
    """Names the ranks and their hosts. Collective over the world."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks)
    return CorruptionError(
        f"silent corruption, found in stage {stage}, step {step}: the parameters of {named} are not those of their "
        "replicas, or of their own main parameters. The step is not done; exclude these hosts and start again, which "
        "goes on from the newest checkpoint"
    )
