"""This process among the others: which rank it is, and dying with whoever started it.

Imports no torch, so that a process can ask for both before the seconds which that takes.
"""

import ctypes
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from megatron_vl.config.errors import UserError

LAUNCHER_VARIABLE = "MEGATRON_VL_LAUNCHER"  # the local launcher's pid, for die_with_parent
STORE_VARIABLE = "MEGATRON_VL_STORE"  # descriptor of a listening socket, where rank 0 serves the ranks' store
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class RankEnvironment:
    """What a launcher tells each process that it starts.

    `store_descriptor`: of a socket that listens at the master's address, for rank 0 to serve the ranks' store there.
    None where the store has another host.
    """

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int
    store_descriptor: int | None = None

    @classmethod
    def alone(cls) -> Self:
        """A world of one, in this process."""
        return cls(rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=0)


def rank_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """This process's place as told by torchrun, or by srun; None when neither started it.

    torchrun's variables go first. srun's count only inside of a step: the batch script has some of them as
    well, but is no rank. Under srun the script that calls it exports MASTER_ADDR and MASTER_PORT; a step of one task
    without them is a shell, or a command that happens to run there.

    Raises:
        UserError: some of a launcher's variables are missing, or no number.
    """
    names = _launched_by(environ)
    if names is None:
        return None
    required = [*names.values(), "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in required if not environ.get(name)]
    if missing:
        raise UserError(
            f"{required[0]} is set to {environ[required[0]]!r} but {', '.join(missing)} is not: "
            f"start with torchrun, with srun from the scripts in slurm/, or set all of {', '.join(required)}"
        )
    numbers = {field: _integer(name, environ[name]) for field, name in names.items()}
    if not 0 <= numbers["rank"] < numbers["world_size"]:
        raise UserError(
            f"{names['rank']}={numbers['rank']} is not below {names['world_size']}={numbers['world_size']}"
        )
    port = _integer("MASTER_PORT", environ["MASTER_PORT"])
    store = _integer(STORE_VARIABLE, environ[STORE_VARIABLE]) if STORE_VARIABLE in environ else None
    return RankEnvironment(
        master_addr=environ["MASTER_ADDR"], master_port=port, store_descriptor=store, **numbers
    )


def _launched_by(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The names of the launcher's variables."""
    if "RANK" in environ:
        return {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
    is_step = "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ
    if is_step and (environ.get("SLURM_NTASKS") != "1" or "MASTER_ADDR" in environ):
        return {"rank": "SLURM_PROCID", "local_rank": "SLURM_LOCALID", "world_size": "SLURM_NTASKS"}
    return None


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name}={text!r} is not a whole number") from None


def die_with_launcher() -> None:
    """Where a launcher has started this process (ours, torchrun or srun), end when it ends, however it does."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None:
        die_with_parent(int(launcher))
    elif _launched_by(os.environ) is not None:
        die_with_parent()


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have Linux kill this process when its parent ends, however that ends. Children do not inherit this.

    The signal really follows the parent's *thread* which started this process, so start ranks from a thread
    that lasts.

    Args:
        parent_pid: of the process that started this one, if it told: had it ended before this call, this
            process has another parent by now and ends itself.

    Raises:
        OSError: the kernel refuses.
    """
    before = os.getppid() if parent_pid is None else parent_pid
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != before:
        os.kill(os.getpid(), signal.SIGKILL)
