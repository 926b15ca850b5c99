"""Says, before anything is downloaded, what this machine lacks and how to mend it: one line for each.

Runs on any Python from 3.8, with the standard library alone, so that an old Python can say it is old.

    python3 tools/preflight.py --disk-gb 3 --memory-gb 4 [--cuda-wheels-gb 10]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

OLDEST_PYTHON = (3, 11)
GB = 1e9
CPU_WHEELS = "ADDRESS, as pytorch.org's Get started page shows it for Linux, Pip, CPU"
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Finding(NamedTuple):
    """`level`: ok, warn (goes on) or fail (stops)."""

    level: str
    subject: str
    text: str


def check_system() -> Finding:
    if sys.platform.startswith("linux"):
        return Finding("ok", "system", "Linux")
    return Finding("fail", "system", f"{sys.platform}: only Linux is supported; use a container or WSL")


def check_python() -> Finding:
    found = "{}.{}".format(*sys.version_info[:2])
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return Finding("ok", "python", f"{found} at {sys.executable}")
    needed = "{}.{}".format(*OLDEST_PYTHON)
    fix = f"install Python {needed} or newer, or name one that you have: make PYTHON=python{needed} ..."
    return Finding("fail", "python", f"{found} at {sys.executable} is too old; {fix}")


def check_venv() -> Finding:
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if not missing:
        return Finding("ok", "venv", "present")
    fix = (
        "apt install python3-venv, or, without root, name a Python that has it: make PYTHON=/path/python3 ..."
    )
    return Finding("fail", "venv", f"this Python lacks {' and '.join(missing)}; {fix}")


def check_disk(folder: Path, needed_gb: float, cuda_wheels_gb: float | None, target: str) -> Finding:
    if not os.access(str(folder), os.W_OK):
        return Finding("fail", "disk", f"{folder} cannot be written; clone into a folder that you own")
    free_gb = shutil.disk_usage(str(folder)).free / GB
    text = f"{free_gb:.1f} GB free in {folder}"
    if free_gb < needed_gb:
        fix = f"needed: {needed_gb:g} GB; free some, or clone to a larger disk"
        return Finding("fail", "disk", f"{text}; {fix}")
    if cuda_wheels_gb is not None and free_gb < cuda_wheels_gb:
        fix = (
            f"PyTorch with CUDA takes {cuda_wheels_gb:g} GB; without a GPU, stop and take its CPU wheels: "
            f"make {target} TORCH_INDEX_URL={CPU_WHEELS}"
        )
        return Finding("warn", "disk", f"{text}; {fix}")
    return Finding("ok", "disk", text)


def check_memory(needed_gb: float) -> Finding:
    available_gb = available_memory_bytes() / GB
    text = f"{available_gb:.1f} GB available"
    if available_gb < needed_gb:
        fix = f"needed: {needed_gb:g} GB; close other programs, or raise the container's limit"
        return Finding("fail", "memory", f"{text}; {fix}")
    return Finding("ok", "memory", text)


def available_memory_bytes() -> float:
    """What the kernel could still give out, within the container's limit where there is one."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = float(fields["MemAvailable"].split()[0]) * 1024
    for path in map(Path, CGROUP_LIMITS):
        text = path.read_text().strip() if path.exists() else "max"
        if text != "max":
            available = min(available, float(text))
    return available


def findings(arguments: argparse.Namespace) -> list[Finding]:
    found = [check_system(), check_python(), check_venv()]
    found.append(check_disk(Path.cwd(), arguments.disk_gb, arguments.cuda_wheels_gb, arguments.target))
    if found[0].level == "ok":  # /proc is Linux
        found.append(check_memory(arguments.memory_gb))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check this machine before anything is downloaded.")
    parser.add_argument("--disk-gb", type=float, required=True, help="free disk without which nothing works")
    parser.add_argument(
        "--cuda-wheels-gb", type=float, help="warn below this, as PyTorch's CUDA wheels are coming"
    )
    parser.add_argument("--memory-gb", type=float, required=True, help="memory without which nothing works")
    parser.add_argument("--target", default="quickstart", help="the make target, for the commands suggested")
    found = findings(parser.parse_args(argv))
    for finding in found:
        print(f"[{finding.level:4}] {finding.subject:7}{finding.text}", flush=True)
    return int(any(finding.level == "fail" for finding in found))


if __name__ == "__main__":
    sys.exit(main())
