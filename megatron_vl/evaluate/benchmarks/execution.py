"""Generated programs, run against a benchmark's asserts.

A generated program is code that nobody has read. It runs in a process of its own with limits on time, memory,
files and processes, with no environment and in an empty folder. That stops accidents; it is no sandbox, for it
can read what its user can read and reach the network. So nothing runs unless it is asked for.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from megatron_vl.evaluate.benchmarks import run_answer
from megatron_vl.evaluate.items import Item

TIMEOUT_SECONDS = 20.0  # wall time; the limit of CPU time is in run_answer.py
_RUNNER = str(Path(run_answer.__file__))
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH")  # what an interpreter may need to start

_FENCED = re.compile(r"```[\w+-]*\s*?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def extract_code(text: str) -> str:
    """The program in an answer: its first fenced block, else everything up to [DONE]."""
    text = text.split("[DONE]")[0]
    fenced = _FENCED.search(text)
    return fenced[1] if fenced else text


def grade_by_execution(item: Item, text: str) -> float:
    """1.0 where the answer's program passes all asserts, which are the item's references."""
    return float(passes("\n".join((extract_code(text), *item.references))))


def passes(program: str, timeout_seconds: float = TIMEOUT_SECONDS) -> bool:
    """Whether a program runs to its end without an error. Raises OSError where no process can be started."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,  # a process group of its own
        )
        try:
            process.communicate(program.encode(errors="replace"), timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode == run_answer.PASSED
