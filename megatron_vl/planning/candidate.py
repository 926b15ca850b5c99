"""A setting that may be chosen: its lower bound, whether it fits into memory, and its best split."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from megatron_vl.config.cluster import ClusterConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.calibration import timing_on
from megatron_vl.planning.memory import Execution, peak_bytes, rank_memory
from megatron_vl.planning.rebalance import (
    Counts,
    Pipeline,
    RankCosts,
    best_splits,
    layout_of,
    level,
    min_max,
    spread_over_chunks,
)
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.steps import Steps
from megatron_vl.planning.timing import PassSeconds, Timing
from megatron_vl.planning.workload import Load, Workload

MEMORY_SHARE = 0.92  # of a device: the rest is CUDA's context, NCCL's buffers, and holes between tensors


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """A timing that works out nothing twice: a search asks for the same few loads again and again."""

    timing: Timing
    known: dict[tuple[str, Load], PassSeconds] = field(default_factory=dict)

    def unit(self, name: str, load: Load) -> PassSeconds:
        """See planning.timing.Timing."""
        if (name, load) not in self.known:
            self.known[name, load] = self.timing.unit(name, load)
        return self.known[name, load]

    def update(self, num_trained: float, data_size: int) -> float:
        """See planning.timing.Timing."""
        return self.timing.update(num_trained, data_size)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model's stage on a cluster."""

    model: ModelConfig
    workload: Workload
    cluster: ClusterConfig
    execution: Execution
    timings: dict[tuple[int, bool], Remembered] = field(default_factory=dict)

    def timing(self, tensor_size: int, sequence_parallel: bool) -> Timing:
        """Raises UserError where the cluster's calibration does not have it."""
        key = tensor_size, sequence_parallel
        if key not in self.timings:
            precision = self.execution.precision
            self.timings[key] = Remembered(timing=timing_on(self.cluster, self.model, precision, *key))
        return self.timings[key]

    @property
    def memory_bytes(self) -> int:
        """What a rank may use."""
        return int(MEMORY_SHARE * self.cluster.memory_bytes)


@dataclass(frozen=True)
class Candidate:
    """A setting without a layout, and how to find its layout."""

    problem: Problem
    setting: Setting

    @cached_property
    def steps(self) -> Steps:
        problem = self.problem
        return Steps(
            model=problem.model,
            workload=problem.workload,
            setting=self.setting,
            cluster=problem.cluster,
            timing=problem.timing(self.setting.topology.tensor_size, self.setting.sequence_parallel),
            precision=problem.execution.precision,
        )

    @cached_property
    def pipeline(self) -> Pipeline:
        topology = self.setting.topology
        return Pipeline(
            num_layers=self.problem.model.language.num_layers,
            pipeline_size=topology.pipeline_size,
            virtual_size=topology.virtual_size,
        )

    @cached_property
    def costs(self) -> list[RankCosts]:
        """What each rank computes without layers, and for each layer, by kind of step."""
        size, virtual = self.pipeline.pipeline_size, self.pipeline.virtual_size
        costs = []
        for kind in self.steps.kinds:
            busy = self.steps.busy(kind)
            base = np.full(size, virtual * float(busy.fixed))
            base[0] += busy.first
            base[-1] += busy.last
            costs.append(RankCosts(share=kind.share, base=tuple(base.tolist()), layer=float(busy.layer)))
        return costs

    @cached_property
    def bound(self) -> float:
        """No split makes the mean step faster."""
        num_layers = self.pipeline.num_layers
        return sum(
            cost.share
            * (max(*cost.base, (sum(cost.base) + num_layers * cost.layer) / len(cost.base)) + besides)
            for cost, besides in zip(self.costs, map(self.steps.least_besides, self.steps.kinds), strict=True)
        )

    def even_split(self, most: Counts) -> Counts | None:
        """Ranks are about equally busy on average; None where `most` layers of each are too few for all."""
        by_rank = level(self.costs, self.pipeline.num_layers, self._least, most)
        return None if by_rank is None else spread_over_chunks(by_rank, self.pipeline, self._ends_in_layers)

    def classic_split(self, most: Counts) -> Counts | None:
        """By the classic objective, likewise."""
        by_rank = min_max(self.costs, self.pipeline.num_layers, self._least, most)
        return None if by_rank is None else spread_over_chunks(by_rank, self.pipeline, self._ends_in_layers)

    def best_split(self) -> Counts | None:
        """By simulated time, of those that memory allows."""
        most = self.unlimited if self.fits(self.even_split(self.unlimited)) else self.most_layers
        starts = [split for split in (self.classic_split(most), self.even_split(most)) if split]
        if not starts:
            return None
        found = best_splits(self.pipeline, self.steps.mean_seconds, starts, most)
        return next((split.counts for split in found if self.fits(split.counts)), None)

    def fits(self, counts: Counts | None) -> bool:
        """Whether every rank has the memory."""
        return counts is not None and self.peak_bytes(counts) <= self.problem.memory_bytes

    def seconds(self, counts: Counts) -> float:
        """Of the mean step."""
        return float(self.steps.mean_seconds(np.array([counts]).T)[0])

    def peak_bytes(self, counts: Counts) -> int:
        problem = self.problem
        return peak_bytes(problem.model, problem.workload, self.with_layout(counts), problem.execution)

    def with_layout(self, counts: Counts) -> Setting:
        return replace(self.setting, layout=layout_of(counts))

    @property
    def unlimited(self) -> Counts:
        return (self.pipeline.num_layers,) * self.pipeline.pipeline_size

    @cached_property
    def most_layers(self) -> Counts:
        """How many layers each rank has the memory for; -1 where it has too little for none."""
        return tuple(self._most_layers(rank) for rank in range(self.pipeline.pipeline_size))

    def _most_layers(self, rank: int) -> int:
        low, high = -1, self.pipeline.num_layers
        while low < high:
            middle = (low + high + 1) // 2
            if self._bytes_with(rank, middle) <= self.problem.memory_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def _bytes_with(self, rank: int, num_layers: int) -> int:
        """Of one rank with so many layers, spread evenly over its chunks."""
        size, virtual = self.pipeline.pipeline_size, self.pipeline.virtual_size
        counts = [0] * self.pipeline.num_chunks
        for place in range(virtual):
            counts[place * size + rank] = (num_layers + place) // virtual
        problem, setting = self.problem, self.with_layout(tuple(counts))
        return rank_memory(problem.model, problem.workload, setting, rank, problem.execution).total

    @property
    def _least(self) -> Counts:
        """Layers that each rank must hold."""
        size = self.pipeline.pipeline_size
        return tuple(sum(self.pipeline.least[rank::size]) for rank in range(size))

    @cached_property
    def _ends_in_layers(self) -> tuple[float, float]:
        """What stage zero and the head take, in layers."""
        busy = [(kind.share, self.steps.busy(kind)) for kind in self.steps.kinds]
        layer = sum(share * float(each.layer) for share, each in busy)
        first = sum(share * float(each.first) for share, each in busy)
        return first / layer, float(busy[0][1].last) / layer
