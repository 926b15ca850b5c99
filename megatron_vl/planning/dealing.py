"""What rows cost the slowest pipeline stage, in FLOPs of one rank: enough to deal rows evenly."""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.passes import backward, chunk_units, passes
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Load


@dataclass(frozen=True, kw_only=True)
class RowFlops:
    """FLOPs of one rank, forward and backward, per token, image, and pair of tokens that see each other."""

    per_token: int
    per_image: int
    per_pair: int

    def of(self, row: Load) -> float:
        return (
            row.num_tokens * self.per_token + row.num_images * self.per_image + row.num_pairs * self.per_pair
        )


def slowest_stage(
    model: ModelConfig, layout: str, topology: Topology, trained: Collection[str], row: Load
) -> RowFlops:
    """The costs of the pipeline rank with most to do for `row`; the first of equals.

    `layout` as `resolve_layout` gives it; `trained` are parts of config.train.PARTS.
    """
    costs = CostModel(model=model, tensor_size=topology.tensor_size)
    chunks = parse_layout(layout)
    stages = [
        _stage_flops(costs, "".join(chunks[rank :: topology.pipeline_size]), frozenset(trained))
        for rank in range(topology.pipeline_size)
    ]
    return max(stages, key=lambda stage: stage.of(row))


def _stage_flops(costs: CostModel, layers: str, trained: frozenset[str]) -> RowFlops:
    """`layers`: the E, t and L of one pipeline rank. Costs are linear, so one token, image or pair tells them all."""

    def total(tokens: int, images: int, pairs: int) -> int:
        load = Load(num_tokens=tokens, num_images=images, num_pairs=pairs)
        flops = 0.0
        for name, count in chunk_units(layers, costs.model).items():
            work = costs.unit(name, load)
            flops += count * (work.forward + backward(work, passes(name, trained))).flops
        return int(flops)

    return RowFlops(per_token=total(1, 0, 0), per_image=total(0, 1, 0), per_pair=total(0, 0, 1))
