"""Bytes that a rank needs: parameters, gradients, optimizer, and activations at the worst moment of its schedule.

What a device adds (CUDA's context, NCCL's buffers, fragmentation) is not in here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.activations import FP32, Activations
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.parameters import unit_parameters
from megatron_vl.planning.passes import PART, chunk_units
from megatron_vl.planning.schedule import Pass, Schedule, smallest_group
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.vision_memory import VisionActivations
from megatron_vl.planning.workload import Workload

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}  # by train.precision
ADAM_BYTES = 2 * FP32  # two means of every parameter that trains
MAIN_BYTES = {"fp32": 0, "bf16": FP32}  # fp32 parameters are their own main parameters


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank, by kind, at its worst moment."""

    parameters: int
    gradients: int  # fp32 buffers of what trains
    optimizer: int  # this data-parallel rank's shard
    activations: int  # kept for backward passes to come
    working: int  # of what runs at that moment
    communication: int  # gradients on their way between stages, what sequence parallelism gathers
    features: int  # with vision_placement=spread: of the whole step's images, and these while they are needed

    @property
    def total(self) -> int:
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How ranks compute. `fused`: TransformerEngine with flash attention, as on CUDA; otherwise as on a CPU."""

    precision: str = "bf16"  # of ELEMENT_BYTES
    fused: bool = True


CUDA_BF16 = Execution()


def peak_bytes(
    model: ModelConfig, workload: Workload, setting: Setting, execution: Execution = CUDA_BF16
) -> int:
    """The most that any rank needs.

    Raises:
        UserError: megatron-core does not interleave this number of microbatches.
    """
    ranks = range(setting.topology.pipeline_size)
    return max(rank_memory(model, workload, setting, rank, execution).total for rank in ranks)


def rank_memory(
    model: ModelConfig,
    workload: Workload,
    setting: Setting,
    pipeline_rank: int,
    execution: Execution = CUDA_BF16,
) -> RankMemory:
    """Of a rank at `pipeline_rank`, in a step of which every row holds `max_images_per_row` images.

    Raises:
        UserError: as `peak_bytes`.
    """
    topology, precision = setting.topology, execution.precision
    chunks = parse_layout(setting.layout)[pipeline_rank :: topology.pipeline_size]
    num_parameters, num_trained = _count_parameters(chunks, model, topology.tensor_size, workload.trained)
    activations = _RankActivations(
        chunks=chunks,
        language=_language(model, workload, setting, execution),
        vision=_vision(model, workload, setting, execution),
        pipeline_size=topology.pipeline_size,
    )
    is_first = "E" in chunks[0]
    copied, copied_gradients = (0, 0) if is_first else activations.vision.copied_encoders()
    schedule = _schedule(topology, _num_microbatches(workload, setting))
    kept, working, communication = activations.worst_moment(schedule.passes(pipeline_rank))
    return RankMemory(
        parameters=num_parameters * ELEMENT_BYTES[precision] + copied,
        gradients=num_trained * FP32 + copied_gradients,
        optimizer=num_trained * (ADAM_BYTES + MAIN_BYTES[precision]) // topology.data_size,
        activations=kept,
        working=working,
        communication=communication,
        features=activations.vision.step_images + (activations.vision.step_features if is_first else 0),
    )


@dataclass(frozen=True, kw_only=True)
class _RankActivations:
    """Activations of all microbatches on one rank; `chunks` are its own, as E, t and L."""

    chunks: list[str]
    language: Activations
    vision: VisionActivations
    pipeline_size: int

    def worst_moment(self, passes: list[Pass]) -> tuple[int, int, int]:
        """What is kept, what is needed besides, and what communication takes, when all together are the most."""
        gathered = self.language.gathered
        exchanged = 2 * self.language.hidden if self.pipeline_size > 1 else 0
        moments = [(kept, working, exchanged + gathered) for kept, working in self._moments(passes)]
        return max([(0, self._outside_passes(), gathered), *moments], key=sum)

    def _moments(self, passes: list[Pass]) -> Iterator[tuple[int, int]]:
        kept = 0
        for one in passes:
            chunk = self.chunks[one.chunk // self.pipeline_size]
            if one.kind == "forward":
                yield kept, self._forward(chunk)
                kept += self._kept(chunk)
            else:
                yield kept, self._backward(chunk)
                kept -= self._kept(chunk)

    def _outside_passes(self) -> int:
        """Before the pipeline begins, or when it has ended."""
        averaged = self.vision.averaged_gradients if "E" in self.chunks[0] else 0
        return max(self.vision.around_pipeline, averaged)

    def _kept(self, chunk: str) -> int:
        """By one microbatch, from a chunk's forward to its backward pass."""
        kept = chunk.count("t") * self.language.layer
        kept += self.vision.kept + self.language.embedded if "E" in chunk else self.language.received
        kept += self.language.head if "L" in chunk else self.language.sent
        return kept

    def _forward(self, chunk: str) -> int:
        """What a chunk's forward pass takes beside what it keeps: little, but for the encoders."""
        return self.vision.forward if "E" in chunk else 0

    def _backward(self, chunk: str) -> int:
        """What a chunk's backward pass takes at most beside all that is kept, which it frees from the head on."""
        freed, moments = 0, [0]
        if "L" in chunk:
            moments.append(self.language.head_backward)
            freed += self.language.head
        if "t" in chunk:
            moments.append(self.language.layer_backward - freed)
            freed += chunk.count("t") * self.language.layer
        if "E" in chunk:
            moments.append(self.language.embedding_backward + self.vision.backward - freed)
        return max(moments)


def _language(model: ModelConfig, workload: Workload, setting: Setting, execution: Execution) -> Activations:
    return Activations(
        language=model.language,
        num_tokens=setting.micro_batch_size * workload.sequence_length,
        tensor_size=setting.topology.tensor_size,
        sequence_parallel=setting.sequence_parallel,
        element_bytes=ELEMENT_BYTES[execution.precision],
        fused=execution.fused,
        trained=workload.trained,
        recompute=setting.recompute,
        joins_segments=workload.segment_tokens < workload.sequence_length,
    )


def _vision(
    model: ModelConfig, workload: Workload, setting: Setting, execution: Execution
) -> VisionActivations:
    num_images = setting.micro_batch_size * workload.max_images_per_row
    return VisionActivations(
        model=model,
        trained=workload.trained,
        num_images=num_images,
        num_step_images=num_images * _num_microbatches(workload, setting),
        placement=setting.vision_placement,
        tensor_size=setting.topology.tensor_size,
        model_size=setting.topology.model_size,
        element_bytes=ELEMENT_BYTES[execution.precision],
        fused=execution.fused,
        recompute=setting.recompute_vision,
    )


def _schedule(topology: Topology, num_microbatches: int) -> Schedule:
    """As long as it takes to keep the most; the middle of a long step repeats itself."""
    group_size = smallest_group(num_microbatches, topology.pipeline_size)
    return Schedule(
        pipeline_size=topology.pipeline_size,
        virtual_size=topology.virtual_size,
        num_microbatches=min(num_microbatches, 4 * group_size),
        group_size=group_size,
    )


def _num_microbatches(workload: Workload, setting: Setting) -> int:
    """Of one replica's step."""
    return workload.global_batch_size // (setting.topology.data_size * setting.micro_batch_size)


def _count_parameters(
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
