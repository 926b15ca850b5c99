"""Runs beside each other: what differs between their configurations, and what came of it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_vl.config.errors import UserError
from megatron_vl.train.metrics import read_rows
from megatron_vl.train.report.tables import Row, totals
from megatron_vl.train.run_dir import RunDirectory

NOT_COMPARED = ("commit", "environment.", "run.dir", "tracking.")  # where a run was, not what it trained
GIVEN, MISSING = "given", "–"
MODALITIES = ("multimodal", "text", "mixed")


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """One run as its files tell of it. `config` is None where it ended before it had any."""

    name: str
    state: str
    config: dict[str, Any] | None
    metrics: list[Row]
    heldout: list[Row]

    @property
    def final_losses(self) -> dict[str, float]:
        """By modality: the median over the last steps of the last stage that has it."""
        return totals(self.metrics).final_losses

    @property
    def heldout_losses(self) -> dict[str, float | None]:
        """By source, as measured last."""
        return {row["source"]: row["loss"] for row in self.heldout}

    def rate(self, field: str) -> float | None:
        """The mean of a metric over the time of the last stage, without its first step; None where it lacks."""
        rows = [row for row in self.metrics if row["stage"] == self.metrics[-1]["stage"]]
        rows = [row for row in rows[1:] if row.get(field) is not None]
        seconds = sum(row["step_seconds"] for row in rows)
        return sum(row[field] * row["step_seconds"] for row in rows) / seconds if seconds else None


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """The runs of `folders`. One that failed before its first step is a run without numbers.

    Raises:
        UserError: there are fewer than two, or a folder is no run directory.
    """
    if len(folders) < 2:
        raise UserError(f"{len(folders)} run directories are given; name at least two to compare")
    return [_read(folder, name) for folder, name in zip(folders, name_runs(folders)[1], strict=True)]


def name_runs(folders: Sequence[Path]) -> tuple[Path, list[str]]:
    """The deepest folder that all lie in, and each one's path from there."""
    parent = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    return parent, [str(folder.absolute().relative_to(parent)) for folder in folders]


def _read(folder: Path, name: str) -> ComparedRun:
    run = RunDirectory(folder)
    has_files = any(not path.name.startswith(".") for path in folder.iterdir())
    if has_files and not run.logs.is_dir():
        raise UserError(f"{folder} is no run directory: it has no folder {run.logs.name}")
    status = run.read_status()
    config: Any = OmegaConf.to_container(OmegaConf.load(run.config)) if run.config.exists() else None
    return ComparedRun(
        name=name,
        state=status.state if status else "not begun",
        config=config,
        metrics=list(read_rows(run.metrics)) if run.metrics.exists() else [],
        heldout=list(read_rows(run.heldout)) if run.heldout.exists() else [],
    )


def differences(configs: Sequence[Mapping[str, Any] | None]) -> dict[str, list[str]]:
    """Field -> its value in each configuration, where those that there are differ.

    Fields whose values differ alike share an entry: what is set in one place may be used in others.
    """
    known = [config for config in configs if config is not None]
    found: dict[tuple[str, ...], list[str]] = {}
    for field, values in _differing(known, "") if known else ():
        if not field.startswith(NOT_COMPARED):
            found.setdefault(values, []).append(field)
    columns = {}
    for values, fields in found.items():
        remaining = iter(values)
        columns["\n".join(fields)] = [MISSING if config is None else next(remaining) for config in configs]
    return columns


def _differing(values: Sequence[Any], field: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if all(value == values[0] for value in values):
        return
    if all(isinstance(value, Mapping) for value in values):
        for key in dict.fromkeys(key for value in values for key in value):
            yield from _differing([value.get(key) for value in values], f"{field}.{key}" if field else key)
    else:
        yield field, tuple(map(_shown, values))


def _shown(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.6g}"
        case list():
            return ", ".join(map(str, value))
        case Mapping():
            return GIVEN
    return str(value)
