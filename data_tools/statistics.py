"""`python -m data_tools.statistics data=NAME`: samples, images and lengths of all sources."""

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_tools.command import run_command, source_folders, text_rule
from megatron_vl.config.data import DataConfig
from megatron_vl.data.index import SourceIndex

QUANTILES = {"median": 0.5, "90 %": 0.9, "max": 1.0}


def print_statistics(config: DataConfig) -> None:
    """One row per folder. Raises UserError where a folder or its index is missing or differs."""
    Console().print(statistics_table(config))


def statistics_table(config: DataConfig) -> Table:
    """See `print_statistics`. Tokens are of text and ends of sentence; the model adds image tokens."""
    title = f"data={config.name}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("source", "samples", "images", "tokens", "mean", *QUANTILES, "MB"):
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    rule = text_rule(config)
    for name, folder in source_folders(config).items():
        index = SourceIndex.open(folder, rule, name=name, build_command=config.build_command)
        lengths = np.concatenate(
            [index.columns(number).num_text_tokens for number in range(index.num_shards)]
        )
        table.add_row(
            name,
            f"{index.num_samples:,}",
            f"{index.num_images:,}",
            f"{lengths.sum():,}",
            f"{lengths.mean():.0f}",
            *(f"{np.quantile(lengths, quantile):.0f}" for quantile in QUANTILES.values()),
            f"{index.size_bytes / 1e6:.1f}",
        )
    return table


if __name__ == "__main__":
    run_command(print_statistics)
