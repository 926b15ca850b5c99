"""Every way to spread a stage over a cluster that megatron-core permits."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import ModelConfig
from megatron_vl.config.parallel import RECOMPUTE, VISION_PLACEMENTS
from megatron_vl.config.plan import SearchConfig
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology, check_batch_sizes, check_tensor_size
from megatron_vl.planning.workload import Workload

VISION_PARTS = frozenset({"siglip", "sam", "sam_downsample"})

Choice = TypeVar("Choice")


@dataclass(frozen=True, kw_only=True)
class Grids:
    """Settings without a layout. `kept` holds the choices that are not free."""

    model: ModelConfig
    workload: Workload
    cluster: ClusterConfig
    kept: SearchConfig

    def settings(self) -> Iterator[list[Setting]]:
        """Groups that differ in recompute alone, what computes least first: the first that fits is the fastest."""
        for topology in self.topologies():
            for micro_batch_size in self._micro_batch_sizes(topology):
                for placement in self._placements(topology):
                    yield [
                        Setting(
                            topology=topology,
                            layout="",
                            sequence_parallel=topology.tensor_size > 1,
                            micro_batch_size=micro_batch_size,
                            recompute=recompute,
                            recompute_vision=vision,
                            vision_placement=placement,
                        )
                        for recompute, vision in self._recomputes()
                    ]

    def topologies(self) -> Iterator[Topology]:
        """Those that the ranks, the model's sizes and its layers allow, whatever the batch."""
        world_size = self.cluster.num_devices
        for tensor_size in self._tensor_sizes():
            for pipeline_size in _choices(self.kept.pipeline_size, _divisors(world_size // tensor_size)):
                if world_size % (tensor_size * pipeline_size) == 0:
                    for virtual_size in self._virtual_sizes(pipeline_size):
                        yield Topology(
                            world_size=world_size,
                            tensor_size=tensor_size,
                            pipeline_size=pipeline_size,
                            virtual_size=virtual_size,
                        )

    def _tensor_sizes(self) -> list[int]:
        """Within a node, and dividing the model's sizes."""
        per_node = self.cluster.devices_per_node
        return [
            size
            for size in _choices(self.kept.tensor_size, _divisors(per_node))
            if per_node % size == 0 and _holds(check_tensor_size, self.model.language, size, False)
        ]

    def _virtual_sizes(self, pipeline_size: int) -> list[int]:
        """Chunks between the first and the last hold a layer each; a kept layout has its number of chunks."""
        most = (self.model.language.num_layers + 2) // pipeline_size if pipeline_size > 1 else 1
        return [
            size
            for size in _choices(self.kept.virtual_size, range(1, most + 1))
            if size <= most and self._has_chunks(pipeline_size * size)
        ]

    def _has_chunks(self, count: int) -> bool:
        return self.kept.layout is None or len(parse_layout(self.kept.layout)) == count

    def _micro_batch_sizes(self, topology: Topology) -> list[int]:
        batch, stage = self.workload.global_batch_size, self.workload.stage
        free = _divisors(max(1, batch // topology.data_size))
        return [
            size
            for size in _choices(self.kept.micro_batch_size, free)
            if _holds(check_batch_sizes, batch, size, topology, stage)
        ]

    def _placements(self, topology: Topology) -> list[str]:
        has_images = self.workload.images_per_row > 0 and self.workload.text_ratio < 1
        ranks = {"replicated": 2, "split": topology.tensor_size, "spread": topology.model_size}
        possible = [
            one for one in VISION_PLACEMENTS if ranks[one] > 1 and (has_images or one == "replicated")
        ]
        return [one for one in _choices(self.kept.vision_placement, possible) if one in possible]

    def _recomputes(self) -> list[tuple[str, bool]]:
        vision = [False, True] if VISION_PARTS & self.workload.trained else [False]
        return [
            (recompute, again) for recompute in _choices(self.kept.recompute, RECOMPUTE) for again in vision
        ]


def _choices(kept: Choice | None, free: Iterable[Choice]) -> list[Choice]:
    return list(free) if kept is None else [kept]


def _holds(check: Callable[..., None], *values: Any) -> bool:
    try:
        check(*values)
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
