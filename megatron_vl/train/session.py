"""A run from start, or from where it stood, to its end: stage after stage."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_vl.checkpoint.state import RunState
from megatron_vl.config.root import PretrainConfig
from megatron_vl.train.division import AUTO
from megatron_vl.train.loop import Run, train_stage
from megatron_vl.train.resume import find_start, is_complete
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources
from megatron_vl.train.stage import Start, open_stage


def pretrain(
    stages: list[StageSettings], sources: Sources, run: Run, found: tuple[Path, RunState] | None
) -> str:
    """Train what is left of the stages. Collective over the world.

    Returns:
        "complete", "stopped" (at train.stop_at) or "interrupted" (by a signal).
    """
    checkpoint, state = found or (_initial(run.config), None)
    run.recorder.resume_after(state.global_step if state else 0)
    if state:
        run.recorder.say(f"resuming after step {state.step} of stage {state.stage}")
    stages = _with_layouts_of_rank_zero(stages)
    names = [stage.name for stage in stages]
    first = 0 if state is None else names.index(state.stage) + state.stage_complete
    outcome = "complete"
    for settings in stages[first:]:
        resume = state if state is not None and state.stage == settings.name else None
        run.recorder.begin_stage(settings.name, resume.step if resume else 0)
        if settings.parallel.layout == AUTO:
            run.recorder.say(f"stage {settings.name}: parallel.layout=auto is {settings.layout}")
        start = Start(checkpoint=checkpoint, resume=resume)
        with ExitStack() as exits:
            outcome = train_stage(open_stage(run.config, settings, sources, run.device, start, exits), run)
        checkpoint, state = _just_saved(run)
        if outcome != "complete":
            break
    if state is None:
        raise RuntimeError("a run without stages reached its end")
    if is_complete(run.config, state):
        outcome = "complete"
    run.recorder.end(outcome, state.stage, state.step)
    return outcome


def _with_layouts_of_rank_zero(stages: list[StageSettings]) -> list[StageSettings]:
    """Planned layouts rest on sums of floats, which machines of another kind might round otherwise."""
    layouts = [stage.layout for stage in stages]
    dist.broadcast_object_list(layouts)
    return [replace(stage, layout=layout) for stage, layout in zip(stages, layouts, strict=True)]


def _just_saved(run: Run) -> tuple[Path, RunState]:
    """Every stage ends with a checkpoint; the next one starts from it."""
    found = find_start(run.config, run.recorder.run)
    if found is None:
        raise RuntimeError(f"a stage ended without a checkpoint in {run.recorder.run.checkpoints}")
    return found


def _initial(config: PretrainConfig) -> Path | None:
    return None if config.checkpoint.initial is None else Path(config.checkpoint.initial)
