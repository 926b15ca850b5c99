"""`python -m data_tools.index data=NAME`: index all shards of a data set anew, with its tokenizer."""

import os
from collections.abc import Mapping

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from data_tools.command import run_command, source_folders, text_rule
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.indexing import IndexSummary, build_index


def index_sources(config: DataConfig, console: Console) -> dict[str, IndexSummary]:
    """Index every folder that the configuration names, held-out ones too. Raises as `build_index` does."""
    rule, folders = text_rule(config), source_folders(config)
    if not folders:
        raise UserError(f"data={config.name} names no sources (data.sources): nothing to index")
    summaries = {}
    with Progress(console=console, transient=True) as progress:
        for name, folder in folders.items():
            task = progress.add_task(name, total=None)

            def advance(done: int, total: int, task: TaskID = task) -> None:
                progress.update(task, completed=done, total=total)

            summaries[name] = build_index(
                folder,
                rule,
                max_sample_bytes=config.max_sample_bytes,
                num_processes=len(os.sched_getaffinity(0)),
                on_shard=advance,
            )
    return summaries


def summary_table(summaries: Mapping[str, IndexSummary]) -> Table:
    """Counts per source."""
    table = Table("source", *("shards", "samples", "images", "unreadable images", "text tokens", "MB"))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for name, summary in summaries.items():
        counts = (
            summary.num_shards,
            summary.num_samples,
            summary.num_images,
            summary.num_unreadable_images,
            summary.num_text_tokens,
            round(summary.size_bytes / 1e6),
        )
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _run(config: DataConfig) -> None:
    console = Console()
    console.print(summary_table(index_sources(config, console)))


if __name__ == "__main__":
    run_command(_run)
