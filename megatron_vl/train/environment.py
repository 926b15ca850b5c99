"""What a run was made with: the code's commit and the versions of what it stands on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

LIBRARIES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "numpy",
    "tokenizers",
    "webdataset",
)
CHECKOUT = Path(__file__).resolve().parents[2]


def current_commit() -> str:
    """The checkout's commit, "+changes" added when tracked files differ from it; "unknown" elsewhere."""
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):  # no git, or an installed copy
        return "unknown"
    return f"{commit}+changes" if changes else commit


def environment_versions() -> dict[str, str]:
    """Versions of Python and the libraries present, and the devices, as text by name."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    versions["cpu_cores"] = str(len(os.sched_getaffinity(0)))
    if torch.cuda.is_available():
        versions["cuda"] = str(torch.version.cuda)
        versions["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return versions


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
