"""An environment for each peer, since their requirements exclude each other; made on first use.

`benchmarks/peers/NAME.txt` pins everything. As with `make`, TORCH_INDEX_URL names the index of torch's CPU wheels.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.photographs import CACHE
from megatron_vl.config.errors import UserError

PEERS = Path(__file__).parent / "peers"
CPU = str(max(os.sched_getaffinity(0)))  # one core for all sides; the first one serves interrupts
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def peer_python(name: str) -> Path:
    """The interpreter of a peer's environment.

    An environment is complete when its stamp is there, which is written last and holds the digest of the pins.

    Raises:
        UserError: it cannot be made; no peer is ever left out instead.
    """
    folder, pins = CACHE / "environments" / name, PEERS / f"{name}.txt"
    python, stamp = folder / "bin" / "python", folder / "complete"
    digest = hashlib.sha256(pins.read_bytes() + platform.python_version().encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    print(f"making the environment of {name} (about 1 GB)", file=sys.stderr, flush=True)
    _run(name, [sys.executable, "-m", "venv", "--clear", str(folder)])
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    if index := os.environ.get("TORCH_INDEX_URL"):
        wheels = [line for line in pins.read_text().splitlines() if line.startswith("torch")]
        _run(name, [*install, "--no-deps", "--index-url", index, *wheels])
    _run(name, [*install, "--requirement", str(pins)])
    stamp.write_text(digest)
    return python


def measured(
    python: str | Path, script: Sequence[str], *arguments: str, all_cores: bool = False
) -> dict[str, Any]:
    """The JSON object that a timing script prints last, run with one thread and, if not on `all_cores`, on one.

    Raises UserError, with the end of what it said, where it fails.
    """
    on_one = [] if all_cores else ["taskset", "--cpu-list", CPU]
    command = [*on_one, str(python), *script, *arguments]
    output = _run(" ".join([*script, *arguments]), command, os.environ | ONE_THREAD)
    summary = json.loads(output.splitlines()[-1])
    assert isinstance(summary, dict)
    return summary


def _run(name: str, command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise UserError(f"{name}: `{' '.join(command[:6])} …` failed with status {done.returncode}: {said}")
    return done.stdout
