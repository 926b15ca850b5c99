"""From the configuration to what each stage will really do, checked before anything is started."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_vl.config.data import MAX_PREFETCH_STEPS, ON_BAD_SAMPLE, ON_CHANGE
from megatron_vl.config.errors import UserError
from megatron_vl.config.faults import check_faults
from megatron_vl.config.model_check import check_model
from megatron_vl.config.node_check import check_limits
from megatron_vl.config.parallel import RECOMPUTE, VISION_PLACEMENTS, ParallelConfig
from megatron_vl.config.root import STAGE_NAMES, PretrainConfig
from megatron_vl.config.train import (
    OPTIMIZER_SHARDINGS,
    PARTS,
    PRECISIONS,
    SCHEDULES,
    TRACKING_MODES,
    ProfileConfig,
    StageConfig,
)
from megatron_vl.planning.layout import grid_of
from megatron_vl.planning.topology import Topology, check_batch_sizes
from megatron_vl.train.division import stage_layout


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of this run: its values after the overrides in `train`, and its division over ranks."""

    name: str
    values: StageConfig
    parallel: ParallelConfig
    topology: Topology
    layout: str
    first_global_step: int  # of the run; steps of earlier stages come before it


def resolve_stages(config: PretrainConfig, world_size: int) -> list[StageSettings]:
    """Check the whole configuration and settle every stage of the run, in order.

    Raises:
        UserError: naming the field, its value and what would be right.
    """
    check_choices(config)
    check_model(config.model)
    stages: list[StageSettings] = []
    first = 1
    for name in config.stages:
        stage = _resolve_stage(config, name, world_size, first)
        stages.append(stage)
        first += stage.values.steps
    return stages


def required_processes(config: PretrainConfig) -> int:
    """The smallest world that every selected stage fits: the largest tensor x pipeline size."""
    sizes = [stage_parallel(config, name) for name in config.stages]
    return max(parallel.tensor_size * parallel.pipeline_size for parallel in sizes)


def stage_parallel(config: PretrainConfig, name: str) -> ParallelConfig:
    """The run's parallel settings with the stage's own on top.

    Raises:
        UserError: the stage overrides a field that does not exist, or a stage name is unknown.
    """
    if name not in STAGE_NAMES:
        raise UserError(f"stages={config.stages}: unknown stage {name!r}; known are {', '.join(STAGE_NAMES)}")
    overrides: dict[str, Any] = getattr(config.stage, name).parallel
    known = asdict(config.parallel)
    for field in overrides:
        if field not in known:
            raise UserError(f"stage.{name}.parallel.{field}: unknown field; known are {', '.join(known)}")
    return replace(config.parallel, **overrides)


def _resolve_stage(config: PretrainConfig, name: str, world_size: int, first: int) -> StageSettings:
    values = stage_values(config, name)
    parallel = stage_parallel(config, name)
    if parallel.fp8 and not parallel.transformer_engine:
        raise UserError(
            f"parallel.fp8=true in stage {name}: needs parallel.transformer_engine=true, and GPUs"
        )
    topology = grid_of(config.model.language, parallel, world_size)
    _check_placement(parallel.vision_placement, topology, name)
    check_batch_sizes(values.global_batch_size, values.micro_batch_size, topology, name)
    if parallel.sequence_parallel and values.sequence_length % parallel.tensor_size:
        raise UserError(
            f"stage.{name}.sequence_length={values.sequence_length} must be a multiple of "
            f"parallel.tensor_size={parallel.tensor_size} under parallel.sequence_parallel=true"
        )
    return StageSettings(
        name=name,
        values=values,
        parallel=parallel,
        topology=topology,
        layout=stage_layout(config, name, values, parallel, topology),
        first_global_step=first,
    )


def stage_values(config: PretrainConfig, name: str) -> StageConfig:
    """The stage's values with the overrides in `train`, checked."""
    train = config.train
    overrides = {
        "steps": train.steps,
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
    }
    given: dict[str, Any] = {field: value for field, value in overrides.items() if value is not None}
    values: StageConfig = replace(getattr(config.stage, name), **given)
    _check_stage(config, name, values)
    return values


