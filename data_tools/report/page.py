"""Puts the page of `data_tools.statistics` together: one file, which needs no other."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from data_tools.counting import Bar, SourceCounts
from data_tools.report.examples import examples
from megatron_vl.config.data import DataConfig

TEMPLATE = "statistics.html.j2"
HELDOUT = "heldout/"


def write_page(path: Path, config: DataConfig, counts: Mapping[str, SourceCounts], model: str) -> None:
    """Write the page at `path`, whole or not at all. `model`: in words, what image tokens were counted by.

    Raises UserError where a shard cannot be read.
    """
    environment = Environment(
        loader=PackageLoader("data_tools.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"count": _count, "percent": _percent, "heights": _heights, "size": _size}
    training = {name: found for name, found in counts.items() if not name.startswith(HELDOUT)}
    page = environment.get_template(TEMPLATE).render(
        config=config,
        model=model,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        training=training,
        heldout={name: found for name, found in counts.items() if name.startswith(HELDOUT)},
        modality={name: source.modality for name, source in config.sources.items()},
        num_positions=max(1, sum(found.positions.total for found in training.values())),
        examples={name: examples(found.index, config) for name, found in training.items()},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".html.partial")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.2%}"


def _size(num_bytes: float) -> str:
    """Decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def _heights(bars: Sequence[Bar]) -> list[tuple[Bar, float]]:
    """Each bar with its height, in parts of the highest's."""
    highest = max((bar.num for bar in bars), default=1)
    return [(bar, bar.num / max(highest, 1)) for bar in bars]
