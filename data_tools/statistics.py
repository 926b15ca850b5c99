"""`python -m data_tools.statistics data=NAME [model=NAME]`: samples, images and lengths of all sources.

A table on the screen, and runs/statistics/NAME.html, a page with samples to look at. `model` says how many tokens an
image takes.
"""

from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data_tools.command import run_configured, source_urls, text_rule
from data_tools.counting import SourceCounts, count_source
from data_tools.report.page import write_page
from megatron_vl.config.data import DataConfig
from megatron_vl.config.model_check import tokens_per_image
from megatron_vl.config.root import PretrainConfig
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.storage.folder import AccessRule

PAGES = Path("runs/statistics")
QUANTILES = {"median": 0.5, "90 %": 0.9, "max": 1.0}


def print_statistics(config: DataConfig) -> None:
    """One row per folder. Raises UserError where a folder or its index is missing or differs."""
    console = Console()
    console.print(
        statistics_table(config.name, count_sources(config, ImageTokens(tokens_per_image=0), console))
    )


def count_sources(config: DataConfig, tokens: ImageTokens, console: Console) -> dict[str, SourceCounts]:
    """By folder, held-out ones too. Raises as `print_statistics` does."""
    rule, counts = text_rule(config), {}
    with Progress(console=console, transient=True) as progress:
        for name, url in source_urls(config).items():
            index = SourceIndex.open(
                url, rule, name=name, access=AccessRule.of(config.access), build_command=config.build_command
            )
            shards = progress.track(range(index.num_shards), description=name)
            counts[name] = count_source(index, shards, tokens)
    return counts


def statistics_table(name: str, counts: Mapping[str, SourceCounts]) -> Table:
    """Tokens are of text and ends of sentence; the model adds image tokens."""
    table = Table(
        title=f"data={name}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in ("source", "samples", "images", "tokens", "mean", *QUANTILES, "MB"):
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    for folder, found in counts.items():
        lengths = found.text_tokens
        table.add_row(
            folder,
            f"{lengths.number:,}",
            f"{found.images.total:,}",
            f"{lengths.total:,}",
            f"{lengths.mean:.0f}",
            *(f"{lengths.quantile(share):.0f}" for share in QUANTILES.values()),
            f"{found.index.size_bytes / 1e6:.1f}",
        )
    return table


def _run(config: PretrainConfig) -> None:
    console, tokens = Console(), ImageTokens(tokens_per_image=tokens_per_image(config.model))
    counts = count_sources(config.data, tokens, console)
    console.print(statistics_table(config.data.name, counts))
    page = PAGES / f"{config.data.name}.html"
    write_page(page, config.data, counts, f"{config.model.name}: {tokens.tokens_per_image} tokens an image")
    console.print(f"samples and histograms: {page}", highlight=False)


if __name__ == "__main__":
    run_configured(_run)
