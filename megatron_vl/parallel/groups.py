"""Process groups of one stage's parallel grid, and small messages between the hosts of a replica."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vl.planning.topology import Topology


class HostMessages:
    """Small messages between the hosts of a group, for which no host waits for what its device computes.

    On CUDA they travel by NCCL, on a stream of their own: nothing else is queued there. A twin of the group on gloo
    would be one more mesh of connections.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def maximum(self, message: Tensor) -> Tensor:
        """Element by element, of all ranks' messages; they may be overwritten. On the host, as the result is."""
        with torch.cuda.stream(self._stream):  # None: does nothing
            there = message.to(self._device)
            dist.all_reduce(there, op=dist.ReduceOp.MAX, group=self._group)
            return there.cpu()


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This rank's groups and place. `control` joins the model-parallel ranks of one replica."""

    topology: Topology
    collection: ProcessGroupCollection
    control: HostMessages
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
    """The process groups, made where they are not there yet (`device.process_group.group_of`).

    Collective: every rank of the world calls it with the same topology.
    """
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
        control=HostMessages(collection.mp, device),
        device=device,
        data_rank=collection.dp.rank(),
        pipeline_rank=collection.pp.rank(),
        tensor_rank=collection.tp.rank(),
    )


def destroy_groups() -> None:
    """Forget what `build_groups` gave, so that another stage can use other sizes. The groups themselves stay."""
    parallel_state.destroy_model_parallel()
