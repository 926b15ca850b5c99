"""How commands compose the configuration, and how they end when a user can mend what is wrong."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from launch.sweep import is_job_of_sweep, run_job
from megatron_vl.config.errors import UserError
from megatron_vl.config.root import register_schemas
from megatron_vl.device.processes import die_with_launcher

CONFIG_FOLDER = Path(__file__).parent.parent / "hydra_conf"


def run_command(task: Callable[[Any], int], config_name: str = "pretrain") -> None:
    """Call `task` with `hydra_conf/<config_name>.yaml` after the command line's overrides; exit with its status.

    A UserError is printed alone, as one line that begins with "error: ", and the exit status is 1. Ranks of one run
    that meet the same error print it once. A Ctrl-C ends it with 130. With -m it is a sweep: every job is the
    same command in a process of its own (launch/sweep.py).
    """
    die_with_launcher()
    register_schemas()
    started = sys.modules["__main__"].__spec__  # asked now: around a sweep's job it may be submitit's
    module = started.name if started is not None else task.__module__
    ended_well: list[bool] = []

    @atexit.register
    def skip_finalization() -> None:
        """The last to be called, as the first to be registered. Taking torch's modules apart costs a second."""
        if ended_well == [True]:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    @hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)
    def compose(tree: DictConfig) -> float | None:
        if is_job_of_sweep():
            return run_job(module, has_run_directory="run" in tree)
        try:
            status = task(OmegaConf.to_object(tree))
        except UserError as error:
            if _is_first_to_report():
                print(f"error: {error}", file=sys.stderr, flush=True)
            status = 1
        except KeyboardInterrupt:  # asked for, so without a traceback
            print(file=sys.stderr, flush=True)  # ^C stands on the terminal's line
            status = 128 + signal.SIGINT
        ended_well.append(status == 0)
        sys.stdout.flush()
        if status:
            os._exit(status)  # threads of a broken process group must not keep a failed rank alive
        sys.exit(0)

    try:
        compose()
    except KeyboardInterrupt:  # between the jobs of a sweep
        sys.exit(128 + signal.SIGINT)


def _is_first_to_report() -> bool:
    """Whether no other rank of the run has reported; rank 0 alone reports before the ranks have met."""
    if "torch" not in sys.modules:
        return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    import torch.distributed as dist

    if not dist.is_initialized():
        return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
    store = dist.distributed_c10d._get_default_store()
    try:
        return bool(store.add("megatron_vl/reported_errors", 1) == 1)
    except dist.DistError:  # rank 0, which serves the store, has ended
        return True
