"""Bytes that a rank needs: parameters, gradients, optimizer, and activations at the worst moment of its schedule.

What CUDA adds (its context, NCCL's buffers, fragmentation) is not in here.
"""

from dataclasses import dataclass, fields

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.activations import FP32, Activations
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.parameters import unit_parameters
from megatron_vl.planning.passes import PART, chunk_units
from megatron_vl.planning.schedule import Pass, Schedule
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.vision_memory import VisionActivations
from megatron_vl.planning.workload import Workload

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}  # by train.precision
MOMENT_BYTES = 2 * FP32  # Adam's two means


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank, by kind, at its worst moment."""

    parameters: int
    gradients: int  # fp32 buffers of what trains
    optimizer: int  # this data-parallel rank's shard
    activations: int  # kept for backward passes to come
    working: int  # of the pass that runs at that moment
    pipeline: int  # gradients that are being exchanged
    features: int  # of the whole step's images, encoded before the pipeline begins

    @property
    def total(self) -> int:
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How ranks compute. `fused`: TransformerEngine with flash attention, as on CUDA."""

    precision: str = "bf16"
    fused: bool = True


def peak_bytes(
    model: ModelConfig, workload: Workload, setting: Setting, execution: Execution = Execution()
) -> int:
    """The most that any rank needs."""
    return max(
        rank_memory(model, workload, setting, rank, execution).total
        for rank in range(setting.topology.pipeline_size)
    )


def rank_memory(
    model: ModelConfig,
    workload: Workload,
    setting: Setting,
    pipeline_rank: int,
    execution: Execution = Execution(),
) -> RankMemory:
    """Of a rank at `pipeline_rank`, with `max_images_per_row` images in every row."""
    topology = setting.topology
    element_bytes = ELEMENT_BYTES[execution.precision]
    chunks = parse_layout(setting.layout)[pipeline_rank :: topology.pipeline_size]
    num_parameters, num_trained = _parameters(chunks, model, topology.tensor_size, workload.trained)
    main_bytes = (
        0 if execution.precision == "fp32" else FP32
    )  # in fp32 parameters are their own main parameters

    language = Activations(
        language=model.language,
        num_tokens=setting.micro_batch_size * workload.sequence_length,
        tensor_size=topology.tensor_size,
        sequence_parallel=setting.sequence_parallel,
        element_bytes=element_bytes,
        fused=execution.fused,
        trained=workload.trained,
        recompute=setting.recompute,
    )
    vision = VisionActivations(
        model=model,
        trained=workload.trained,
        num_images=setting.micro_batch_size * workload.max_images_per_row,
        element_bytes=element_bytes,
        recompute=setting.recompute_vision,
    )
    num_microbatches = workload.global_batch_size // (topology.data_size * setting.micro_batch_size)
    passes = _passes(topology, pipeline_rank, num_microbatches)
    activations, working = _worst_moment(chunks, language, vision, passes, topology.pipeline_size)
    return RankMemory(
        parameters=num_parameters * element_bytes,
        gradients=num_trained * FP32,
        optimizer=num_trained * (MOMENT_BYTES + main_bytes) // topology.data_size,
        activations=activations,
        working=working,
        pipeline=2 * language.hidden if topology.pipeline_size > 1 else 0,
        features=0,
    )


def _worst_moment(
    chunks: list[str],
    language: Activations,
    vision: VisionActivations,
    passes: list[Pass],
    pipeline_size: int,
) -> tuple[int, int]:
    """What is kept, and what is needed besides, when both together are the most."""
    kept = [_kept(chunk, language, vision, pipeline_size > 1) for chunk in chunks]
    forward = [_forward(chunk, vision) for chunk in chunks]
    backward = [_backward(chunk, language, vision) for chunk in chunks]
    held, moments = 0, [(0, 0)]
    for step in passes:
        place = step.chunk // pipeline_size
        if step.kind == "forward":
            moments.append((held, forward[place]))
            held += kept[place]
        else:
            moments.append((held, backward[place]))
            held -= kept[place]
    return max(moments, key=sum)


def _kept(chunk: str, language: Activations, vision: VisionActivations, is_pipelined: bool) -> int:
    """By one microbatch, from a chunk's forward to its backward pass."""
    layers = chunk.count("t") * language.layer + (language.exchanged if is_pipelined else 0)
    return layers + (vision.kept if "E" in chunk else 0) + (language.head if "L" in chunk else 0)


def _forward(chunk: str, vision: VisionActivations) -> int:
    """What a chunk's forward pass takes beside what it keeps: little, but for the encoders."""
    return vision.forward if "E" in chunk else 0


def _backward(chunk: str, language: Activations, vision: VisionActivations) -> int:
    """What a chunk's backward pass takes at most beside all that is kept, which it frees from the head on."""
    freed, moments = 0, [0]
    if "L" in chunk:
        moments.append(language.head_backward)
        freed += language.head
    if "t" in chunk:
        moments.append(language.layer_backward - freed)
        freed += chunk.count("t") * language.layer
    if "E" in chunk:
        moments.append(language.embedding_backward + vision.backward - freed)
    return max(moments)


def _passes(topology: Topology, pipeline_rank: int, num_microbatches: int) -> list[Pass]:
    """Those of a rank, in order. What repeats itself in the middle of a long step is left out."""
    schedule = Schedule(
        pipeline_size=topology.pipeline_size,
        virtual_size=topology.virtual_size,
        num_microbatches=min(num_microbatches, 4 * topology.pipeline_size),
    )
    return schedule.passes(pipeline_rank)


def _parameters(
    chunks: list[str], model: ModelConfig, tensor_size: int, trained: frozenset[str]
) -> tuple[int, int]:
    """How many a rank holds, and how many of these train."""
    each = unit_parameters(model, tensor_size)
    counts = [
        (PART[unit] in trained, number * each[unit])
        for chunk in chunks
        for unit, number in chunk_units(chunk, model).items()
        if unit in each
    ]
    return sum(count for _, count in counts), sum(count for trains, count in counts if trains)
