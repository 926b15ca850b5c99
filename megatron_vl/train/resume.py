"""Whether and where an earlier start of this run can be continued. No torch: the launcher asks too."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_vl.checkpoint.description import (
    Description,
    Tokens,
    check_same_weights,
    read_description,
)
from megatron_vl.checkpoint.state import RunState, newest_checkpoint, read_state
from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig
from megatron_vl.train.run_dir import RunDirectory

# What may differ on resume: where and how fast a run computes, what it reports; not what it computes.
FREE = (
    "parallel.",
    "recompute.",
    "cluster.",
    "checkpoint.",
    "heldout.",
    "evaluation.",
    "tracking.",
    "run.dir",
    "run.num_processes",
    "run.threads_per_process",
    "run.start_timeout_seconds",
    "run.timeout_seconds",
    "run.hang_seconds",
    "run.max_restarts",
    "node_check.",
    "train.stop_at",
    "train.faults.",
    "data.root",  # folders may move: the indexes' digests are compared
    "data.sources.",
    "data.tokenizer",
    "data.build_command",
    "data.prefetch_steps",
    "data.access.",
    "data.balance_lanes",
    "data.on_bad_sample",
    "data.on_change",
    "data.workers",
)
# What else may differ where changed sources begin anew (data.on_change=restart_sources).
OF_THE_PLAN = re.compile(
    r"data\..*|run\.seed|stage\.\w+\.(sources\..*|max_epochs\..*|text_ratio|text_warmup_fraction|grouping)"
)
FREE_OF_STAGE = re.compile(r"stage\.\w+\.(parallel|expected)\.\w+")


def fingerprint(config: PretrainConfig) -> dict[str, Any]:
    """Every value of the configuration that a resume must find unchanged, by its dotted name."""
    return {
        name: value
        for name, value in _flatten(asdict(config))
        if not name.startswith(FREE) and not FREE_OF_STAGE.fullmatch(name)
    }


def find_start(config: PretrainConfig, run: RunDirectory) -> tuple[Path, RunState] | None:
    """The newest checkpoint of the run directory whose files are all there, if there is one.

    Raises:
        UserError: all are damaged, or the newest was made with other values than the configuration's.
    """
    path = newest_checkpoint(run.checkpoints)
    return None if path is None else (path, state_of_this_run(config, run, path))


def state_of_this_run(config: PretrainConfig, run: RunDirectory, path: Path) -> RunState:
    """The state of a checkpoint in the run directory.

    Raises:
        UserError: it was made with other values than the configuration's, each of which is named.
    """
    state = read_state(path)
    current = fingerprint(config)
    restarts = config.data.on_change == "restart_sources"
    changes = [
        f"{name}={current.get(name)} (was {state.fingerprint.get(name)})"
        for name in sorted(current.keys() | state.fingerprint.keys())
        if current.get(name) != state.fingerprint.get(name) and not (restarts and OF_THE_PLAN.fullmatch(name))
    ]
    if changes:
        raise UserError(
            f"run.dir={run.path} holds a run with other values: {'; '.join(changes)}. Give the old values to resume "
            "it, or another run.dir to start anew"
        )
    return state


def describe(config: PretrainConfig, image_token_id: int) -> Description:
    """What the run's checkpoints say of their weights."""
    data = config.data
    tokens = Tokens(
        bos_token=data.bos_token,
        eos_token=data.eos_token,
        image_token=data.image_token,
        chat_template=data.chat_template,
    )
    return Description(model=config.model, image_token_id=image_token_id, tokens=tokens)


def check_initial(config: PretrainConfig) -> None:
    """What a run without a checkpoint of its own starts from.

    Raises:
        UserError: checkpoint.initial is no checkpoint, or not of this model, or is missing where weights may not be
            random.
    """
    if config.checkpoint.initial is not None:
        path = Path(config.checkpoint.initial)
        try:
            check_same_weights(path, read_description(path).model, config.model)
        except UserError as error:  # its message begins with the path
            raise UserError(f"checkpoint.initial={error}") from error
    elif not config.checkpoint.random:
        raise UserError(
            "checkpoint.initial=null and checkpoint.random=false: training would start from random weights. Import "
            "weights with python -m launch.convert direction=import and give checkpoint.initial=DIR, or give "
            "checkpoint.random=true"
        )


def is_complete(config: PretrainConfig, state: RunState) -> bool:
    """Whether the run that reached `state` has nothing left to train."""
    return state.stage == config.stages[-1] and state.stage_complete


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat
