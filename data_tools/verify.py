"""`python -m data_tools.verify data=NAME`: read all shards from end to end, hold them against their indexes, decode
every image."""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from data_tools.command import run_command, source_urls, text_rule
from data_tools.shard_check import ShardTask, shard_problems
from data_tools.workers import in_order, worker_pool
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import INDEX_NAME, SourceIndex, listing_problems
from megatron_vl.data.storage.folder import AccessRule

Check = Callable[[Iterable[ShardTask]], Iterator[list[str]]]

HERE: Check = partial(map, shard_problems)


def verify(config: DataConfig, check: Check = HERE) -> None:
    """Print every problem as it is found. Raises UserError with their number where there are any.

    `check` gives the problems of shards, in their order: in this process, if nothing else is said.
    """
    console, num_problems = Console(soft_wrap=True), 0
    sources = source_urls(config)
    with Progress(console=console, transient=True) as progress:
        for name, url in sources.items():
            bar = progress.add_task(name, total=None)
            on_shard = partial(_advance, progress, bar)
            for problem in folder_problems(name, url, config, check, on_shard):
                console.print(problem, markup=False, highlight=False)
                num_problems += 1
    if num_problems:
        raise UserError(f"data={config.name}: {num_problems} problems, listed above")
    console.print(
        f"data={config.name}: all shards in {len(sources)} folders are as indexed, all samples decode"
    )


def folder_problems(
    name: str,
    url: str | Path,
    config: DataConfig,
    check: Check = HERE,
    on_shard: Callable[[int, int], None] | None = None,
) -> Iterator[str]:
    """What is wrong with a folder: the shard, and where a sample is affected its key and byte offset.

    `on_shard(done, total)` is called as shards are done.
    """
    access = AccessRule.of(config.access)
    try:
        index = SourceIndex.open(
            url,
            text_rule(config),
            name=name,
            access=access,
            build_command=config.build_command,
            check_shards=False,
        )
        index.folder.local_path(INDEX_NAME)  # shards are read as files: a remote folder needs a cache
        problems = list(listing_problems(index.folder, index))
    except UserError as error:
        yield str(error)
        return
    yield from problems
    tasks = (
        ShardTask(
            source=name,
            url=str(url),
            access=access,
            number=number,
            max_sample_bytes=config.max_sample_bytes,
            max_image_pixels=config.max_image_pixels,
        )
        for number in range(index.num_shards)
    )
    for done, problems in enumerate(check(tasks), start=1):
        yield from problems
        if on_shard is not None:
            on_shard(done, index.num_shards)


def _advance(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)


def _run(config: DataConfig) -> None:
    with worker_pool(len(os.sched_getaffinity(0))) as pool:
        verify(config, partial(in_order, pool, shard_problems))


if __name__ == "__main__":
    run_command(_run)
