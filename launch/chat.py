"""A conversation with a checkpoint in the terminal, about images too."""

import io
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from launch.model import open_evaluator
from megatron_vl.checkpoint.description import Description
from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import ChatConfig, EvaluateConfig
from megatron_vl.device.process_group import destroy_distributed
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.evaluate.conversation import Conversation
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import ImageFile

HELP = "/image FILE shows an image with your next message, /reset forgets the conversation, Ctrl-D ends it"
MAX_SILENCE_SECONDS = 7 * 24 * 3600


def chat(config: EvaluateConfig, description: Description, environment: RankEnvironment) -> int:
    """Talk until the input ends, or answer `chat.prompt`. Rank 0 reads; all ranks compute. Returns the status."""
    images = [_image(path) for path in config.chat.images]
    # While the user thinks, the other ranks wait in a broadcast.
    patient = replace(config, run=replace(config.run, timeout_seconds=MAX_SILENCE_SECONDS))
    evaluator, reads = open_evaluator(patient, description, environment), environment.rank == 0
    conversation = Conversation(system=config.chat.system, waiting=images)
    if config.chat.prompt is not None:
        answer = conversation.ask(config.chat.prompt, evaluator, config.chat.max_new_tokens)
        if reads:
            print(answer, flush=True)
    else:
        _talk(evaluator, conversation, config.chat, reads)
    destroy_distributed()
    return 0


def _talk(evaluator: Evaluator, conversation: Conversation, settings: ChatConfig, reads: bool) -> None:
    if reads:
        _prepare_input()
        print(HELP, flush=True)
    while (line := _next_line(reads)) is not None:
        try:
            said = _obey(line, conversation)
            if said is None:
                said = (
                    conversation.ask(line, evaluator, settings.max_new_tokens) or "(the model says nothing)"
                )
        except UserError as error:
            said = f"error: {error}"
            if not line.startswith("/"):
                said += "; this message is forgotten, /reset forgets the whole conversation"
        if reads:
            print(said, flush=True)


def _prepare_input() -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # broken UTF-8 in a pipe is no reason to fail
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then has arrow keys and a history


def _next_line(reads: bool) -> str | None:
    """The user's next line that is not blank, on all ranks; None at the end of the input."""
    read: list[str | None] = [None]
    if reads:
        try:
            while not (line := input("you> " if sys.stdin.isatty() else "").strip()):
                continue
            read = [line]
        except EOFError:
            print()
    dist.broadcast_object_list(read)
    return read[0]


def _obey(line: str, conversation: Conversation) -> str | None:
    """What a command did; None where the line is none.

    Raises:
        UserError: there is no such command, or no such image.
    """
    if not line.startswith("/"):
        return None
    command, _, argument = line.partition(" ")
    if command == "/image":
        conversation.waiting.append(_image(argument.strip()))
        return f"{argument.strip()} goes with your next message"
    if command == "/reset":
        conversation.reset()
        return "forgotten"
    raise UserError(f"{command} is no command; {HELP}")


def _image(path: str) -> ImageFile:
    if not Path(path).is_file():
        raise UserError(f"image {path!r} is no file")
    return ImageFile(name=path, path=Path(path))
