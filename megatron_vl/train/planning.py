"""The stage's plan: its settings, where it goes on, and the process that makes it for each node."""

import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass

import torch.distributed as dist

from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.balance import RowCost
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_change import check_resumable, restart_sources
from megatron_vl.data.plan_client import PlanClient, ServerSettings, plan_server
from megatron_vl.data.plan_settings import PlanSettings, choose_lanes, fingerprint, weighed_sources
from megatron_vl.data.plan_state import PlanState
from megatron_vl.planning.dealing import slowest_stage
from megatron_vl.planning.workload import Load
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources


@dataclass(frozen=True, kw_only=True)
class OpenPlan:
    """A rank's way to the stage's plan, and what became of a saved one that the data have changed under."""

    client: PlanClient
    changes: list[str]


def plan_settings(config: PretrainConfig, stage: StageSettings, sources: Sources) -> PlanSettings:
    """What the stage's plan is made by. Raises UserError where the values make none."""
    data, values = config.data, stage.values
    return PlanSettings(
        stage=stage.name,
        seed=config.run.seed,
        num_steps=values.steps,
        text_ratio=values.text_ratio,
        text_warmup_fraction=values.text_warmup_fraction,
        grouping=values.grouping,
        sources=values.sources,
        max_epochs=values.max_epochs,
        global_batch_size=values.global_batch_size,
        micro_batch_size=values.micro_batch_size,
        sequence_length=values.sequence_length,
        packing=values.packing,
        lanes=choose_lanes(data.lanes, values.global_batch_size),
        shuffle_window=data.shuffle_window,
        packing_window=data.packing_window,
        max_carry_steps=data.max_carry_steps,
        flush_steps=data.flush_steps,
        max_images_per_pack=data.max_images_per_pack,
        balance_lanes=data.balance_lanes,
        cost=_row_cost(config, stage, sources),
    )


def open_plan(
    config: PretrainConfig,
    stage: StageSettings,
    sources: Sources,
    saved: PlanState | None,
    place: tuple[int, int],
    exits: ExitStack,
) -> OpenPlan:
    """Start the node's planning process, on its local rank 0, and connect to it. Collective over the world.

    `saved`: where to go on. `place`: this process's local rank, and its data-parallel rank. Raises UserError where
    the saved plan is another one (data.on_change=refuse), or the two have nothing in common.
    """
    local_rank, data_rank = place
    settings = plan_settings(config, stage, sources)
    saved, told = _follow_changes(config, settings, sources, saved)
    names: list[str] = [f"\0megatron-vl-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(names)
    address = f"{names[0]}-{socket.gethostname()}"  # nodes may be containers that share a network
    if local_rank == 0:
        server = ServerSettings(
            address=address,
            dp_size=stage.topology.data_size,
            plan=settings,
            sources=sources.planned(weighed_sources(sources.tables(), settings)),
            state=saved,
        )
        exits.enter_context(plan_server(server))
    first_step = 1 if saved is None else saved.step + 1
    client = exits.enter_context(PlanClient(address, data_rank, first_step))
    return OpenPlan(client=client, changes=told)


def _follow_changes(
    config: PretrainConfig, settings: PlanSettings, sources: Sources, saved: PlanState | None
) -> tuple[PlanState | None, list[str]]:
    if saved is None:
        return None, []
    tables = sources.tables()
    current = fingerprint(tables, settings)
    if config.data.on_change == "refuse":
        check_resumable(saved.fingerprint, current)
        return saved, []
    return restart_sources(saved, current, Planner(tables, settings).state().lanes)


def _row_cost(config: PretrainConfig, stage: StageSettings, sources: Sources) -> RowCost:
    """What rows cost the stage's slowest pipeline rank, by the sources' mean sample."""
    length = stage.values.sequence_length
    indexes = [sources.training[name] for name, weight in stage.values.sources.items() if weight > 0]
    num_samples = sum(index.num_samples for index in indexes)
    num_images = sum(index.num_images for index in indexes)
    per_image = sources.content.image_tokens.tokens_per_image
    num_tokens = sum(index.num_text_tokens for index in indexes) + num_images * per_image
    row = Load(
        num_tokens=length,
        num_images=length * num_images / max(num_tokens, 1),
        num_pairs=length * min(num_tokens / max(num_samples, 1), length) / 2,
    )
    flops = slowest_stage(config.model, stage.layout, stage.topology, stage.values.train, row)
    return RowCost(
        per_token=flops.per_token // 1000, per_image=flops.per_image // 1000, per_pair=flops.per_pair * 1000
    )
