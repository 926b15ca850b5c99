"""`python -m tests.support.faulty_pretrain <overrides>`: launch.pretrain with one thing that goes wrong in its ranks.

FAULT in the environment says what, as JSON: {"kind": …, "rank": …, "steps": […], …}; every kind is a function here.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {}


def fault(plant: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    FAULTS[plant.__name__] = plant
    return plant


def before_step(act: Callable[[Any], None]) -> None:
    """Call `act(stage)` before each step of the rank; TRAIL tells which one it is."""
    from megatron_vl.train import loop

    train = loop._train

    def train_after_act(stage: Any, *arguments: Any) -> Any:
        act(stage)
        return train(stage, *arguments)

    loop._train = train_after_act  # type: ignore[assignment]


def is_due(told: dict[str, Any]) -> bool:
    from megatron_vl.device.trail import TRAIL

    return TRAIL.step in told["steps"] and int(os.environ["RANK"]) == told["rank"]


@fault
def loss(told: dict[str, Any]) -> None:
    """The loss sum of a rank is multiplied, by null for NaN."""
    from megatron_vl.train import step

    run = step.run_microbatches
    factor = float("nan") if told["factor"] is None else told["factor"]

    def run_faulty(*arguments: Any) -> Any:
        result = run(*arguments)
        if is_due(told):
            result.loss_sum.mul_(factor)
        return result

    step.run_microbatches = run_faulty


@fault
def stuck(told: dict[str, Any]) -> None:
    """A rank stands still before its step, and lives."""
    before_step(lambda stage: time.sleep(1000) if is_due(told) else None)


@fault
def stopped(told: dict[str, Any]) -> None:
    """A rank is stopped before its step, as by SIGSTOP from outside."""
    before_step(lambda stage: os.kill(os.getpid(), signal.SIGSTOP) if is_due(told) else None)


@fault
def signalled(told: dict[str, Any]) -> None:
    """A rank gets SIGUSR1 before its step, and SIGTERM while it saves the checkpoint that follows."""
    from megatron_vl.train import loop

    save = loop._save

    def save_under_signal(*arguments: Any) -> None:
        if int(os.environ["RANK"]) == told["rank"]:
            os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    loop._save = save_under_signal
    before_step(lambda stage: os.kill(os.getpid(), signal.SIGUSR1) if is_due(told) else None)


@fault
def out_of_memory(told: dict[str, Any]) -> None:
    """A rank asks for more than there is, in the forward pass of its second microbatch."""
    import torch

    from megatron_vl.device.trail import TRAIL
    from megatron_vl.parallel import pipeline

    forward = pipeline._forward_step

    def forward_step(*arguments: Any, **named: Any) -> Any:
        if is_due(told) and TRAIL.number == 2:
            torch.empty(1 << 60)
        return forward(*arguments, **named)

    pipeline._forward_step = forward_step


@fault
def corrupted(told: dict[str, Any]) -> None:
    """A bit of the rank's last parameter, which every step uses, flips before its step."""
    import torch

    def flip(stage: Any) -> None:
        if is_due(told):
            *_, parameter = stage.model.chunks[0].module.parameters()
            parameter.data.view(torch.int32).view(-1)[0] ^= 1 << 25

    before_step(flip)


def main() -> None:
    told = json.loads(os.environ["FAULT"])
    if "RANK" in os.environ:
        FAULTS[told["kind"]](told)
    else:
        from launch import ranks

        module = "tests.support.faulty_pretrain"
        ranks.start_local_ranks = partial(ranks.start_local_ranks, module=module)
    from launch.command import run_command
    from launch.pretrain import pretrain

    run_command(pretrain)


if __name__ == "__main__":
    sys.exit(main())
