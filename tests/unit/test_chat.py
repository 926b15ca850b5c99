"""A conversation in the terminal, with a model that these tests make up."""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from launch import chat as chat_module
from launch.chat import HELP, chat
from megatron_vl.checkpoint.description import Description
from megatron_vl.config.errors import UserError
from megatron_vl.config.evaluate import ChatConfig, EvaluateConfig
from megatron_vl.config.model import ModelConfig
from megatron_vl.device.processes import RankEnvironment
from megatron_vl.evaluate.items import Item

Talk = Callable[..., list[str]]


class Parrot:
    """In place of an evaluator: it says how many messages there are and what the last one was."""

    def generate(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        (item,) = items
        said = item.prompt.messages[-1].content
        if len(said) > 40:
            raise UserError("item 'chat' takes 41 positions; 40 are left")
        return ["" if said == "hush" else f"{len(item.prompt.messages)} {said}"]


@pytest.fixture(name="talk")
def make_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Talk]:
    """What chat prints for the lines of its input."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    monkeypatch.setattr(chat_module, "open_evaluator", lambda *_: Parrot())
    description = Description(model=ModelConfig(), image_token_id=0, tokens=None)

    def talk(lines: bytes = b"", rank: int = 0, prompt: str | None = None) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
        environment = RankEnvironment(
            rank=rank, local_rank=rank, world_size=1, master_addr="127.0.0.1", master_port=0
        )
        assert chat(EvaluateConfig(chat=ChatConfig(prompt=prompt)), description, environment) == 0
        return capsys.readouterr().out.splitlines()

    yield talk
    if dist.is_initialized():
        dist.destroy_process_group()


def test_what_does_not_fit_is_forgotten_and_the_talk_goes_on(talk: Talk) -> None:
    help_line, *said, _ = talk(b"one\n" + b"long " * 20 + b"\ntwo\n")
    assert help_line == HELP
    assert said[0] == "1 one" and said[2] == "3 two"
    assert said[1].startswith("error: item 'chat' takes 41") and "/reset" in said[1]


def test_blank_lines_broken_bytes_and_marks_do_no_harm(talk: Talk) -> None:
    assert talk("\n  \nschön 你好\n".encode() + b"\xff\n<image>?\n")[1:-1] == ["1 schön 你好", "3 �", "5 ?"]


def test_an_empty_answer_shows(talk: Talk) -> None:
    assert talk(b"hush\n")[1] == "(the model says nothing)"


def test_commands_that_fail_say_so(talk: Talk) -> None:
    missing, unknown, reset, said, _ = talk(b"/image gone.png\n/foo\n/reset\none\n")[1:]
    assert missing == "error: image 'gone.png' is no file"
    assert unknown.startswith("error: /foo is no command; /image FILE")
    assert (reset, said) == ("forgotten", "1 one")


@pytest.mark.parametrize(("rank", "printed"), [(0, ["1 one"]), (1, [])])
def test_one_rank_prints_the_answer(rank: int, printed: list[str], talk: Talk) -> None:
    assert talk(rank=rank, prompt="one") == printed
