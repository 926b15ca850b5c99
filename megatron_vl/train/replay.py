"""The plan of any step of a stage, for all data-parallel ranks, by planning the steps before it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.checkpoint.state import read_state, whole_checkpoints
from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.balance import RowCost
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_settings import fingerprint
from megatron_vl.data.plan_state import PlanState, merge_states
from megatron_vl.data.types import StepPlan
from megatron_vl.train.bookmarks import Bookmarks
from megatron_vl.train.plan_settings import plan_settings
from megatron_vl.train.run_dir import RunDirectory
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A step's plan for each data-parallel rank, and what its rows were dealt by."""

    ranks: list[StepPlan]
    cost: RowCost


def saved_plan(checkpoints: Path, stage: str, step: int) -> PlanState | None:
    """The plan's newest state before a step of the stage that a run has saved."""
    states = [read_state(path) for path in whole_checkpoints(checkpoints)]
    before = [state for state in states if state.stage == stage and state.step < step]
    newest = max(before, key=lambda state: state.step, default=None)
    return None if newest is None else PlanState.from_json(newest.plan)


def replay(
    config: PretrainConfig,
    stage: StageSettings,
    sources: Sources,
    step: int,
    on_step: Callable[[int, int], None],
) -> Preview:
    """What each data-parallel rank trains on in `step`, from the newest state that is known before it: of a checkpoint
    in run.dir, or of a bookmark. `on_step(done, total)` is called as steps are planned.

    Raises UserError where the values make no plan, or a checkpoint is of another one.
    """
    tables, settings = sources.tables(), plan_settings(config, stage, sources)
    run = RunDirectory(config.run.dir)
    bookmarks = Bookmarks(run.path, stage.name, settings.flush_steps, fingerprint(tables, settings))
    known = [saved_plan(run.checkpoints, stage.name, step), bookmarks.newest_before(step)]
    saved = max((state for state in known if state), key=lambda state: state.step, default=None)
    planners: list[Planner] = []
    while (rank := planners[-1].group.ranks.stop if planners else 0) < stage.topology.data_size:
        planners.append(Planner(tables, settings, rank, stage.topology.data_size))
    if saved is not None:
        for planner in planners:
            planner.restore(saved)
    plans: dict[int, StepPlan] = {}
    begin = saved.step if saved else 0
    for number in range(begin + 1, step + 1):
        for planner in planners:
            plans |= planner.next_of_group()
        bookmarks.keep(merge_states([one.state(rank) for one in planners for rank in one.group.ranks]))
        on_step(number - begin, step - begin)
    return Preview(ranks=[plans[rank] for rank in sorted(plans)], cost=planners[0].state().cost)
