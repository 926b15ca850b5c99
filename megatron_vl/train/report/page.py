"""Puts the report together from the files of a run directory."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf

from megatron_vl.train.metrics import read_rows
from megatron_vl.train.report import figures, tables
from megatron_vl.train.run_dir import RunDirectory, write_atomically

PACKAGE, TEMPLATE = "megatron_vl.train.report", "report.html.j2"


@dataclass(frozen=True)
class _Files:
    """What a run directory holds so far."""

    metrics: list[tables.Row]
    heldout: list[tables.Row]
    image_use: list[tables.Row]
    benchmarks: list[tables.Row]
    timelines: list[tables.Row]
    starts: list[tables.Row]
    checkpoints: list[tables.Row]
    samples: list[dict[str, Any]]
    config: dict[str, Any]


def write_report(run: RunDirectory) -> Path:
    """Write report.html, one self-contained page, and return its path.

    A part whose file the run has not written yet says so. Raises ValueError where a file is damaged.
    """
    files = _read(run)
    spans = tables.stage_spans(files.metrics)
    stages = [span.stage for span in spans]
    environment = Environment(loader=PackageLoader(PACKAGE, "."), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "count": _count,
        "difference": _difference,
        "duration": _duration,
        "figures": _figures,
        "percent": _percent,
        "seconds": _seconds,
        "share": _share,
    }
    page = environment.get_template(TEMPLATE).render(
        name=run.path.resolve().name,
        path=str(run.path),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        status=run.read_status(),
        spans=spans,
        totals=tables.totals(files.metrics),
        loss_figure=_figure(files.metrics, lambda: figures.loss_figure(files.metrics, spans)),
        source_figure=_figure(files.metrics, lambda: figures.source_loss_figure(files.metrics, spans)),
        ratios=tables.text_ratios(files.metrics),
        ratio_figure=_figure(
            files.metrics, lambda: figures.text_ratio_figure(tables.text_ratios(files.metrics), spans)
        ),
        heldout=tables.heldout_table(files.heldout, stages),
        heldout_figure=_figure(
            _between_ends(files.heldout, spans), lambda: figures.heldout_figure(files.heldout, spans)
        ),
        stages=stages,
        image_use=files.image_use,
        benchmarks=tables.benchmark_table(files.benchmarks),
        speeds=tables.speeds(files.metrics),
        speed_figure=_figure(files.metrics, lambda: figures.throughput_figure(files.metrics, spans)),
        bubbles=tables.bubbles(files.timelines),
        timeline_figure=_figure(
            files.timelines, lambda: figures.timeline_figure(_latest_timelines(files.timelines))
        ),
        startup=tables.startup_table(files.starts),
        savings=tables.savings(files.checkpoints),
        samples=files.samples,
        commit=files.config.pop("commit", None),
        versions=files.config.pop("environment", {}),
        config=OmegaConf.to_yaml(OmegaConf.create(files.config)) if files.config else None,
    )
    write_atomically(run.report, page)
    return run.report


def _read(run: RunDirectory) -> _Files:
    def rows(path: Path) -> list[tables.Row]:
        return list(read_rows(path)) if path.exists() else []

    samples = json.loads(run.samples.read_text(encoding="utf-8")) if run.samples.exists() else []
    config: Any = OmegaConf.to_container(OmegaConf.load(run.config)) if run.config.exists() else {}
    return _Files(
        metrics=rows(run.metrics),
        heldout=rows(run.heldout),
        image_use=rows(run.image_use),
        benchmarks=rows(run.benchmarks),
        timelines=rows(run.timeline),
        starts=rows(run.startup),
        checkpoints=rows(run.checkpoint_costs),
        samples=samples,
        config=config,
    )


def _figure(rows: Sequence[Any], draw: Callable[[], str]) -> Markup | None:
    """The SVG, marked as HTML of our own; None where there is nothing to draw."""
    return Markup(draw()) if rows else None


def _between_ends(heldout: Sequence[tables.Row], spans: Sequence[tables.Span]) -> list[tables.Row]:
    """Measurements that the table of starts and ends leaves out."""
    ends = {span.last for span in spans}
    return [row for row in heldout if row["step"] > 0 and row["global_step"] not in ends]


def _latest_timelines(timelines: Sequence[tables.Row]) -> list[tables.Row]:
    """The last recorded step of each modality."""
    latest = {row["modality"]: row for row in timelines}
    return [latest[modality] for modality in figures.MODALITIES if modality in latest]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _figures(value: float | None) -> str:
    """Three decimals, or two digits of what is smaller; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def _difference(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _seconds(pair: tuple[float, float] | None) -> str:
    """Here, and on the slowest rank."""
    return "–" if pair is None else f"{pair[0]:.1f} ({pair[1]:.1f})"
