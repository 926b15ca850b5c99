"""What `python -m launch.plan` reads."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from megatron_vl.config.root import PretrainConfig

OUTPUTS = ("table", "json")


@dataclass(kw_only=True)
class SearchConfig:
    """What planning may not choose: a value is kept, null is free."""

    tensor_size: int | None = None
    pipeline_size: int | None = None
    virtual_size: int | None = None
    micro_batch_size: int | None = None
    recompute: str | None = None  # of decoder layers: none, selective or full
    vision_placement: str | None = None
    layout: str | None = None


@dataclass(kw_only=True)
class PlanConfig(PretrainConfig):
    """What a run reads, and what to find out: the best settings for `cluster`, by default.

    `calibrate` times the model's units on this machine instead, at parallel.tensor_size, and adds them to the file
    cluster.calibration. `verify` builds `ranks` of the cluster for every stage, without the cluster.
    """

    search: SearchConfig = field(default_factory=SearchConfig)
    output: str = "table"  # of OUTPUTS; json: one object as the last line
    top: int = 10  # settings to show for each stage
    timeline: str | None = None  # a folder for each stage's simulated steps, as pictures and Chrome traces
    calibrate: bool = False
    rounds: int = 7  # of calibration
    verify: bool = False
    ranks: list[int] = field(default_factory=list)  # to verify; none: one of each pipeline stage


def register_plan_schema() -> None:
    """Put the schema where `hydra_conf/plan.yaml` names it in its defaults (`plan_schema`)."""
    ConfigStore.instance().store(name="plan_schema", node=PlanConfig)
