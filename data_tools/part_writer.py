"""Writes one part of a build: renders its drafts in other processes, a window at a time, counts what is rejected."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.progress import Progress

from data_tools.recipe import Part, Record, Rejection, Rendered
from megatron_vl.config.errors import UserError
from megatron_vl.data.shards import ShardWriter

REJECTED_NAME = "rejected.jsonl"
DRAFTS_PER_TASK = 8
TASKS_PER_PROCESS = 4  # rendered and not yet written at most: this bounds memory

Report = Callable[[str], None]


def write_part(
    part: Part, aside: Path, pool: Executor, num_processes: int, progress: Progress, report: Report
) -> None:
    """Fill the part's folders below `aside`, which appear there when all their shards are written.

    What was rejected is told by cause and listed in the first folder's rejected.jsonl. Raises UserError where
    it is more than the part allows, or leaves a folder without samples.
    """
    targets = [aside / folder for folder in part.folders]
    names = ", ".join(part.folders)
    if all(target.exists() for target in targets):
        progress.add_task(f"{names} (reused)", total=len(part.drafts), completed=len(part.drafts))
        return
    task = progress.add_task(names, total=len(part.drafts))
    staging = aside / "writing"
    for path in (*targets, staging):
        shutil.rmtree(path, ignore_errors=True)
    rejections = _Rejections(part, staging / part.folders[0] / REJECTED_NAME)
    with ExitStack() as stack:
        writers = [ShardWriter(staging / name, max_samples=part.samples_per_shard) for name in part.folders]
        for writer in writers:
            stack.enter_context(writer)
        for number, rendered in enumerate(_rendered(part, pool, num_processes)):
            rejections.add(rendered)
            for writer, records in zip(writers, rendered.records, strict=True):
                _write(writer, number, records)
            progress.advance(task)
    rejections.tell(report)
    for writer, folder in zip(writers, part.folders, strict=True):
        if part.drafts and not writer.num_samples:
            raise UserError(f"{folder}: none of the {len(part.drafts)} records is for this folder")
    for folder, target in zip(part.folders, targets, strict=True):
        target.parent.mkdir(exist_ok=True)
        (staging / folder).rename(target)
    shutil.rmtree(staging)


def _rendered(part: Part, pool: Executor, num_processes: int) -> Iterator[Rendered]:
    """In the order of the drafts. A pool's map alone would render all of them ahead of the writing."""
    window = DRAFTS_PER_TASK * TASKS_PER_PROCESS * num_processes
    for start in range(0, len(part.drafts), window):
        drafts = [part.drafts[n] for n in range(start, min(start + window, len(part.drafts)))]
        yield from pool.map(part.render, drafts, chunksize=DRAFTS_PER_TASK)


def _write(writer: ShardWriter, number: int, records: tuple[Record, ...]) -> None:
    """The keys of a draft's samples: FOLDER-000012, FOLDER-000012-1, FOLDER-000012-2, …"""
    for record in records:
        suffix = f"-{record.index}" if record.index else ""
        writer.write(f"{writer.folder.name}-{number:06d}{suffix}", record.fields, record.images)


class _Rejections:
    """Counts by cause with an example of each, and a file that lists all, made with the first."""

    def __init__(self, part: Part, path: Path) -> None:
        self._part, self._path = part, path
        self._counts: Counter[str] = Counter()
        self._num_drafts = 0.0  # rejected; a part of those of which some samples are
        self._examples: dict[str, Rejection] = {}

    def add(self, rendered: Rendered) -> None:
        """Raises UserError, naming every cause so far, where this is one too many."""
        if not rendered.rejections:
            return
        self._num_drafts += rendered.rejected_fraction
        for rejection in rendered.rejections:
            self._counts[rejection.cause] += 1
            self._examples.setdefault(rejection.cause, rejection)
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(asdict(rejection), ensure_ascii=False) + "\n")
        fraction = self._part.max_rejected_fraction
        if self._num_drafts > fraction * len(self._part.drafts):
            raise UserError(f"{self._summary()}; more than max_rejected_fraction={fraction} allows")

    def tell(self, report: Report) -> None:
        if self._counts:
            report(f"{self._summary()}; all are listed in {REJECTED_NAME}")

    def _summary(self) -> str:
        causes = "; ".join(
            f"{count} x {cause}, such as {self._examples[cause]}"
            for cause, count in self._counts.most_common()
        )
        found = f"{self._num_drafts:.6g} of {len(self._part.drafts)} records cannot be used"
        return f"{', '.join(self._part.folders)}: {found}: {causes}"
