"""Process groups of one stage's parallel grid, made and unmade as a whole."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.planning.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's groups and place. `control` joins the model-parallel ranks of one replica on the host."""

    topology: Topology
    collection: ProcessGroupCollection
    control: dist.ProcessGroup
    device: torch.device
    data_rank: int
    pipeline_rank: int
    tensor_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.topology.pipeline_size - 1


def build_groups(topology: Topology, seed: int, device: torch.device) -> Groups:
    """Create the process groups. Collective: every rank of the world calls it with the same topology."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.pipeline_size,
        virtual_pipeline_model_parallel_size=topology.virtual_size if topology.virtual_size > 1 else None,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        topology=topology,
        collection=collection,
        control=_control_group(topology) if device.type == "cuda" else collection.mp,
        device=device,
        data_rank=collection.dp.rank(),
        pipeline_rank=collection.pp.rank(),
        tensor_rank=collection.tp.rank(),
    )


def _control_group(topology: Topology) -> dist.ProcessGroup:
    """A gloo twin of this rank's model-parallel group, for small host-side messages beside NCCL."""
    mine = dist.get_process_group_ranks(parallel_state.get_model_parallel_group())
    everyone: list[list[int]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(everyone, mine)
    replicas = dict.fromkeys(map(tuple, everyone))
    groups = {ranks: dist.new_group(list(ranks), backend="gloo") for ranks in replicas}
    group: dist.ProcessGroup = groups[tuple(mine)]
    return group


def destroy_groups() -> None:
    """Unmake what `build_groups` made, so that another stage can use other sizes."""
    parallel_state.destroy_model_parallel()
