"""What a stage would take under one setting: seconds, bubble, share of the devices' arithmetic, memory, days."""

from dataclasses import dataclass

import numpy as np

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.memory import Execution, peak_bytes
from megatron_vl.planning.passes import backward, chunk_units, encoder_units, passes
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.steps import Split, StepKind, Steps
from megatron_vl.planning.workload import Load, Workload

DAY_SECONDS = 86400


@dataclass(frozen=True, kw_only=True)
class StepForecast:
    """One kind of step; `share` of the stage's steps."""

    share: float
    seconds: float
    bubble_fraction: float  # of the pipeline, between its first pass and its last


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Simulated. Means are over the stage's text-only and multimodal steps. `mfu` counts the decoder and the head three
    times forward, `mfu_with_vision` also what the towers and the adaptor compute once, without recompute."""

    setting: Setting
    steps: dict[str, StepForecast]  # by kind: text, multimodal
    step_seconds: float
    bubble_fraction: float
    mfu: float
    mfu_with_vision: float
    peak_memory_bytes: int
    days: float


def split_of(layout: str) -> Split:
    """[num_chunks, 1]."""
    return np.array([[chunk.count("t")] for chunk in parse_layout(layout)])


def forecast(steps: Steps, setting: Setting, execution: Execution) -> Forecast:
    """Of `setting`, which is that of `steps` with a layout."""
    cluster, workload = steps.cluster, steps.workload
    kinds = {kind.name: _step(steps, kind, split_of(setting.layout)) for kind in steps.kinds}
    seconds = sum(kind.share * kind.seconds for kind in kinds.values())
    idle = sum(kind.share * kind.seconds * kind.bubble_fraction for kind in kinds.values())
    language, vision = useful_flops(steps.model, workload)
    available = seconds * setting.topology.world_size * _peak_flops(cluster, execution)
    return Forecast(
        setting=setting,
        steps=kinds,
        step_seconds=seconds,
        bubble_fraction=idle / seconds,
        mfu=language / available,
        mfu_with_vision=(language + vision) / available,
        peak_memory_bytes=peak_bytes(steps.model, workload, setting, execution),
        days=seconds * workload.num_steps / DAY_SECONDS,
    )


def _step(steps: Steps, kind: StepKind, split: Split) -> StepForecast:
    replayed = steps.of_kind(kind, split)
    return StepForecast(
        share=kind.share,
        seconds=float(replayed.seconds[0]),
        bubble_fraction=float(replayed.pipeline.bubble_fraction[0]),
    )


def useful_flops(model: ModelConfig, workload: Workload) -> tuple[float, float]:
    """Of all ranks in a mean step: decoder and head, by the usual count (3 x forward, a row one causal segment,
    whatever trains); and vision, as far as it must be computed."""
    costs = CostModel(model=model)
    tokens = workload.tokens_per_row
    row = Load(num_tokens=tokens, num_images=0.0, num_pairs=tokens**2 / 2)
    layers = model.language.num_layers * costs.unit("decoder_layer", row).forward.flops
    language = 3 * (layers + costs.unit("head", row).forward.flops)
    image = Load(num_tokens=0.0, num_images=1.0, num_pairs=0.0)
    vision = 0.0
    for name, count in _vision_units(model).items():
        work = costs.unit(name, image)
        vision += count * (work.forward + backward(work, passes(name, workload.trained))).flops
    images = workload.images_per_row * (1 - workload.text_ratio)
    return workload.global_batch_size * language, workload.global_batch_size * images * vision


def _vision_units(model: ModelConfig) -> dict[str, int]:
    """Of stage zero, without the text embedding."""
    if not encoder_units(model):
        return {}
    return {name: count for name, count in chunk_units("E", model).items() if name != "embedding"}


def _peak_flops(cluster: ClusterConfig, execution: Execution) -> float:
    return cluster.peak_flops if execution.precision == "bf16" else cluster.peak_flops_fp32