def check_choices(config: PretrainConfig) -> None:
    """What no stage changes. Raises UserError for a value that is none of those which a field knows."""
    for name in config.stages:
        one_of("stages", name, STAGE_NAMES)
    if not config.stages or len(set(config.stages)) != len(config.stages):
        raise UserError(f"stages={config.stages}: name each stage once, of {', '.join(STAGE_NAMES)}")
    one_of("train.precision", config.train.precision, PRECISIONS)
    one_of("recompute.language", config.recompute.language, RECOMPUTE)
    one_of("tracking.wandb", config.tracking.wandb, TRACKING_MODES)
    _check_profile(config.tracking.profile)
    one_of("data.on_bad_sample", config.data.on_bad_sample, ON_BAD_SAMPLE)
    one_of("data.on_change", config.data.on_change, ON_CHANGE)
    one_of("checkpoint.optimizer_sharding", config.checkpoint.optimizer_sharding, OPTIMIZER_SHARDINGS)
    check_faults(config.train.faults)
    check_limits(config.node_check)
    for field, value in (
        ("train.stop_at", config.train.stop_at),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep", config.checkpoint.keep),
        ("checkpoint.keep_every", config.checkpoint.keep_every),
        ("run.num_processes", config.run.num_processes),
        ("data.lanes", config.data.lanes),
    ):
        if value is not None and value < 1:
            raise UserError(f"{field}={value}: must be at least 1")
    if not 1 <= config.data.prefetch_steps <= MAX_PREFETCH_STEPS:
        raise UserError(
            f"data.prefetch_steps={config.data.prefetch_steps}: must be 1 to {MAX_PREFETCH_STEPS}"
        )
    if config.data.workers < 0:
        raise UserError(f"data.workers={config.data.workers}: must be at least 0")
    for field, ratio in (
        ("data.text_ratio", config.data.text_ratio),
        ("data.warmup_fraction", config.data.warmup_fraction),
    ):
        _fraction(field, ratio)


def _check_profile(profile: ProfileConfig) -> None:
    steps = profile.steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(
            f"tracking.profile.steps={steps}: must be [FIRST,LAST], global steps from 1 on, or [] for no profile"
        )
    if any(rank < 0 for rank in profile.ranks):
        raise UserError(f"tracking.profile.ranks={profile.ranks}: ranks count from 0")


def _check_stage(config: PretrainConfig, name: str, values: StageConfig) -> None:
    prefix = f"stage.{name}"
    for part in values.train:
        one_of(f"{prefix}.train", part, PARTS)
    if not values.train:
        raise UserError(f"{prefix}.train is empty: list what the stage trains, of {', '.join(PARTS)}")
    one_of(f"{prefix}.schedule", values.schedule, SCHEDULES)
    if values.steps < 1:
        raise UserError(f"train.steps={values.steps} in stage {name}: must be at least 1")
    if values.learning_rate <= 0:
        raise UserError(f"{prefix}.learning_rate={values.learning_rate}: must be above 0")
    if not 1 <= values.sequence_length <= config.model.language.max_positions:
        raise UserError(
            f"{prefix}.sequence_length={values.sequence_length}: must be 1 to "
            f"model.language.max_positions={config.model.language.max_positions}"
        )
    for field in ("text_ratio", "text_warmup_fraction", "warmup_fraction", "min_learning_rate_ratio"):
        _fraction(f"{prefix}.{field}", getattr(values, field))
    if len(values.decay_boundaries) != len(values.decay_factors):
        raise UserError(
            f"{prefix}.decay_boundaries={values.decay_boundaries} and decay_factors={values.decay_factors} "
            "must have the same length"
        )


def _check_placement(placement: str, topology: Topology, stage_name: str) -> None:
    one_of("parallel.vision_placement", placement, VISION_PLACEMENTS)
    sharers = {"split": topology.tensor_size, "spread": topology.model_size}
    if sharers.get(placement, 2) < 2:
        size = "parallel.tensor_size" if placement == "split" else "parallel.tensor_size x pipeline_size"
        raise UserError(
            f"parallel.vision_placement={placement} in stage {stage_name} needs {size} of at least 2, which is 1: "
            "there is no other rank to share images with; use replicated"
        )


def one_of(field: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is valid."""
    if value not in valid:
        raise UserError(f"{field}={value}: must be one of {', '.join(valid)}")


def _fraction(field: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{field}={value}: must be from 0 to 1")
