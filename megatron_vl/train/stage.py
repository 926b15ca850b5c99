"""Everything that one stage trains with on this rank, built in the order in which the parts need each other."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vl.checkpoint.loading import load_training_state, load_weights
from megatron_vl.checkpoint.state import RunState
from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.loader import Loader, Role
from megatron_vl.data.plan_state import PlanState, merge_states
from megatron_vl.device.machine import Device
from megatron_vl.model.initialize import initialize
from megatron_vl.model.spread import Spread, spread_encoders
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, build_chunks, freeze
from megatron_vl.parallel.gradients import distribute
from megatron_vl.parallel.groups import Groups, build_groups, destroy_groups
from megatron_vl.parallel.pass_clock import PassClock
from megatron_vl.parallel.shares import image_sharing
from megatron_vl.train.health import Health
from megatron_vl.train.meter import Meter
from megatron_vl.train.open_plan import OpenPlan, open_plan
from megatron_vl.train.optimizer import Optimizer, build_optimizer
from megatron_vl.train.schedule import Schedule
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources, build_loader
from megatron_vl.train.startup import Startup


@dataclass(frozen=True, kw_only=True)
class Model:
    """This rank's chunks, wrapped for data parallelism, and the optimizer of what trains.

    `spread` encodes images ahead of the pipeline, where the stage does so.
    """

    chunks: list[Any]
    optimizer: Optimizer
    groups: Groups
    spread: Spread | None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, ready to train from `first_step`."""

    settings: StageSettings
    model: Model
    schedule: Schedule
    loader: Loader
    first_step: int
    plan: OpenPlan
    health: Health
    clock: PassClock
    meter: Meter

    def gather_plan(self, step: int) -> PlanState:
        """The plan's state after `step`, with the lanes of all data-parallel ranks. Collective."""
        own = self.plan.client.state_after(step)
        group = self.model.groups.collection.dp
        states: list[Any] = [None] * group.size()
        dist.all_gather_object(states, own, group=group)
        return merge_states(states)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a stage begins: fresh, with the weights of a checkpoint, or exactly where a checkpoint stood."""

    checkpoint: Path | None = None
    resume: RunState | None = None  # of `checkpoint`; None takes its weights alone
    startup: Startup = field(default_factory=Startup)
    given_up: frozenset[int] = frozenset()  # steps that are passed over, beside those that `resume` knows of

    def health(self) -> Health:
        """Of the stage that begins so."""
        health = Health.from_json({} if self.resume is None else self.resume.health)
        health.given_up = sorted(self.given_up.union(health.given_up))
        return health


def open_stage(
    config: PretrainConfig,
    settings: StageSettings,
    sources: Sources,
    device: Device,
    start: Start,
    exits: ExitStack,
) -> Stage:
    """Build groups, model, optimizer, plan and loader; `exits` unmakes what must be unmade.

    Collective over the world.
    """
    groups = build_groups(settings.topology, config.run.seed, device.torch_device)
    exits.callback(destroy_groups)
    start.startup.ended("groups")
    model = build_model(config, settings, groups, device, sources.content.text.image_id, start)
    clock = PassClock(groups.device)
    model.chunks[0].config.timers = clock
    saved = None if start.resume is None else PlanState.from_json(start.resume.plan)
    plan = open_plan(config, settings, sources, saved, (device.local_rank, groups.data_rank), exits)
    sharing = image_sharing(settings.parallel.vision_placement, groups)
    role = Role.of_stage(is_first=groups.is_first_stage, is_last=groups.is_last_stage, sharing=sharing)
    loader = exits.enter_context(
        build_loader(plan.client, sources, settings, role, config.data, pin_memory=device.kind == "cuda")
    )
    loader = exits.enter_context(loader)
    start.startup.ended("plan and loader")
    return Stage(
        settings=settings,
        model=model,
        schedule=_schedule(settings),
        loader=loader,
        first_step=1 if start.resume is None else start.resume.step + 1,
        plan=plan,
        health=start.health(),
        clock=clock,
        meter=Meter.of(config, settings, sources.modality, device),
    )


def build_model(
    config: PretrainConfig,
    settings: StageSettings,
    groups: Groups,
    device: Device,
    image_token: int,
    start: Start,
) -> Model:
    """Order matters: weights before DDP copies them into its buffers, freezing before DDP leaves parameters out,
    the optimizer before its state is loaded, all weights before encoders are copied."""
    on_cuda = device.kind == "cuda"
    division = Division(
        topology=settings.topology,
        layout=settings.layout,
        sequence_parallel=settings.parallel.sequence_parallel,
    )
    language = config.model.language
    use_transformer_engine = on_cuda and settings.parallel.transformer_engine
    core = transformer_config(
        language,
        division,
        config.recompute,
        config.train.precision,
        on_cuda=on_cuda,
        use_transformer_engine=use_transformer_engine,
        fp8=settings.parallel.fp8,
    )
    options = BuildOptions(
        image_token=image_token,
        use_transformer_engine=use_transformer_engine,
        recompute_vision=config.recompute.vision,
        compile_vision=settings.parallel.compile_vision,
    )
    chunks = build_chunks(core, config.model, options, groups.collection, device.torch_device)
    if start.checkpoint is None:
        initialize(chunks, config.run.seed, language.init_std, groups.collection)
    elif start.resume is None:
        start.startup.ended("model")
        load_weights(start.checkpoint, chunks, config.model)
        start.startup.ended("checkpoint load")
    for chunk in chunks:
        freeze(chunk, settings.values.train)
    wrapped = distribute(chunks, core, settings.parallel, groups)
    start.startup.ended("model")
    optimizer = build_optimizer(
        wrapped, config.train, settings.parallel, settings.values.vision_learning_rate_scale, groups.device
    )
    start.startup.ended("optimizer")
    if start.checkpoint is not None and start.resume is not None:
        load_training_state(start.checkpoint, wrapped, optimizer.inner, groups)
        start.startup.ended("checkpoint load")
    spread = None
    if settings.parallel.vision_placement == "spread":
        parts, recompute = settings.values.train, config.recompute.vision
        spread = spread_encoders(
            wrapped, config.model.vision, parts, groups, recompute, settings.parallel.compile_vision
        )
    return Model(chunks=wrapped, optimizer=optimizer, groups=groups, spread=spread)


def _schedule(settings: StageSettings) -> Schedule:
    values = settings.values
    return Schedule(
        kind=values.schedule,
        peak=values.learning_rate,
        num_steps=values.steps,
        warmup_fraction=values.warmup_fraction,
        decay_boundaries=values.decay_boundaries,
        decay_factors=values.decay_factors,
        min_ratio=values.min_learning_rate_ratio,
    )
