"""The training loop of one stage: it reads as one step flows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_vl.checkpoint.state import RunState
from megatron_vl.checkpoint.store import CheckpointStore
from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.batch import mask_failed
from megatron_vl.data.loader import LoadedStep
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.types import TEXT
from megatron_vl.device.garbage import Collector
from megatron_vl.device.machine import Device
from megatron_vl.device.process_group import set_timeout
from megatron_vl.device.trail import TRAIL
from megatron_vl.parallel.gradients import parameters_at_rest
from megatron_vl.parallel.pipeline import agree_on_plan
from megatron_vl.parallel.replicas import witnesses
from megatron_vl.parallel.timeline import Timeline, bubble_fraction
from megatron_vl.train.evaluation import Evaluation, Moment
from megatron_vl.train.explain import corruption, out_of_memory_explained
from megatron_vl.train.metrics import StartupSeconds
from megatron_vl.train.profiling import ProfilerWindow
from megatron_vl.train.recorder import Recorder
from megatron_vl.train.rollback import ROLLED_BACK
from megatron_vl.train.signals import StopRequest
from megatron_vl.train.stage import Stage
from megatron_vl.train.startup import Startup, slowest
from megatron_vl.train.step import StepResult, Vote, train_step


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the loop needs beside the stage itself."""

    config: PretrainConfig
    fingerprint: dict[str, Any]  # what must not change on resume
    device: Device
    store: CheckpointStore
    recorder: Recorder
    stop: StopRequest
    collector: Collector
    startup: Startup
    profiler: ProfilerWindow
    evaluations: Sequence[Evaluation]


def train_stage(stage: Stage, run: Run) -> str:
    """Train to the stage's end, to train.stop_at or to a signal, whichever comes first; a checkpoint is saved there.

    Returns:
        Why it returns: "complete", "stopped" or "interrupted", or "rolled_back" where too many steps in a row were
        skipped and the stage must go on from an earlier checkpoint; the same on all ranks.

    Raises:
        UserError: too many samples cannot be decoded, or memory does not suffice.
        CorruptionError: replicas of a parameter differ.
    """
    settings, config = stage.settings, run.config
    num_steps, stop_at = settings.values.steps, config.train.stop_at
    faults, health = config.train.faults, stage.health
    run.collector.settle()
    for change in stage.plan.changes:
        run.recorder.say(f"data.on_change=restart_sources: {change}")
    if stage.first_step == 1:
        _evaluate(stage, run, step=0)
        run.startup.ended("evaluation")
    for step in range(stage.first_step, num_steps + 1):
        if stop_at is not None and step > stop_at:  # a resumed run that had stopped there
            return "stopped"
        TRAIL.begin_step(step)
        TRAIL.at("reading data")
        loaded = next(stage.loader)
        stop_requested = not _is_given_up(stage, run, loaded) and _train_and_record(stage, run, loaded)
        if step == stage.first_step:
            _started(stage, run)
        run.collector.collect_if_due(step)
        if len(health.skipped) >= faults.skipped_in_a_row:
            return ROLLED_BACK
        ends = step == num_steps
        if ends:  # a stage is complete when it has been measured
            _evaluate(stage, run, step)
        if ends or stop_requested or step == stop_at or _is_checkpoint_due(stage, run, step):
            _save(stage, run, loaded)
        if stop_requested:
            run.store.close_stage()  # on disk, however long the evaluation takes
        if not ends:
            _evaluate(stage, run, step)
        if stop_requested:
            return "interrupted"
        if step == stop_at:
            return "stopped"
    return "complete"


def _started(stage: Stage, run: Run) -> None:
    """The first step is done: what the start took is recorded, and from now on ranks wait less long for each other."""
    run.startup.ended("first step")
    set_timeout(run.config.run.timeout_seconds)
    TRAIL.starting = False
    run.recorder.started(
        StartupSeconds(
            stage=stage.settings.name,
            step=stage.first_step,
            global_step=stage.settings.first_global_step + stage.first_step - 1,
            seconds=run.startup.seconds,
            slowest=slowest(run.startup, stage.model.groups.device),
        )
    )


def _is_given_up(stage: Stage, run: Run, loaded: LoadedStep) -> bool:
    """Whether the step's data are passed over, since the run has gone back for them."""
    given_up = loaded.plan.step in stage.health.given_up
    if given_up:
        run.recorder.fault({"kind": "passed_over", **_place(stage, loaded)})
    return given_up


def _train_and_record(stage: Stage, run: Run, loaded: LoadedStep) -> bool:
    """One step. Returns whether some rank was asked to stop."""
    step, faults = loaded.plan.step, run.config.train.faults
    timeline = _start_timeline(stage, run, step)
    global_step = stage.settings.first_global_step + step - 1
    run.profiler.before(global_step)
    max_loss = stage.health.max_loss(loaded.plan.modality, faults)
    pipeline_rank = stage.model.groups.pipeline_rank
    with out_of_memory_explained(run.config, stage.settings, pipeline_rank, run.device):
        result = _train(stage, loaded, run, max_loss)
    if result.corrupted:
        error = corruption(stage.settings.name, step, result.corrupted)
        run.recorder.fault({"kind": "corruption", **_place(stage, loaded), "message": str(error)})
        run.store.close_stage()  # what is on its way was compared before
        raise error
    run.recorder.step(stage.meter.row(loaded, result, stage.schedule.at(step)))
    run.profiler.after(global_step)
    run.store.advance(busy=result.saving)
    _record_timeline(stage, run, loaded, timeline)
    _check_failures(stage, run.config.data.max_failed_fraction, result)
    stage.health.count(step, loaded.plan.modality, result.loss, result.skipped, faults)
    if result.skipped:
        facts = {"loss": result.loss, "max_loss": max_loss, "grad_norm": result.gradient_norm}
        run.recorder.fault({"kind": "skipped", **_place(stage, loaded), **facts})
    return result.stop_requested


