"""Train a vision-language model: `python -m launch.pretrain [overrides]`.

Started by hand it starts its local ranks itself; under torchrun or srun it is one rank. The same command again
resumes.
"""

import sys

from launch.check import begin, check_inputs
from launch.command import run_command
from megatron_vl.config.root import PretrainConfig
from megatron_vl.device.garbage import collection_paused
from megatron_vl.device.processes import rank_environment
from megatron_vl.train.resume import find_start, is_complete
from megatron_vl.train.run_dir import RunDirectory
from megatron_vl.train.settings import required_processes, resolve_stages


def pretrain(config: PretrainConfig) -> int:
    """Start the ranks of this machine, or be one. Returns the exit status."""
    environment = rank_environment()
    world_size = (
        environment.world_size if environment else config.run.num_processes or required_processes(config)
    )
    stages = resolve_stages(config, world_size)
    run = RunDirectory(config.run.dir)
    if environment is None or environment.rank == 0:
        run.acquire()
    found = find_start(config, run)
    if found is not None and is_complete(config, found[1]):
        if environment is None or environment.rank == 0:
            print(f"{run.path} is complete ({found[1].global_step} steps); its report: {run.report}")
        return 0
    if environment is None:
        from launch.ranks import start_local_ranks

        check_inputs(config, stages, found)  # before ranks start
        return start_local_ranks(world_size, sys.argv[1:], run, config.run.threads_per_process)
    if environment.rank == 0:
        begin(run, stages, found)
    with run.failures_told(environment.rank):
        with collection_paused():  # thousands of modules that all stay
            from launch.rank import run_rank

        return run_rank(config, environment, stages, run)


if __name__ == "__main__":
    run_command(pretrain)
