"""Where a run begins, agreed on by its ranks after they have read every byte of the checkpoint that it begins from."""

from collections.abc import Sequence
from pathlib import Path

from megatron_vl.checkpoint.finding import check_content, newest_good
from megatron_vl.checkpoint.state import RunState
from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig
from megatron_vl.train.resume import state_of_this_run
from megatron_vl.train.run_dir import RunDirectory


def agree_on_start(
    config: PretrainConfig, run: RunDirectory
) -> tuple[tuple[Path, RunState] | None, Sequence[str]]:
    """The newest good checkpoint of the run directory, None for a run that begins; and what to say of damaged ones that
    were passed over. Collective over the world.

    Raises:
        UserError: all checkpoints are damaged, or checkpoint.initial is, or the newest is of other values.
    """
    path, notices = newest_good(run.checkpoints)
    if path is not None:
        return (path, state_of_this_run(config, run, path)), notices
    if config.checkpoint.initial is not None:
        try:
            check_content(Path(config.checkpoint.initial))
        except UserError as error:  # its message begins with the path
            raise UserError(f"checkpoint.initial={error}") from error
    return None, notices
