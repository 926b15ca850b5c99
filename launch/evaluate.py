"""Measure a checkpoint, or talk to it: `python -m launch.evaluate checkpoint=DIR [mode=chat|check] [overrides]`.

mode=benchmarks  evaluation=paper, or +evaluation.benchmarks.NAME.path=FILE, at any parallel setting; results go to
                 results.json and answers/ in run.dir, to the tracker and to the screen
mode=chat        a conversation in the terminal; chat.prompt=TEXT chat.images=[FILE] asks once
mode=check       nothing but what the benchmarks would refuse, in seconds
"""

import sys
from dataclasses import replace
from pathlib import Path

from launch.command import run_command
from megatron_vl.checkpoint.description import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    Description,
    read_description,
)
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import MODES, EvaluateConfig, register_evaluate_schema
from megatron_vl.config.train import PRECISIONS, TRACKING_MODES
from megatron_vl.device.processes import RankEnvironment, rank_environment
from megatron_vl.evaluate.suite_check import check_suite
from megatron_vl.planning.layout import divide
from megatron_vl.train.run_dir import RunDirectory


def evaluate(config: EvaluateConfig) -> int:
    """Start the ranks of this machine, or be one. Returns the exit status."""
    environment = rank_environment()
    description = _check(config)
    config = replace(config, data=_data_of(config, description))
    model_size = config.parallel.tensor_size * config.parallel.pipeline_size
    world_size = environment.world_size if environment else config.run.num_processes or model_size
    divide(description.model.language, config.parallel, world_size)  # refused before torch's seconds
    if config.mode == "chat":
        if environment is None and world_size > 1:
            raise UserError(
                f"mode=chat with {world_size} ranks needs a launcher that passes the terminal on: "
                f"torchrun --nproc-per-node {world_size} -m launch.evaluate …"
            )
        from launch.chat import chat

        return chat(config, description, environment or RankEnvironment.alone())
    run = RunDirectory(config.run.dir)
    if run.status.exists():
        raise UserError(
            f"run.dir={run.path} is where a training run writes; give a directory of its own, such as "
            f"{run.path / 'evaluate'}"
        )
    if config.mode == "check":
        print(f"ready: {world_size} ranks, {', '.join(config.evaluation.benchmarks)}")
        return 0
    if environment is None or environment.rank == 0:
        run.acquire()
    if environment is None:
        from launch.ranks import start_local_ranks

        return start_local_ranks(
            world_size, sys.argv[1:], run, config.run.threads_per_process, "launch.evaluate"
        )
    from launch.benchmarks import run_benchmarks

    return run_benchmarks(config, description, environment, run)


def _check(config: EvaluateConfig) -> Description:
    """What can be said before a process group is joined."""
    for field, value, valid in (
        ("mode", config.mode, MODES),
        ("precision", config.precision, PRECISIONS),
        ("tracking.wandb", config.tracking.wandb, TRACKING_MODES),
    ):
        if value not in valid:
            raise UserError(f"{field}={value}: must be one of {', '.join(valid)}")
    for field, number in (
        ("run.num_processes", config.run.num_processes),
        ("chat.max_new_tokens", config.chat.max_new_tokens),
    ):
        if number is not None and number < 1:
            raise UserError(f"{field}={number}: must be at least 1")
    for image in config.chat.images:
        if not Path(image).is_file():
            raise UserError(f"chat.images: {image} is no file")
    if not config.checkpoint:
        raise UserError(
            "checkpoint is not given: name the folder of one, such as runs/NAME/checkpoints/joint-00000350"
        )
    description = read_description(Path(config.checkpoint))
    suite = check_suite(config.evaluation)
    if config.mode != "chat" and not suite:
        raise UserError(
            "there is nothing to run: give evaluation=paper, or +evaluation.benchmarks.NAME.path=FILE for single "
            "benchmarks, or mode=chat"
        )
    return description


def _data_of(config: EvaluateConfig, description: Description) -> DataConfig:
    """The data settings with the checkpoint's tokenizer and tokens, unless others are given."""
    if config.data.tokenizer:
        return config.data
    tokenizer = Path(config.checkpoint) / TOKENIZER_FOLDER / TOKENIZER_FILE
    if description.tokens is None or not tokenizer.exists():
        raise UserError(
            f"{config.checkpoint} came without a tokenizer; give data.tokenizer=FILE (and data.bos_token, "
            "data.eos_token, data.image_token where they are not the released ones)"
        )
    return replace(config.data, tokenizer=str(tokenizer), **vars(description.tokens))


if __name__ == "__main__":
    register_evaluate_schema()
    run_command(evaluate, "evaluate")
