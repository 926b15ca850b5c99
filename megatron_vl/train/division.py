"""How a stage is divided over ranks: checked where the configuration says it, planned where it says layout=auto."""

from megatron_vl.config.cluster import check_cluster
from megatron_vl.config.model_check import tokens_per_image
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.config.root import PretrainConfig
from megatron_vl.config.train import StageConfig
from megatron_vl.planning.candidate import Problem
from megatron_vl.planning.layout import even_layout, resolve_layout
from megatron_vl.planning.memory import Execution
from megatron_vl.planning.search import auto_layout
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import stage_workload

AUTO = "auto"


def stage_layout(
    config: PretrainConfig, name: str, values: StageConfig, parallel: ParallelConfig, topology: Topology
) -> str:
    """The layout of stage `name`. Without a pipeline there is nothing to plan.

    Raises:
        UserError: the layers do not divide so, or no layout fits into the memory of config.cluster's devices.
    """
    num_layers = config.model.language.num_layers
    if parallel.layout != AUTO:
        return resolve_layout(parallel.layout, num_layers, topology)
    if topology.pipeline_size == 1:
        return even_layout(num_layers, topology)
    check_cluster(config.cluster)
    return auto_layout(stage_problem(config, name, values), stage_setting(config, values, parallel, topology))


def stage_problem(config: PretrainConfig, name: str, values: StageConfig) -> Problem:
    """What planning knows of stage `name`."""
    room = values.sequence_length // tokens_per_image(config.model)
    return Problem(
        model=config.model,
        workload=stage_workload(name, values, min(config.data.max_images_per_pack, room)),
        cluster=config.cluster,
        execution=Execution(
            precision=config.train.precision,
            fused=config.cluster.device_type == "cuda" and config.parallel.transformer_engine,
        ),
    )


def stage_setting(
    config: PretrainConfig,
    values: StageConfig,
    parallel: ParallelConfig,
    topology: Topology,
    layout: str = "",
) -> Setting:
    """A stage's choices as planning calls them."""
    return Setting(
        topology=topology,
        layout=layout,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=values.micro_batch_size,
        recompute=config.recompute.language,
        recompute_vision=config.recompute.vision,
        vision_placement=parallel.vision_placement,
    )
