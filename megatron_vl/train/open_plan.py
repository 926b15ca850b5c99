"""A stage's plan in training: where it goes on, and the process that makes it for each node."""

import secrets
import socket
from contextlib import ExitStack
from dataclasses import dataclass

import torch.distributed as dist

from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.plan import Planner
from megatron_vl.data.plan_change import check_resumable, restart_sources
from megatron_vl.data.plan_client import PlanClient, ServerSettings, plan_server
from megatron_vl.data.plan_settings import PlanSettings, fingerprint, weighed_sources
from megatron_vl.data.plan_state import PlanState
from megatron_vl.train.plan_settings import plan_settings
from megatron_vl.train.settings import StageSettings
from megatron_vl.train.sources import Sources


@dataclass(frozen=True, kw_only=True)
class OpenPlan:
    """A rank's way to the stage's plan, and what became of a saved one that the data have changed under."""

    client: PlanClient
    changes: list[str]


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
