"""Small data in the quickstart's layout, and training runs over it as a user starts them."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_vl.data.indexing import build_index
from tests.support.tiny_data import BOS, EOS, picture, text_rule, write_source, write_tokenizer

CHECKOUT = Path(__file__).parents[2]
WORDS = [
    "the",
    "picture",
    "shows",
    "a",
    "red",
    "bar",
    "and",
    "blue",
    "line",
    "with",
    "words",
    "in",
    "it",
    "图片",
]


def sentence(source: random.Random, words: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(words))


def build_data(root: Path, num_samples: int = 40) -> None:
    """`data.root=<root>`: every source of data=quickstart, `num_samples` each, 8 held out."""
    root.mkdir(parents=True, exist_ok=True)
    write_tokenizer(root / "tokenizer.json")
    for folder, count in (("", num_samples), ("heldout", 8)):
        for source in ("text", "pages", "figures", "photographs", "chat_text", "chat_pages", "chat_figures"):
            write_source(root / folder / source, dict(_sample(source, n, folder) for n in range(count)))
            index(root, str(Path(folder) / source))


def index(root: Path, source: str) -> None:
    build_index(root / source, text_rule(root / "tokenizer.json"), max_sample_bytes=1_000_000)


def _sample(source: str, number: int, folder: str) -> tuple[str, tuple[dict[str, Any], dict[str, bytes]]]:
    words = random.Random(f"{source} {number} {folder}")
    images = {} if "text" in source else {"0.png": picture(64, 48, seed=number)}
    mark = "<image>" if images else ""
    if source.startswith("chat"):
        messages = [
            {"role": "user", "content": f"{mark}{sentence(words, 4)}"},
            {"role": "assistant", "content": sentence(words, 5)},
        ]
        fields: dict[str, Any] = {"messages": messages}
    else:
        fields = {"text": mark + sentence(words, words.randrange(4, 30))}
    return f"{source}-{number:04d}", ({**fields, "source": source}, images)


def command(root: Path, run_dir: Path, *overrides: str) -> list[str]:
    """A short run over `build_data(root)`, in fp32 so that what ranks compute can be compared."""
    return [
        sys.executable,
        "-m",
        "launch.pretrain",
        f"data.root={root}",
        f"data.bos_token='{BOS}'",
        f"data.eos_token='{EOS}'",
        f"run.dir={run_dir}",
        "train.precision=fp32",
        "heldout.max_samples=4",
        *(f"stage.{stage}.sequence_length=192" for stage in ("adaptor", "joint", "sft")),
        "data.packing_window=8",
        "data.max_images_per_pack=3",
        *overrides,
    ]


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**inherited, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=CHECKOUT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def finish(arguments: list[str], timeout_seconds: float = 400) -> tuple[int, str]:
    """Run to the end. Returns the exit status and all that reached the screen.

    Raises TimeoutError: it ran longer; with what the screen and the logs of its ranks said last.
    """
    process = start(arguments)
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired as expired:
        screen = (expired.output or b"").decode(errors="replace")
        raise TimeoutError(
            f"still ran after {timeout_seconds} s: {' '.join(arguments)}\nscreen: {_end(screen)}{_logs(arguments)}"
        ) from None
    finally:
        process.kill()  # the ranks die with it
    return process.returncode, output


def _logs(arguments: list[str]) -> str:
    folders = [word.removeprefix("run.dir=") for word in arguments if word.startswith("run.dir=")]
    logs = [log for folder in folders for log in sorted(Path(folder).glob("logs/*.log"))]
    return "".join(f"\n{log.name}: {_end(log.read_text(errors='replace'))}" for log in logs)


def _end(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-20:])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """Global step, loss and gradient norm of every row, at full precision."""
    return [(row["global_step"], row["loss"], row["grad_norm"]) for row in metrics(run_dir)]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.01)
