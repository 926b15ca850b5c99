"""Whether the nodes of a job are fit to train on: `python -m launch.node_check [overrides]`, a process for each rank.

Rank 0 prints a line "not fit: NODE,NODE" where some are not; what was measured goes to standard error. The run's status
names them too, so that `launch.requeue` counts such a start like any other in vain.
"""

import os
import sys
from dataclasses import replace

from launch.check import begin
from launch.command import run_command
from megatron_vl.config.errors import UserError
from megatron_vl.config.node_check import check_limits
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.processes import rank_environment
from megatron_vl.train.resume import find_start, is_complete
from megatron_vl.train.run_dir import MAX_MESSAGE, RunDirectory
from megatron_vl.train.settings import resolve_stages


def node_check(config: PretrainConfig) -> int:
    """Check, as a rank of the world that will train. Ends the process; with 0 also where nodes are named, with 1 where
    something is wrong with none in particular. Returns 0 where there is nothing to check."""
    check_limits(config.node_check)
    environment = rank_environment()
    if environment is None:
        raise UserError("launch.node_check is started as ranks, by the scripts in slurm/ or by torchrun")
    run = RunDirectory(config.run.dir)
    found = find_start(config, run)
    if not config.node_check.enabled or (found is not None and is_complete(config, found[1])):
        return 0
    if environment.rank == 0:
        run.acquire()
        begin(run, resolve_stages(config, environment.world_size), found)
    with run.failures_told(environment.rank):
        from launch.node_table import show
        from megatron_vl.measure.node_check import check_nodes

        verdict = check_nodes(environment, run.path, config.node_check)
    if verdict is not None:
        if verdict.wrong:
            _tell(run, verdict.wrong)
        show(verdict)
    sys.stdout.flush()
    names_none = verdict is not None and list(verdict.wrong) == [""]
    os._exit(1 if names_none else 0)  # a broken network may hold a thread for ever


def _tell(run: RunDirectory, wrong: dict[str, list[str]]) -> None:
    nodes = ",".join(filter(None, wrong))  # a rank may be silent on where it is
    reasons = "; ".join(f"{node or 'a node'}: {', '.join(found)}" for node, found in wrong.items())
    status = run.read_status()
    if status is not None:
        run.write_status(
            replace(status, state="failed", message=f"nodes are not fit: {reasons}"[:MAX_MESSAGE])
        )
    print(f"not fit: {nodes}", flush=True)


if __name__ == "__main__":
    run_command(node_check)
