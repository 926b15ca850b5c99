"""Every message that docs/troubleshooting.md quotes is one that the code says."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support.runs import CHECKOUT

PAGE = (CHECKOUT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)
VALUE = "\0"  # stands for what an f-string puts in


def spoken(source: str) -> Iterator[str]:
    """The strings of a file, those that stand beside each other as one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@cache
def code() -> str:
    folders = ("megatron_vl", "launch", "data_tools")
    files = [file for folder in folders for file in (CHECKOUT / folder).rglob("*.py")]
    return "\n\n".join(text for file in files for text in spoken(file.read_text(encoding="utf-8")))


def pattern(message: str) -> str:
    """… stands for values and for words between them, within one string; so does a number."""
    return r"[^\n]*?".join(re.escape(part.strip()) for part in message.split("…"))


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 30
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_it_is_said(message: str) -> None:
    assert max(len(part) for part in message.split("…")) >= 8, "too little to find it by"
    assert re.search(pattern(message), code()), message
