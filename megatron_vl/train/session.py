"""A run from start, or from where it stood, to its end: stage after stage."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_vl.checkpoint.state import RunState
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.process_group import set_timeout
from megatron_vl.device.trail import TRAIL
from megatron_vl.train.division import AUTO
from megatron_vl.train.health import Health
from megatron_vl.train.loop import Run, train_stage
from megatron_vl.train.resume import find_start, is_complete
from megatron_vl.train.rollback import ROLLED_BACK, given_up_in, read_rollbacks, roll_back
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources
from megatron_vl.train.stage import Start, open_stage
from megatron_vl.train.start import agree_on_start

# A checkpoint, and the state of this run there, if it is one of its own.
Standing = tuple[Path | None, RunState | None]


def pretrain(
    stages: list[StageSettings], sources: Sources, run: Run, found: tuple[Path, RunState] | None
) -> str:
    """Train what is left of the stages. Collective over the world.

    Returns:
        "complete", "stopped" (at train.stop_at) or "interrupted" (by a signal).
    """
    standing: Standing = found or (_initial(run.config), None)
    if found:
        run.recorder.say(f"resuming after step {found[1].step} of stage {found[1].stage}")
    stages = _with_layouts_of_rank_zero(stages)
    names = [stage.name for stage in stages]
    first = 0 if found is None else names.index(found[1].stage) + found[1].stage_complete
    outcome = "complete"
    for settings in stages[first:]:
        _starting_anew(settings, run)
        outcome, health = _run_stage(settings, sources, run, standing)
        while outcome == ROLLED_BACK:
            _starting_anew(settings, run)
            roll_back(settings, health, run.config.train.faults.max_rollbacks, run.recorder)
            outcome, health = _run_stage(settings, sources, run, _gone_back(run))
        standing = _standing(run)
        if outcome != "complete":
            break
    state = standing[1]
    if state is None:
        raise RuntimeError(f"a stage ended without a checkpoint in {run.recorder.run.checkpoints}")
    if is_complete(run.config, state):
        outcome = "complete"
    run.recorder.end(outcome, state.stage, state.step)
    return outcome


def _starting_anew(settings: StageSettings, run: Run) -> None:
    """What comes before the next first step may take as long as a start; what the last one held is let go first."""
    TRAIL.begin_stage(settings.name)
    set_timeout(run.config.run.start_timeout_seconds)
    run.collector.let_go()


def _run_stage(settings: StageSettings, sources: Sources, run: Run, standing: Standing) -> tuple[str, Health]:
    """Open a stage where the run stands, and train it. Returns why it ended, and the stage's health there."""
    checkpoint, state = standing
    run.startup.begin_stage()
    run.recorder.resume_after(state.global_step if state else 0)
    run.startup.ended("trackers")
    resume = state if state is not None and state.stage == settings.name else None
    run.recorder.begin_stage(settings.name, resume.step if resume else 0)
    if settings.parallel.layout == AUTO:
        run.recorder.say(f"stage {settings.name}: parallel.layout=auto is {settings.layout}")
    given_up = given_up_in(settings.name, read_rollbacks(run.recorder.run.faults))
    start = Start(checkpoint=checkpoint, resume=resume, startup=run.startup, given_up=frozenset(given_up))
    with ExitStack() as exits:
        stage = open_stage(run.config, settings, sources, run.device, start, exits)
        outcome = train_stage(stage, run)
        run.store.close_stage()
    return outcome, stage.health


def _with_layouts_of_rank_zero(stages: list[StageSettings]) -> list[StageSettings]:
    """Planned layouts rest on sums of floats, which machines of another kind might round otherwise."""
    layouts = [stage.layout for stage in stages]
    dist.broadcast_object_list(layouts)
    return [replace(stage, layout=layout) for stage, layout in zip(stages, layouts, strict=True)]


def _gone_back(run: Run) -> Standing:
    """The newest checkpoint that is left, every byte of it read, or what the run began with. Collective."""
    found, notices = agree_on_start(run.config, run.recorder.run)
    for notice in notices:
        run.recorder.say(notice)
    return found or (_initial(run.config), None)


def _standing(run: Run) -> Standing:
    """The newest checkpoint, which every stage ends with, or what the run began with: as rank 0 finds it, since other
    nodes may see a file system as it was some seconds ago."""
    found: list[Standing] = [(None, None)]
    if dist.get_rank() == 0:
        found = [find_start(run.config, run.recorder.run) or (_initial(run.config), None)]
    dist.broadcast_object_list(found)
    return found[0]


def _initial(config: PretrainConfig) -> Path | None:
    return None if config.checkpoint.initial is None else Path(config.checkpoint.initial)
