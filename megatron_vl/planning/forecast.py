"""What a stage would take under one setting: seconds, bubble, share of the devices' arithmetic, memory, days."""

from dataclasses import dataclass

import numpy as np

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.memory import Execution, peak_bytes
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.steps import Split, StepKind, Steps
from megatron_vl.planning.useful import useful_flops
from megatron_vl.planning.workload import Workload

DAY_SECONDS = 86400


@dataclass(frozen=True, kw_only=True)
class StepForecast:
    """One kind of step; `share` of the stage's steps."""

    share: float
    seconds: float
    bubble_fraction: float  # of the pipeline, between its first pass and its last


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Simulated. Means are over the stage's text-only and multimodal steps. `mfu` counts the decoder and the head,
    `mfu_with_vision` the towers and the adaptor too (`planning.useful`)."""

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
    language, vision = mean_flops(steps.model, workload)
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


def mean_flops(model: ModelConfig, workload: Workload) -> tuple[float, float]:
    """Of all ranks in a mean step: decoder and head, a row one causal segment; and vision."""
    flops, tokens = useful_flops(model, workload.trained), workload.tokens_per_row
    images = workload.images_per_row * (1 - workload.text_ratio)
    rows = workload.global_batch_size
    return rows * flops.language(tokens, tokens**2 / 2), rows * flops.vision(images)


def _peak_flops(cluster: ClusterConfig, execution: Execution) -> float:
    return cluster.peak_flops if execution.precision == "bf16" else cluster.peak_flops_fp32
