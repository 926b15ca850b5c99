"""The newest good checkpoint of a run, agreed on by all ranks, which read its files in equal shares."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_vl.checkpoint.folder import put_aside_as_damaged
from megatron_vl.checkpoint.manifest import damage, read_manifest, shares, wrong_digest
from megatron_vl.checkpoint.state import find_checkpoints, newest_checkpoint
from megatron_vl.config.errors import UserError


def newest_good(folder: Path) -> tuple[Path | None, Sequence[str]]:
    """The newest checkpoint whose every file is what was written, and what to say of those that were passed over: they
    are put aside as damaged. Collective over the world.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    notices: list[str] = []
    while True:
        path = _newest_by_size(folder, notices)
        wrong = None if path is None else content_damage(path)
        if path is None or wrong is None:
            return path, notices
        if dist.get_rank() == 0:
            notices.append(_put_aside(path, wrong))
        dist.barrier()


def check_content(path: Path) -> None:
    """Raise UserError unless every file of a checkpoint is what was written. Collective over the world."""
    wrong = content_damage(path)
    if wrong is not None:
        raise UserError(f"{path} is damaged: {wrong}")


def content_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, each read by one rank; the same on all. Collective over the world."""
    mine = damage(path)
    if mine is None:
        files = read_manifest(path)
        mine = wrong_digest(path, files, shares(files, dist.get_world_size())[dist.get_rank()])
    by_rank: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, mine)
    return next((wrong for wrong in by_rank if wrong is not None), None)


def _newest_by_size(folder: Path, notices: list[str]) -> Path | None:
    """As rank 0 finds it."""
    told: list[tuple[Path | None, str]] = [(None, "")]
    if dist.get_rank() == 0:
        try:
            path = newest_checkpoint(folder)
            notices += [_put_aside(*one) for one in find_checkpoints(folder).damaged]
            told = [(path, "")]
        except UserError as error:
            told = [(None, str(error))]
    dist.broadcast_object_list(told)
    path, refusal = told[0]
    if refusal:
        raise UserError(refusal)
    return path


def _put_aside(path: Path, wrong: str) -> str:
    return f"checkpoint {path.name} is damaged, and passed over: {wrong}; it is now {put_aside_as_damaged(path).name}"
