"""A progress bar over the bytes of tensors as they are read, on a terminal; nothing elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megatron_vl.checkpoint.streaming import Entry


@contextmanager
def shown(entries: Mapping[str, Entry], title: str) -> Iterator[dict[str, Entry]]:
    """The same entries; the bar moves on as each is read."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=sum(entry.num_bytes for entry in entries.values()))

        def watched(entry: Entry) -> Entry:
            def read() -> Tensor:
                tensor = entry.read()
                progress.advance(task, entry.num_bytes)
                return tensor

            return replace(entry, read=read)

        yield {name: watched(entry) for name, entry in entries.items()}
