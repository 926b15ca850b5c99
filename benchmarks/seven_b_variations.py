"""The 7B under other assumptions: what its plan would be, re-planned for each."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from unittest.mock import patch

from benchmarks.workbench import compose_run
from megatron_vl.config.errors import UserError
from megatron_vl.config.plan import SearchConfig
from megatron_vl.device.processes import die_with_parent
from megatron_vl.planning import step_times
from megatron_vl.planning.candidate import Problem, Remembered
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.forecast import Forecast
from megatron_vl.planning.search import search
from megatron_vl.planning.timing import ClusterTiming, Timing
from megatron_vl.planning.work import UnitWork, Work
from megatron_vl.planning.workload import Load
from megatron_vl.train.division import stage_problem
from megatron_vl.train.settings import stage_values

RUN = ("model=deepseek_vl_7b", "cluster=a100_64x8")
LOOKED_AT = 10  # settings, as launch.plan does by default: the best of them counts
MORE_PASSES = 5  # over SAM's scores, if they are written: the usual count for a bias has three of the eight


@dataclass(frozen=True, kw_only=True)
class FusedAccumulation(CostModel):
    """Products add weight gradients to the fp32 buffer themselves (Megatron-LM's gradient_accumulation_fusion): no
    passes of their own over gradient and buffer, ten bytes a parameter and microbatch."""

    def unit(self, name: str, load: Load) -> UnitWork:
        """See CostModel."""
        work = super().unit(name, load)
        if name not in ("decoder_layer", "head"):
            return work
        return replace(work, weight_gradient=replace(work.weight_gradient, moved_bytes=0.0))


@dataclass(frozen=True, kw_only=True)
class ExplicitScores(CostModel):
    """SAM's blocks write their attention scores: a product, two sums with positions, softmax, a product; in bf16 eight
    passes over them (the published code)."""

    folded_positions: bool = False

    def unit(self, name: str, load: Load) -> UnitWork:
        """See CostModel."""
        work, sam = super().unit(name, load), self.model.vision.sam
        if sam is None or name not in ("sam_global_block", "sam_window_block"):
            return work
        grid = sam.image_size // sam.patch_size
        side = grid if name == "sam_global_block" else sam.window_size
        num_scores = load.num_images * (-(-grid // side) * side) ** 2 * side**2 * sam.num_heads
        return work + UnitWork(forward=Work(moved_bytes=MORE_PASSES * num_scores * self.element_bytes))


@dataclass(frozen=True, kw_only=True)
class Recounted(Problem):
    """Units cost what `costs` says."""

    costs: type[CostModel]

    def timing(self, tensor_size: int, sequence_parallel: bool) -> Timing:
        """See Problem."""
        key = tensor_size, sequence_parallel
        if key not in self.timings:
            costs = self.costs(model=self.model, tensor_size=tensor_size, sequence_parallel=sequence_parallel)
            self.timings[key] = Remembered(timing=ClusterTiming(cluster=self.cluster, costs=costs))
        return self.timings[key]


@dataclass(frozen=True, kw_only=True)
class Variation:
    """A stage of the run with other values; `kept` are choices that planning may not make."""

    name: str
    stage: str = "joint"
    overrides: tuple[str, ...] = ()
    kept: SearchConfig = field(default_factory=SearchConfig)
    costs: type[CostModel] = CostModel
    gradient_bytes: int = step_times.GRADIENT_BYTES  # of each that is reduced among data-parallel ranks

    def problem(self) -> Problem:
        config = compose_run(*RUN, *self.overrides)
        problem = stage_problem(config, self.stage, stage_values(config, self.stage))
        if self.costs is CostModel:
            return problem
        values = {name: getattr(problem, name) for name in ("model", "workload", "cluster", "execution")}
        return Recounted(**values, costs=self.costs)

    def plan(self) -> Forecast | None:
        """The best setting; None where nothing is permitted."""
        with patch.object(step_times, "GRADIENT_BYTES", self.gradient_bytes):
            try:
                return search(self.problem(), self.kept, LOOKED_AT)[0]
            except UserError:
                return None


def plan_all(variations: Sequence[Variation]) -> list[Forecast | None]:
    """In this order; on all cores."""
    context = get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=die_with_parent) as pool:
        return list(pool.map(Variation.plan, variations))


def _recompute(kind: str) -> Variation:
    return Variation(name=f"{kind} recompute", kept=SearchConfig(recompute=kind))


def _cluster(name: str, field_name: str, value: float) -> Variation:
    return Variation(name=name, overrides=(f"cluster.{field_name}={value}",))


TP2 = SearchConfig(tensor_size=2)
SENSITIVITY = (
    Variation(name="as assumed"),
    _cluster("decoder's products at .65 of peak", "efficiency.decoder", 0.65),
    _cluster("at .78", "efficiency.decoder", 0.78),
    _cluster("decoder's attention at .4", "efficiency.attention", 0.4),
    _cluster("at .7", "efficiency.attention", 0.7),
    _cluster("passes over memory at .6 of its bandwidth", "efficiency.memory", 0.6),
    _cluster("at .9", "efficiency.memory", 0.9),
    Variation(name="weight gradients added up by their products", costs=FusedAccumulation),
    Variation(name="gradients reduced in bf16", gradient_bytes=2),
    _cluster("half as much between nodes", "between.bytes_per_second", 80e9),
    Variation(name="TP2", kept=TP2),
    Variation(name="TP2, its communication hidden", overrides=("cluster.tensor_exposed=0",), kept=TP2),
    Variation(name="TP2, all of it exposed", overrides=("cluster.tensor_exposed=1",), kept=TP2),
    _cluster("SAM at .4 of peak", "efficiency.sam", 0.4),
    Variation(name="SAM writes its scores", costs=ExplicitScores),
    Variation(name="2 images a multimodal row", overrides=("stage.joint.expected.images=2",)),
    Variation(name="7 images, the most that fit", overrides=("stage.joint.expected.images=7",)),
    Variation(name="rows of segments of 1024", overrides=("stage.joint.expected.segment_tokens=1024",)),
    _cluster("the slowest device 1.05 times slower", "straggler_factor", 1.05),
    _recompute("selective"),
    _recompute("full"),
    Variation(name="A100 PCIe, one adapter a node", overrides=("cluster=a100_pcie_1nic",)),
    Variation(name="H100", overrides=("cluster=h100_64x8",)),
)


def _configuration(sizes: tuple[int, int, int], placement: str, layout: str | None = None) -> Variation:
    tensor_size, pipeline_size, virtual_size = sizes
    kept = SearchConfig(
        tensor_size=tensor_size,
        pipeline_size=pipeline_size,
        virtual_size=virtual_size,
        micro_batch_size=1,
        vision_placement=placement,
        layout=layout,
    )
    name = f"TP{tensor_size} PP{pipeline_size}" + (f" VPP{virtual_size}" if virtual_size > 1 else "")
    return Variation(name=name, kept=kept)


UNIFORM = "E" + "|".join(["t" * 5] * 6) + "L"
CONFIGURATIONS = (
    _configuration((1, 2, 6), "spread"),
    _configuration((1, 2, 3), "spread"),
    _configuration((1, 2, 1), "spread"),
    _configuration((2, 2, 6), "spread"),
    _configuration((2, 2, 3), "spread"),
    _configuration((2, 2, 3), "split"),
    _configuration((2, 2, 3), "replicated"),
    _configuration((2, 2, 3), "replicated", UNIFORM),
    _configuration((2, 2, 1), "spread"),
    _configuration((2, 1, 1), "spread"),
    _configuration((1, 4, 1), "replicated"),
    _configuration((4, 2, 3), "spread"),
)
