"""Ranks of a cluster without the cluster: what one rank of a setting would hold and do, against what planning says.

The real model, schedule and optimizer run on tensors without data, in a world whose other ranks do not exist. Kernels
are those of a CPU: TransformerEngine's own tensors are not looked at.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.measure.memory_count import HeldMemory
from megatron_vl.measure.rank_step import RankStep, run_rank_step
from megatron_vl.measure.without_data import imagined_world
from megatron_vl.model.shapes import parameter_shapes
from megatron_vl.model.vlm import VisionLanguageModel, model_part
from megatron_vl.parallel.groups import Groups, build_groups, destroy_groups
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.memory import Execution, RankMemory, rank_memory
from megatron_vl.planning.parameters import unit_parameters
from megatron_vl.planning.passes import PART, chunk_units
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Workload

MEMORY_TOLERANCE = 0.05  # of what was counted


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """A rank that is as planned. Bytes are those of a CPU's kernels, which keep more than TransformerEngine's."""

    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    layers: tuple[tuple[int, ...], ...]  # by chunk, numbered from 1 over the whole model
    num_parameters: int
    held: HeldMemory
    peak_bytes: int  # counted
    predicted: RankMemory


def verify_rank(
    model: ModelConfig, workload: Workload, setting: Setting, precision: str, rank: int
) -> RankReport:
    """Build `rank` of the setting's world and run a multimodal step, of no more microbatches than are kept at once.

    To be called in a process that has joined no process group.

    Raises:
        UserError: there is no such rank.
        RuntimeError: parameters, layers, groups, shapes or memory are not as planned; the message lists all that.
    """
    topology = setting.topology
    if not 0 <= rank < topology.world_size:
        raise UserError(f"rank {rank}: this world has the ranks 0 to {topology.world_size - 1}")
    per_slot = topology.data_size * setting.micro_batch_size
    num_microbatches = _enough_microbatches(workload.global_batch_size // per_slot, topology)
    workload = replace(  # rows of one segment each, as `run_rank_step` makes them
        workload, global_batch_size=num_microbatches * per_slot, segment_tokens=workload.sequence_length
    )
    with imagined_world(rank, topology.world_size):
        groups = build_groups(topology, seed=0, device=torch.device("cpu"))
        try:
            step = run_rank_step(model, workload, setting, precision, num_microbatches, groups)
            execution = Execution(precision=precision, fused=False)
            predicted = rank_memory(model, workload, setting, groups.pipeline_rank, execution)
            differences = [
                *_whole_model(model, setting),
                *_parameters(step, model, setting, groups),
                *_layers(step, setting, groups),
                *_groups(rank, groups),
                *_shapes(step, model, workload, setting),
                *_memory(step, predicted),
            ]
        finally:
            destroy_groups()
    if differences:
        raise RuntimeError(
            f"rank {rank} of {topology.world_size} is not as planned: {'; '.join(differences)}"
        )
    return RankReport(
        rank=rank,
        tensor_rank=groups.tensor_rank,
        pipeline_rank=groups.pipeline_rank,
        data_rank=groups.data_rank,
        layers=tuple(_layer_numbers(module) for module in step.modules),
        num_parameters=sum(_counted_parts(step).values()),
        held=step.held,
        peak_bytes=step.peak_bytes,
        predicted=predicted,
    )


def _enough_microbatches(num_microbatches: int, topology: Topology) -> int:
    """To keep as many at once as in the whole step."""
    pipeline_size = topology.pipeline_size
    if topology.virtual_size == 1:
        return min(num_microbatches, pipeline_size + 1)
    if num_microbatches % pipeline_size:
        return num_microbatches  # others would be interleaved in other groups
    return min(num_microbatches, 3 * pipeline_size)


def _whole_model(model: ModelConfig, setting: Setting) -> Iterator[str]:
    """All pipeline ranks together hold the model."""
    planned = sum(sum(_planned_parts(chunk, model, 1).values()) for chunk in parse_layout(setting.layout))
    whole = sum(shape.numel() for shape in parameter_shapes(model).values())
    if planned != whole:
        yield f"the layout's chunks hold {planned:,} parameters, the model has {whole:,}"


def _parameters(step: RankStep, model: ModelConfig, setting: Setting, groups: Groups) -> Iterator[str]:
    topology = setting.topology
    planned: dict[str, int] = {}
    for chunk in parse_layout(setting.layout)[groups.pipeline_rank :: topology.pipeline_size]:
        for part, count in _planned_parts(chunk, model, topology.tensor_size).items():
            planned[part] = planned.get(part, 0) + count
    counted = _counted_parts(step)
    for part in sorted(planned.keys() | counted.keys()):
        if planned.get(part, 0) != counted.get(part, 0):
            yield f"{counted.get(part, 0):,} parameters of part {part}, planned {planned.get(part, 0):,}"


def _planned_parts(chunk: str, model: ModelConfig, tensor_size: int) -> dict[str, int]:
    each = unit_parameters(model, tensor_size)
    parts: dict[str, int] = {}
    for unit, number in chunk_units(chunk, model).items():
        if unit in each:
            parts[PART[unit]] = parts.get(PART[unit], 0) + number * each[unit]
    return parts


def _counted_parts(step: RankStep) -> dict[str, int]:
    parts: dict[str, int] = {}
    for module in step.modules:
        for name, parameter in module.named_parameters():
            part = model_part(name)
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def _layers(step: RankStep, setting: Setting, groups: Groups) -> Iterator[str]:
    chunks = parse_layout(setting.layout)
    for place, module in enumerate(step.modules):
        number = place * setting.topology.pipeline_size + groups.pipeline_rank
        first = 1 + "".join(chunks[:number]).count("t")
        planned = tuple(range(first, first + chunks[number].count("t")))
        if _layer_numbers(module) != planned:
            yield f"chunk {number} holds layers {_layer_numbers(module)}, planned {planned}"
        ends = {"stage zero": (module.pre_process, "E"), "the head": (module.post_process, "L")}
        for name, (has, letter) in ends.items():
            if has != (letter in chunks[number]):
                yield f"chunk {number} {'holds' if has else 'lacks'} {name}"


def _layer_numbers(module: VisionLanguageModel) -> tuple[int, ...]:
    return tuple(layer.layer_number for layer in module.language.block.layers)


def _groups(rank: int, groups: Groups) -> Iterator[str]:
    """Ranks count tensor parallel first, then data parallel, then pipeline."""
    collection = groups.collection
    counted = {
        "tensor": dist.get_process_group_ranks(collection.tp),
        "data": dist.get_process_group_ranks(collection.dp),
        "pipeline": dist.get_process_group_ranks(collection.pp),
        "model": dist.get_process_group_ranks(collection.mp),
    }
    for name, planned in planned_groups(groups.topology, rank).items():
        if counted[name] != planned:
            yield f"its {name}-parallel group is {counted[name]}, planned {planned}"


def planned_groups(topology: Topology, rank: int) -> dict[str, list[int]]:
    """The ranks of each of the groups that `rank` is in, in order."""
    tensor_size, data_size = topology.tensor_size, topology.data_size
    tensor, data = rank % tensor_size, rank // tensor_size % data_size
    pipeline = rank // (tensor_size * data_size)

    def ranks(tensors: range, datas: range, pipelines: range) -> list[int]:
        return [t + tensor_size * (d + data_size * p) for p in pipelines for d in datas for t in tensors]

    own_tensor, own_data, own_pipeline = (range(one, one + 1) for one in (tensor, data, pipeline))
    tensors, stages = range(tensor_size), range(topology.pipeline_size)
    return {
        "tensor": ranks(tensors, own_data, own_pipeline),
        "data": ranks(own_tensor, range(data_size), own_pipeline),
        "pipeline": ranks(own_tensor, own_data, stages),
        "model": ranks(tensors, own_data, stages),
    }


def _shapes(step: RankStep, model: ModelConfig, workload: Workload, setting: Setting) -> Iterator[str]:
    num_tokens = setting.micro_batch_size * workload.sequence_length
    local = num_tokens // setting.topology.tensor_size if setting.sequence_parallel else num_tokens
    for module, shapes in zip(step.modules, step.output_shapes, strict=True):
        planned = (1, num_tokens) if module.post_process else (local, 1, model.language.hidden_size)
        if shapes != {planned}:
            yield f"a chunk gave {sorted(shapes)}, planned {planned}"


def _memory(step: RankStep, predicted: RankMemory) -> Iterator[str]:
    for kind in ("parameters", "gradients", "optimizer"):
        yield from _far(kind, getattr(predicted, kind), getattr(step.held, kind))
    yield from _far("memory at its peak", predicted.total, step.peak_bytes)


def _far(kind: str, predicted: int, counted: int) -> Iterator[str]:
    if abs(predicted - counted) > MEMORY_TOLERANCE * counted:
        yield f"{kind}: {counted / 1e9:.3f} GB counted, {predicted / 1e9:.3f} GB planned"
