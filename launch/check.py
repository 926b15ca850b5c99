"""What `launch.pretrain` would refuse, said in seconds and before ranks start: `python -m launch.check [overrides]`.

`run.num_processes` is the number of ranks that the run will have.
"""

from pathlib import Path

from launch.command import run_command
from megatron_vl.checkpoint.state import RunState
from megatron_vl.config.root import PretrainConfig
from megatron_vl.evaluate.suite_check import check_suite
from megatron_vl.train.plan_settings import check_plan
from megatron_vl.train.resume import check_initial, find_start, is_complete
from megatron_vl.train.run_dir import RunDirectory, RunStatus
from megatron_vl.train.settings import StageSettings, required_processes, resolve_stages
from megatron_vl.train.sources import open_sources


def check(config: PretrainConfig) -> int:
    """Print how the run would start. Returns the exit status."""
    world_size = config.run.num_processes or required_processes(config)
    stages = resolve_stages(config, world_size)
    run = RunDirectory(config.run.dir)
    found = find_start(config, run)
    if found is not None and is_complete(config, found[1]):
        print(f"{run.path} is complete ({found[1].global_step} steps): there is nothing left to train")
        return 0
    check_inputs(config, stages, found)
    names = ", ".join(stage.name for stage in stages)
    print(f"ready: {world_size} ranks, stages {names}; {_beginning(config, found)}")
    return 0


def check_inputs(
    config: PretrainConfig, stages: list[StageSettings], found: tuple[Path, RunState] | None
) -> None:
    """Look at weights, benchmarks, data and plans that a run would use which goes on from `found`, or starts.

    Raises:
        UserError: something is missing or does not fit; says what to pass.
    """
    if found is None:
        check_initial(config)
    check_suite(config.evaluation)
    sources = open_sources(config.data, config.model, stages)
    for stage in stages:
        check_plan(config, stage, sources)


def begin(run: RunDirectory, stages: list[StageSettings], found: tuple[Path, RunState] | None) -> None:
    """Say that the run is on its way, lest its last end be taken for the next one."""
    state = found[1] if found else None
    stage, step = (state.stage, state.step) if state else (stages[0].name, 0)
    run.write_status(RunStatus("running", stage, step))


def _beginning(config: PretrainConfig, found: tuple[Path, RunState] | None) -> str:
    if found is not None:
        return f"goes on in {config.run.dir} after step {found[1].step} of stage {found[1].stage}"
    weights = config.checkpoint.initial or "random weights"
    return f"starts in {config.run.dir} from {weights}"


if __name__ == "__main__":
    run_command(check)
