"""How a checkpoint's folder appears under its name, and goes; at every moment what was whole still is. No torch.

.joint-00000200.tmp     being written, or being deleted; means nothing
joint-00000200          a checkpoint
joint-00000200.replaced the earlier one of that name, while another takes its place
joint-00000200.damaged  one whose files are not what was written; never read again, and left for people to look at
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_vl.checkpoint.manifest import damage, sync

ASIDE = ".tmp"
REPLACED = ".replaced"
DAMAGED = ".damaged"
OURS = re.compile(rf"\.\w+-\d+(\.\w+)*{re.escape(ASIDE)}")


def aside_of(path: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return path.with_name(f".{path.name}{ASIDE}")


def publish(aside: Path, path: Path) -> None:
    """Give a sealed folder its name, in place of another one of that name.

    Raises:
        OSError: some file is not there as it was written; nothing has changed then.
    """
    wrong = damage(aside)
    if wrong is not None:
        raise OSError(f"{aside}: {wrong}")
    replaced = path.with_name(path.name + REPLACED)
    if path.exists():
        discard(replaced)
        path.rename(replaced)
    aside.rename(path)
    sync(path.parent)
    discard(replaced)


def discard(path: Path) -> None:
    """Delete a folder, if it is there: its name goes first, so that half of it never passes for a checkpoint."""
    if not path.exists():
        return
    gone = aside_of(path)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    sync(path.parent)
    shutil.rmtree(gone)


def put_aside_as_damaged(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing reads it again; returns its new place."""
    target = path.with_name(path.name + DAMAGED)
    discard(target)
    path.rename(target)
    sync(path.parent)
    return target


def clear_leftovers(folder: Path) -> None:
    """Delete what killed runs left half written, half deleted or already replaced."""
    for path in folder.iterdir():
        if OURS.fullmatch(path.name):
            shutil.rmtree(path)
        elif path.suffix == REPLACED and path.with_suffix("").exists():
            discard(path)


def named_checkpoints(folder: Path) -> Iterator[Path]:
    """All folders that pass for a checkpoint by name."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.suffix in (ASIDE, DAMAGED) or not path.is_dir():
            continue
        if path.suffix != REPLACED or not path.with_suffix("").exists():
            yield path


def damaged_before(folder: Path) -> list[str]:
    """Names of those that were put aside as damaged."""
    return sorted(path.name for path in folder.glob(f"*{DAMAGED}"))
