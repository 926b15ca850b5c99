"""How to spread a model over a cluster: `python -m launch.plan model=M cluster=C 'stages=[joint]' [overrides]`.

The best settings of each stage with their simulated time and memory, as a table or, with output=json, as an object in
the last line. calibrate=true times this machine instead; verify=true builds ranks of the cluster without it.
"""

import sys

from rich.console import Console

from launch.command import run_command
from launch.plan_output import StagePlan, show
from megatron_vl.config.cluster import check_cluster
from megatron_vl.config.errors import UserError
from megatron_vl.config.model_check import check_model
from megatron_vl.config.parallel import RECOMPUTE, VISION_PLACEMENTS
from megatron_vl.config.plan import OUTPUTS, PlanConfig, register_plan_schema
from megatron_vl.device.processes import RankEnvironment, rank_environment
from megatron_vl.planning.search import search
from megatron_vl.train.division import stage_problem
from megatron_vl.train.settings import check_choices, one_of, stage_values


def plan(config: PlanConfig) -> int:
    """Do what the configuration asks for. Returns the exit status."""
    _check(config)
    if config.calibrate:
        return _calibrate(config)
    plans = [_plan_stage(config, name) for name in config.stages]
    if config.verify:
        from launch.verify import verify

        return verify(config, plans)
    show(config, plans)
    return 0


def _check(config: PlanConfig) -> None:
    check_choices(config)
    check_cluster(config.cluster)
    check_model(config.model)
    one_of("output", config.output, OUTPUTS)
    for field, choice, valid in (
        ("search.recompute", config.search.recompute, RECOMPUTE),
        ("search.vision_placement", config.search.vision_placement, VISION_PLACEMENTS),
    ):
        if choice is not None:
            one_of(field, choice, valid)
    sizes = ("tensor_size", "pipeline_size", "virtual_size", "micro_batch_size")
    numbers = {f"search.{size}": getattr(config.search, size) for size in sizes}
    for field, number in {"top": config.top, "rounds": config.rounds, **numbers}.items():
        if number is not None and number < 1:
            raise UserError(f"{field}={number}: must be at least 1")


def _plan_stage(config: PlanConfig, name: str) -> StagePlan:
    values = stage_values(config, name)
    problem = stage_problem(config, name, values)
    with Console(stderr=True).status(f"stage {name}: looking for the best settings"):
        return StagePlan(problem=problem, found=search(problem, config.search, config.top))


def _calibrate(config: PlanConfig) -> int:
    """On parallel.tensor_size ranks of this machine, or as one of them."""
    from launch.calibrate import calibrate, calibration_path

    environment = rank_environment()
    if environment is not None:
        return calibrate(config, environment)
    calibration_path(config)
    if config.parallel.tensor_size == 1:
        return calibrate(config, RankEnvironment.alone())
    from launch.ranks import start_local_ranks
    from megatron_vl.train.run_dir import RunDirectory

    run = RunDirectory(config.run.dir)
    run.acquire()
    return start_local_ranks(
        config.parallel.tensor_size, sys.argv[1:], run, config.run.threads_per_process or 1, "launch.plan"
    )


if __name__ == "__main__":
    register_plan_schema()
    run_command(plan, "plan")