def _place(stage: Stage, loaded: LoadedStep) -> dict[str, Any]:
    step = loaded.plan.step
    return {
        "stage": stage.settings.name,
        "step": step,
        "global_step": stage.settings.first_global_step + step - 1,
        "modality": loaded.plan.modality,
    }


def _is_checkpoint_due(stage: Stage, run: Run, step: int) -> bool:
    """None while steps are being skipped, since what went wrong may be the weights, nor at a step that is given up:
    going back must not end at the same weights under a later name."""
    health = stage.health
    return step % run.config.checkpoint.every == 0 and not health.skipped and step not in health.given_up


def _train(stage: Stage, loaded: LoadedStep, run: Run, max_loss: float) -> StepResult:
    model, step = stage.model, loaded.plan.step
    began = perf_counter()
    stage.clock.begin_step()
    TRAIL.at("agreement on the plan", waits=True)
    microbatches = _agree(loaded, stage)
    TRAIL.at("beginning")
    model.optimizer.set_learning_rate(stage.schedule.at(step))
    max_norm = run.config.train.gradient_clip
    vote = Vote(
        stop_requested=bool(run.stop),
        saving=run.store.is_busy(),
        plan_group=loaded.plan.group,
        plan_digest=loaded.plan.digest,
        traffic=loaded.traffic,
        compute_seconds=stage.clock.last_step,
        memory=run.device.memory_use(),
        max_loss=max_loss,
        sources=tuple(sorted(stage.settings.values.sources)),
        witnesses=_witnesses(stage, run, loaded),
    )
    result = train_step(
        model.chunks, model.optimizer, microbatches, model.groups, max_norm, vote, model.spread
    )
    stage.clock.end_step()
    return replace(result, seconds=perf_counter() - began)


def _witnesses(stage: Stage, run: Run, loaded: LoadedStep) -> Callable[[], Tensor] | None:
    """Every so many steps, and where a checkpoint comes by the calendar: none is to be made of corrupted parameters."""
    faults, step, model = run.config.train.faults, loaded.plan.step, stage.model
    saves = step in (stage.settings.values.steps, run.config.train.stop_at)
    if not faults.compare_replicas_every or (
        step % faults.compare_replicas_every and step % run.config.checkpoint.every and not saves
    ):
        return None
    with_images = loaded.plan.modality != TEXT
    return partial(witnesses, model.chunks, model.optimizer.inner, with_images=with_images)


def _agree(loaded: LoadedStep, stage: Stage) -> list[Microbatch]:
    """The last pipeline stage masks what the ranks that read it could not decode."""
    here = loaded.microbatches
    failed = agree_on_plan(here, loaded.plan.digest, stage.model.groups)
    stage.loader.failures.num_elsewhere += sum(map(len, failed)) - sum(len(one.failed_units) for one in here)
    return [mask_failed(*pair) for pair in zip(here, failed, strict=True)]


def _start_timeline(stage: Stage, run: Run, step: int) -> Timeline | None:
    """Record the second step (the first one warms up) and every so many steps after it."""
    every = run.config.tracking.timeline_every
    if step != 2 and step % every:
        return None
    dist.barrier(stage.model.groups.collection.mp)
    timeline = Timeline(synchronize=run.device.synchronize)
    stage.clock.timeline = timeline
    return timeline


def _record_timeline(stage: Stage, run: Run, loaded: LoadedStep, timeline: Timeline | None) -> None:
    if timeline is None:
        return
    stage.clock.timeline = None
    groups = stage.model.groups
    by_rank: list[Any] = [None] * groups.collection.pp.size()
    dist.all_gather_object(by_rank, timeline.events, group=groups.collection.pp)
    events = [{"pp_rank": rank, **asdict(event)} for rank, events in enumerate(by_rank) for event in events]
    measured = {"bubble_fraction": bubble_fraction(by_rank), "events": events}
    run.recorder.timeline({**_place(stage, loaded), **measured})


def _check_failures(stage: Stage, max_fraction: float, result: StepResult) -> None:
    """Every rank that reads checks what it has read; a step without failures cannot cross the limit."""
    if result.num_failed_samples:
        stage.loader.failures.check(max_fraction)


def _evaluate(stage: Stage, run: Run, step: int) -> None:
    """Whatever is due. At step 0 it belongs to the global step that follows, which a resume trains again."""
    global_step = stage.settings.first_global_step + max(step, 1) - 1
    moment = Moment(step=step, global_step=global_step, ends=step == stage.settings.values.steps)
    for evaluation in run.evaluations:
        if evaluation.is_due(moment):
            TRAIL.at("evaluation")
            with run.collector.automatic():
                run.recorder.measured(evaluation.measure(stage, moment))


def _save(stage: Stage, run: Run, loaded: LoadedStep) -> None:
    TRAIL.at("checkpoint")
    step = loaded.plan.step
    plan = stage.gather_plan(step)
    if step == stage.settings.values.steps:
        for source, count in sorted(plan.left_out.items()):
            if count:
                run.recorder.say(
                    f"{source}: {count} samples were longer than a row or held too many images: left out"
                )
    state = RunState(
        stage=stage.settings.name,
        step=step,
        num_steps=stage.settings.values.steps,
        global_step=stage.settings.first_global_step + step - 1,
        plan=plan.to_json(),
        fingerprint=run.fingerprint,
        health=stage.health.to_json(),
    )
    run.recorder.sync()
    with parameters_at_rest(stage.model.chunks):
        run.store.save(state, stage.model.chunks, stage.model.optimizer.inner, stage.model.groups)
