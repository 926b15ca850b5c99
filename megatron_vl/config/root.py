"""The root of the configuration and its registration with Hydra."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.data import DataConfig
from megatron_vl.config.evaluate import EvaluationConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.node_check import NodeCheckConfig
from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.config.train import (
    CheckpointConfig,
    HeldoutConfig,
    RunConfig,
    StageConfig,
    TrackingConfig,
    TrainConfig,
)

STAGE_NAMES = ("adaptor", "joint", "sft")


@dataclass(kw_only=True)
class StagesConfig:
    """The paper's three stages, in the order in which they are chained."""

    adaptor: StageConfig = field(default_factory=StageConfig)
    joint: StageConfig = field(default_factory=StageConfig)
    sft: StageConfig = field(default_factory=StageConfig)


@dataclass(kw_only=True)
class PretrainConfig:
    """Everything that `python -m launch.pretrain` reads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    # For planning: parallel.layout=auto, launch.plan.
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stages: list[str] = field(default_factory=lambda: list(STAGE_NAMES))
    stage: StagesConfig = field(default_factory=StagesConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    node_check: NodeCheckConfig = field(default_factory=NodeCheckConfig)


def register_schemas() -> None:
    """Put the schema where `hydra_conf/pretrain.yaml` names it in its defaults (`pretrain_schema`)."""
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)
