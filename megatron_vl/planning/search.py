"""The fastest settings of a stage on a cluster: what is permitted, less what memory forbids, simulated.

Settings are taken by a lower bound of their seconds: what the busiest rank computes if layers could be cut anywhere.
A first look simulates each with a split that evens out the ranks, and ends where the bound passes what was found. The
best of these then get the best of all splits (`planning.rebalance`).
"""

import heapq
from dataclasses import replace

from megatron_vl.config.errors import UserError
from megatron_vl.config.plan import SearchConfig
from megatron_vl.planning.candidate import Candidate, Problem
from megatron_vl.planning.forecast import Forecast, forecast, split_of
from megatron_vl.planning.grids import Grids
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.rebalance import Counts, layout_of
from megatron_vl.planning.refusal import refusal
from megatron_vl.planning.setting import Setting


def search(problem: Problem, kept: SearchConfig, top: int = 10) -> list[Forecast]:
    """The best `top` settings, the fastest first. `kept` are choices that are not free.

    Raises:
        UserError: nothing is permitted, or nothing fits into memory; says what would.
    """
    grids = Grids(model=problem.model, workload=problem.workload, cluster=problem.cluster, kept=kept)
    groups = [[Candidate(problem, setting) for setting in group] for group in grids.settings()]
    groups.sort(key=lambda group: group[0].bound)
    looked: list[tuple[float, Candidate, Counts]] = []
    for group in groups:
        if len(looked) >= top and group[0].bound > heapq.nsmallest(top, looked, key=_seconds)[-1][0]:
            break
        found = _first_look(group, kept.layout)
        looked += [found] if found else []
    if not looked:
        raise refusal(problem, kept, [candidate for group in groups for candidate in group[-1:]])
    looked.sort(key=_seconds)
    within = looked[: 2 * top]
    forecasts = [_forecast(candidate, counts, kept.layout) for _, candidate, counts in within]
    return sorted(forecasts, key=lambda each: each.step_seconds)[:top]


def _seconds(looked: tuple[float, Candidate, Counts]) -> float:
    return looked[0]


def _first_look(group: list[Candidate], layout: str | None) -> tuple[float, Candidate, Counts] | None:
    """The first of the group that fits into memory, with a split that evens out its ranks."""
    for candidate in group:
        counts = _kept_split(candidate, layout) if layout else _even_split(candidate)
        if candidate.fits(counts) and counts is not None:
            return candidate.seconds(counts), candidate, counts
    return None


def _kept_split(candidate: Candidate, layout: str) -> Counts:
    """Raises UserError for a layout that does not hold the model's layers."""
    pipeline = candidate.pipeline
    checked = resolve_layout(layout, pipeline.num_layers, candidate.setting.topology)
    return tuple(split_of(checked)[:, 0].tolist())


def _even_split(candidate: Candidate) -> Counts | None:
    free = candidate.even_split(candidate.unlimited)
    return free if candidate.fits(free) else candidate.even_split(candidate.most_layers)


def _forecast(candidate: Candidate, counts: Counts, layout: str | None) -> Forecast:
    best = counts if layout else candidate.best_split() or counts
    return forecast(candidate.steps, candidate.with_layout(best), candidate.problem.execution)


def auto_layout(problem: Problem, setting: Setting) -> str:
    """megatron-core's layout string for `setting`, whose own layout is not looked at.

    Raises:
        UserError: fewer layers than chunks to fill, or no split fits into memory.
    """
    candidate = Candidate(problem, replace(setting, layout=""))
    pipeline = candidate.pipeline
    if pipeline.num_splits == 0:
        raise UserError(
            f"model.language.num_layers={pipeline.num_layers} cannot fill parallel.pipeline_size="
            f"{pipeline.pipeline_size} x parallel.virtual_size={pipeline.virtual_size} = {pipeline.num_chunks} chunks, "
            f"of which all but the first and the last need a layer; lower the sizes"
        )
    counts = candidate.best_split()
    if counts is None:
        topology = setting.topology
        kept = SearchConfig(
            tensor_size=topology.tensor_size,
            pipeline_size=topology.pipeline_size,
            virtual_size=topology.virtual_size,
            micro_batch_size=setting.micro_batch_size,
            recompute=setting.recompute,
            vision_placement=setting.vision_placement,
        )
        raise refusal(problem, kept, [candidate])
    return layout_of(counts)
