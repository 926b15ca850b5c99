"""A SLURM of two nodes on this machine (tools/slurm_cluster.sh), and jobs on it as an operator sees them."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import CHECKOUT, wait_for

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "unshare")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
HELD = "PENDING BeginTime"  # requeued, for two minutes
REFUSED_SECONDS = 3.0
CLUSTER = CHECKOUT / "tools" / "slurm_cluster.sh"


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed: make test-slurm installs SLURM"
    if os.geteuid() != 0:
        return "nodes with host names of their own need root"
    namespaces = ("unshare", "--mount", "--uts", "--pid", "--fork", "true")
    refused = subprocess.run(namespaces, stderr=subprocess.DEVNULL, check=False).returncode != 0
    return "namespaces cannot be made here, of which a node is one" if refused else ""


@dataclass(frozen=True)
class Slurm:
    """`folder` holds all of the cluster; `work` is where jobs are submitted from."""

    folder: Path
    work: Path

    def run(self, *words: str, timeout: float = 400, **variables: str) -> tuple[int, str]:
        """A command as its user. Returns its exit status and what it prints."""
        done = subprocess.run(
            words,
            cwd=self.work,
            env=self.environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "PYTEST_", "MASTER_"))
            and name not in ("RANK", "WORLD_SIZE", "PYTHONDONTWRITEBYTECODE")
        }
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "MEGATRON_VL_CLUSTER": "local_cpu"}
        return {**kept, **ours, **variables}

    def submit(self, *words: str, **variables: str) -> str:
        """The job's number. `words`: sbatch and its arguments, or a script that submits itself."""
        status, output = self.run(*words, **variables)
        found = re.search(r"Submitted batch job (\d+)", output)
        assert status == 0 and found, output
        return found[1]

    def facts(self, job: str) -> str:
        return self.run("scontrol", "show", "job", job)[1]

    def state(self, job: str) -> str:
        """Such as RUNNING, and why, such as BeginTime."""
        found = re.search(r"JobState=(\S+) Reason=(\S+)", self.facts(job))
        return " ".join(found.groups()) if found else ""

    def wait_for_state(self, job: str, *states: str, seconds: float = 600) -> None:
        """Each of `states` begins what is waited for. Where the job has ended otherwise, it fails at once."""
        held = [] if any("PENDING" in state for state in states) else [HELD]
        try:
            wait_for(
                lambda: self.state(job).startswith((*states, *ENDS, *held)),
                f"job {job} to be {' or '.join(states)}",
                seconds,
            )
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.state(job)}\n{self.log(job)}") from None
        assert self.state(job).startswith(states), f"job {job} is {self.state(job)}\n{self.log(job)}"

    def start_again_now(self, job: str) -> None:
        """A requeued job is held for two minutes; here for the seconds in which nodes still refuse it as one that was
        ended ("Job credential revoked")."""
        self.wait_for_state(job, HELD)
        time.sleep(REFUSED_SECONDS)
        assert self.run("scontrol", "update", f"jobid={job}", "StartTime=now")[0] == 0
        wait_for(lambda: self.state(job).startswith("RUNNING"), f"job {job} to run again", 600)

    @contextmanager
    def spare_node(self) -> Iterator[None]:
        """n3 is there for as long as this is open."""
        self.node("node", "n3")
        self.wait_for_idle("n3")
        try:
            yield
        finally:
            self.run("scontrol", "update", "nodename=n3", "state=down", "reason=spare")
            self.node("kill", "n3")

    def wait_for_idle(self, *names: str) -> None:
        """Until the controller has these nodes, and nothing is on them."""
        words = ("sinfo", "--noheader", "--Node", "--partition=work", "--states=idle", "--format=%N")
        wait_for(lambda: set(names) <= set(self.run(*words)[1].split()), f"{names} to be idle", 600)

    def log(self, job: str) -> str:
        """What the batch script printed, and then all ranks, by file."""
        files = [*self.work.glob(f"*-{job}.log"), *sorted(self.work.glob(f"logs/*-{job}/*.log"))]
        return "".join(f"\n{file.name}:\n{file.read_text(errors='replace')}" for file in files)

    def node(self, what: str, name: str) -> None:
        """`what`: kill, or node, which starts it again."""
        status, output = self.run(str(CLUSTER), what, str(self.folder), name)
        assert status == 0, output


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Two nodes for as long as it is open."""
    try:
        up = subprocess.run([CLUSTER, "up", folder], capture_output=True, text=True, timeout=120, check=False)
        assert up.returncode == 0, up.stdout + up.stderr
        yield folder
    finally:
        subprocess.run([CLUSTER, "down", folder], timeout=120, check=True)
