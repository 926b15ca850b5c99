"""A conversation with a checkpoint in the terminal, about images too."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from launch.model import open_evaluator
from megatron_vl.checkpoint.description import Description
from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import ChatConfig, EvaluateConfig
from megatron_vl.data.sample import IMAGE_MARK, Message, Sample
from megatron_vl.device.process_group import destroy_distributed
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.evaluate.items import ImageFile, Item

HELP = "/image FILE shows an image with your next message, /reset forgets the conversation, Ctrl-D ends it"


@dataclass(kw_only=True)
class Conversation:
    """What was said so far; `waiting` are images that go with the next message."""

    system: str
    messages: list[Message] = field(default_factory=list)
    images: list[ImageFile] = field(default_factory=list)
    waiting: list[ImageFile] = field(default_factory=list)

    def reset(self) -> None:
        self.messages, self.images, self.waiting = [], [], []
        if self.system:
            self.messages.append(Message(role="system", content=self.system))

    def ask(self, text: str) -> Item:
        """The conversation with one more message of the user's, who wrote no image marks of their own."""
        marks = IMAGE_MARK * len(self.waiting)
        content = marks + text.replace(IMAGE_MARK, "")
        self.messages.append(Message(role="user", content=content))
        self.images += self.waiting
        self.waiting = []
        return Item(key="chat", prompt=Sample(messages=tuple(self.messages)), images=tuple(self.images))

    def take_back(self) -> None:
        """Forget the last message and its images."""
        last = self.messages.pop()
        count = last.content.count(IMAGE_MARK)
        self.images = self.images[: len(self.images) - count]


def chat(config: EvaluateConfig, description: Description, environment: RankEnvironment) -> int:
    """Talk until the input ends, or answer `chat.prompt`. Rank 0 reads; all ranks compute. Returns the status."""
    images = [_image(path) for path in config.chat.images]
    evaluator = open_evaluator(config, description, environment)
    conversation = Conversation(system=config.chat.system)
    conversation.reset()
    conversation.waiting = images
    if config.chat.prompt is not None:
        print(_answer(evaluator, conversation, config.chat.prompt, config.chat), flush=True)
    else:
        _talk(evaluator, conversation, config.chat, reads=environment.rank == 0)
    destroy_distributed()
    return 0


def _talk(evaluator: Evaluator, conversation: Conversation, settings: ChatConfig, reads: bool) -> None:
    if reads:
        print(HELP, flush=True)
    while (line := _next_line(reads)) is not None:
        try:
            said = _obey(line, conversation) or _answer(evaluator, conversation, line, settings)
        except UserError as error:
            said = f"error: {error}"
        if reads:
            print(said, flush=True)


def _next_line(reads: bool) -> str | None:
    """The user's next line that is not blank, on all ranks; None at the end of the input."""
    read: list[str | None] = [None]
    if reads:
        try:
            while not (line := input("you> " if sys.stdin.isatty() else "").strip()):
                continue
            read = [line]
        except (EOFError, KeyboardInterrupt):
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


def _answer(evaluator: Evaluator, conversation: Conversation, text: str, settings: ChatConfig) -> str:
    """The model's answer, which becomes part of the conversation; a message that fails is taken back."""
    item = conversation.ask(text)
    try:
        (answer,) = evaluator.generate([item], settings.max_new_tokens)
    except UserError:
        conversation.take_back()
        raise
    conversation.messages.append(Message(role="assistant", content=answer))
    return answer


def _image(path: str) -> ImageFile:
    if not Path(path).is_file():
        raise UserError(f"image {path!r} is no file")
    return ImageFile(name=path, path=Path(path))
