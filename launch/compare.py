"""The runs of a sweep beside each other: `python -m launch.compare runs/sweep/* [--picture FILE]`.

A table on the screen (what differs, losses, held-out losses, speed) and a picture of the losses over the steps.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.comparison import MODALITIES, ComparedRun, differences, name_runs, read_runs
from launch.comparison_picture import draw
from megatron_vl.config.errors import UserError

PICTURE = "comparison.png"
NOTHING = "–"
RATES = {
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "mfu_with_vision": ("MFU with\nvision", "{:.1%}"),
}


def main(arguments: Sequence[str]) -> int:
    """Print the table and draw the picture. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.compare", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="a run directory; other files are left out"
    )
    parser.add_argument(
        "--picture", type=Path, help=f"where to draw; beside the runs, {PICTURE}, if not given"
    )
    given = parser.parse_args(arguments)
    folders = [path for path in given.runs if path.is_dir()]  # runs/sweep/* has files too
    try:
        runs = read_runs(folders)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table(runs))
    picture = given.picture or name_runs(folders)[0] / PICTURE
    if draw(runs, picture):
        print(f"picture: {picture}")
    return 0


def table(runs: Sequence[ComparedRun]) -> Table:
    """A row a run; a column for each difference, and for each result that some run has."""
    columns = {
        "run": [run.name for run in runs],
        "state": [f"{run.state}, {len(run.metrics)} steps" for run in runs],
    }
    columns |= differences([run.config for run in runs])
    for modality in MODALITIES:
        columns[f"loss,\n{modality}"] = [_loss(run.final_losses.get(modality)) for run in runs]
    for source in sorted({source for run in runs for source in run.heldout_losses}):
        columns[f"held out,\n{source}"] = [_loss(run.heldout_losses.get(source)) for run in runs]
    for field, (heading, form) in RATES.items():
        rates = [run.rate(field) for run in runs]
        columns[heading] = [NOTHING if rate is None else form.format(rate) for rate in rates]
    shown = {heading: cells for heading, cells in columns.items() if set(cells) != {NOTHING}}
    grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in shown:
        fields = [".\n".join(field.rsplit(".", 1)) for field in heading.split("\n")]
        grid.add_column("\n".join(fields), overflow="fold", vertical="top")
    for cells in zip(*shown.values(), strict=True):
        grid.add_row(*cells)
    return grid


def _loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
