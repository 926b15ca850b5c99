"""A folder that appears under its name when it is whole, or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vl.checkpoint.state import ASIDE
from megatron_vl.config.errors import UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it is synced and renamed to `target` at the end, and removed after an error.

    Raises:
        UserError: `target` exists, cannot be made, or its disk is full.
    """
    if target.exists():
        raise UserError(f"output={target} exists; name a folder that does not")
    aside = target.with_name(target.name + ASIDE)
    try:
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed conversion
        aside.mkdir(parents=True)
        yield aside
        _sync(aside)
        aside.rename(target)
    except OSError as error:
        raise UserError(_told(error, target)) from error
    except Exception as error:  # safetensors and torch wrap what the disk says
        if any(os.strerror(number) in str(error) for number in DISK_ERRORS):
            raise UserError(_told(error, target)) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _told(error: Exception, target: Path) -> str:
    return f"output={target} cannot be written: {str(error).splitlines()[-1]}; nothing was left there"


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
