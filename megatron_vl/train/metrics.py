"""One JSON object a line: what every step did, and how to take lines back when a run resumes earlier."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """A row of metrics.jsonl. Losses and norms are global, at full precision; NaN and infinity are null."""

    stage: str
    step: int  # from 1 within the stage
    global_step: int  # from 1 within the run
    modality: str  # text, multimodal or mixed
    loss: float  # per supervised token of the global batch
    loss_by_source: dict[str, float]  # the same, of each source that the step had
    grad_norm: float  # before clipping
    learning_rate: float
    num_tokens: int  # positions with content, padding left out
    num_tokens_by_source: dict[str, int]
    num_supervised_tokens: int
    num_samples: int
    num_failed_samples: int  # masked since their images could not be decoded
    num_images: int
    step_seconds: float
    tokens_per_second: float
    tokens_per_second_by_modality: dict[str, float]  # of their sources: text, multimodal
    images_per_second: float
    # Model FLOPs utilisation: of decoder and head, and of towers and adaptor too; null where the cluster's peak is
    # not known.
    mfu: float | None
    mfu_with_vision: float | None
    data_wait_seconds: float
    bytes_fetched: int  # from where shards lie, by all ranks since the step before
    bytes_used: int  # of them, members that samples consist of
    fullest_rank: int  # that holds most on its GPU, without GPUs most on its host
    host_memory_bytes: int  # resident, of its process
    device_peak_bytes: int | None  # the most that its tensors have had on the GPU so far
    device_reserved_bytes: int | None  # the most that torch has held there
    text_ratio: float  # scheduled share of text at this step
    text_share: float  # of the rows of this one
    skipped: bool = False  # loss or gradient was not finite, or the loss a spike: weights unchanged
    slowest_rank: int | None = None  # of the step before; by computing time, within its pipeline stage
    straggler_ratio: float | None = None  # its time over the median of that stage's ranks


@dataclass(frozen=True, kw_only=True)
class StartupSeconds:
    """A row of startup.jsonl: how long a stage's start took, phase by phase (`train.startup.PHASES`)."""

    stage: str
    step: int  # its first one, since the process began or the stage did
    global_step: int
    seconds: dict[str, float]  # on the rank that writes
    slowest: dict[str, float]  # on the rank that took longest for the phase


@dataclass(frozen=True, kw_only=True)
class HeldoutLoss:
    """A row of heldout.jsonl: loss per supervised token of a held-out source. `step` 0 is a stage's start."""

    stage: str
    step: int
    global_step: int
    source: str
    loss: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class ImageUse:
    """A row of image_use.jsonl: held-out loss with the right image and with another sample's, paired.

    `difference` = wrong - right, `low` to `high` its 95 % interval. Positive: the image is used.
    """

    stage: str
    global_step: int
    source: str
    right: float
    wrong: float
    difference: float
    low: float
    high: float
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """A row of benchmarks.jsonl: one metric of a benchmark, overall (accuracy) or of a category (accuracy/NAME)."""

    stage: str
    step: int
    global_step: int
    benchmark: str
    method: str  # choice, generate or bits_per_byte
    metric: str
    value: float
    num_items: int


class JsonLines:
    """Appends rows to a file; each line reaches the kernel at once, so that a killed process loses none.

    Rows are dataclasses or mappings that carry `global_step`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def append(self, row: Any) -> None:
        values = dict(row) if isinstance(row, Mapping) else asdict(row)
        if self._file is None:
            _cut_torn_end(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json.dumps(finite(values), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the rows are on disk. To be called before a checkpoint that relies on them."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def truncate_after(self, global_step: int) -> None:
        """Drop rows of later steps and a torn last line, so that after a resume every step stands once."""
        self.close()
        if not self.path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in read_rows(self.path) if row["global_step"] <= global_step]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _cut_torn_end(path: Path) -> None:
    """Drop a last line that a crash or a full disk has torn, lest the next one be joined to it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.truncate(path.read_bytes().rfind(b"\n") + 1)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file written by JsonLines; a last line torn by a crash is left out.

    Raises ValueError naming file and line for any other line that is not JSON.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or the torn line
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {line[:80]!r}") from error
        yield row


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
