"""A folder that appears under its name when it is whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megatron_vl.checkpoint.folder import aside_of
from megatron_vl.checkpoint.manifest import sync, sync_folder
from megatron_vl.config.errors import UserError


@contextmanager
def whole_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder to fill with about `num_bytes`; it is synced and renamed to `target` at the end, and removed after an
    error.

    Raises:
        UserError: `target` exists or cannot be made, or its disk is or gets full.
    """
    if os.path.lexists(target):  # a link to nothing is in the way too
        raise UserError(f"output={target} exists; name a folder that does not")
    aside = aside_of(target)
    try:
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed conversion
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if num_bytes > free:
            raise UserError(
                f"output={target} needs {_gigabytes(num_bytes)}, its disk has {_gigabytes(free)} free"
            )
        yield aside
        sync_folder(aside)
        aside.rename(target)
        sync(target.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_writing(error):
            raise
        free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
        raise UserError(
            f"output={target} cannot be written ({error}; its disk has {_gigabytes(free)} free); nothing was left there"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_of_writing(error: Exception) -> bool:
    """torch's writer loses what the system said, and reports that its file is shorter than it should be."""
    return not isinstance(error, RuntimeError) or "inline_container" in str(error)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
