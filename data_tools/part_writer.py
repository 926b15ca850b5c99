"""Writes one part of a build: renders its drafts in other processes, a window at a time, in order.

staging/<folder>        shards, and the one being written
staging/kept            the traits of the samples that the sieve kept
staging/progress.json   how far all of these are: written whenever a shard is finished, and where an
                        interrupted build goes on
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.progress import Progress

from data_tools.folder_writer import FolderWriter, Position
from data_tools.recipe import Part, Record, Rendered
from data_tools.tally import REJECTED_NAME, Journal, Tally
from megatron_vl.config.errors import UserError

PROGRESS_NAME, KEPT_NAME = "progress.json", "kept"
DRAFTS_PER_TASK = 8
TASKS_PER_PROCESS = 4  # rendered and not yet written at most: this bounds memory

Report = Callable[[str], None]
Stamp = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Who renders, and whom it is told."""

    pool: Executor
    num_processes: int
    progress: Progress
    report: Report

    def rendered(self, part: Part, first: int) -> Iterator[Rendered]:
        """Drafts from number `first`, in order. A pool's map alone would render all ahead of the writing."""
        window = DRAFTS_PER_TASK * TASKS_PER_PROCESS * self.num_processes
        for start in range(first, len(part.drafts), window):
            drafts = [part.drafts[n] for n in range(start, min(start + window, len(part.drafts)))]
            yield from self.pool.map(part.render, drafts, chunksize=DRAFTS_PER_TASK)


def write_part(part: Part, staging: Path, stamp: Stamp, crew: Crew) -> None:
    """Fill the part's folders below `staging`; go on there where an interrupted build of this `stamp` stopped.

    What was rejected is told by cause and listed in the first folder's rejected.jsonl, what was filtered counted
    in its filtered.json. Raises UserError where more is rejected than the part allows, or a folder has no samples.
    """
    names = ", ".join(part.folders)
    with _Writing.open(part, staging, stamp) as writing:
        task = crew.progress.add_task(names, total=len(part.drafts), completed=writing.next_draft)
        for rendered in crew.rendered(part, writing.next_draft):
            writing.add(rendered)
            crew.progress.advance(task)
        writing.finish()
        if rejections := writing.tally.rejections(len(part.drafts)):
            crew.report(f"{names}: {rejections}; all are listed in {REJECTED_NAME}")
        if filters := writing.tally.filters():
            crew.report(f"{names}: {filters}")


class _Writing:
    """All that a part has on disk so far, and what is remembered of it."""

    def __init__(self, part: Part, staging: Path, stamp: Stamp, state: Mapping[str, Any]) -> None:
        self.part, self.next_draft = part, state.get("next_draft", 0)
        self._staging, self._stamp = staging, stamp
        positions = state.get("positions", {})
        self._writers = [
            FolderWriter(staging / name, part.samples_per_shard, Position(**positions.get(name, {})))
            for name in part.folders
        ]
        self.tally = Tally(staging / part.folders[0], state.get("tally", {}))
        self._kept = Journal(staging / KEPT_NAME, state.get("kept_bytes", 0))
        self._sieve = part.sieve() if part.sieve is not None else None
        if self._sieve is not None:
            for traits in _read_kept(staging / KEPT_NAME):
                self._sieve.judge(traits)

    @classmethod
    def open(cls, part: Part, staging: Path, stamp: Stamp) -> Self:
        """Begin, or go on with what `staging` holds of the same stamp and folders."""
        stamp = {"stamp": dict(stamp), "folders": list(part.folders)}
        state = _read_progress(staging)
        if state is None or {name: state[name] for name in stamp} != stamp:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            state = {}
        return cls(part, staging, stamp, state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """What was written since the last finished shard is left, and cut off when the build goes on."""
        for writer in self._writers:
            writer.close()
        self.tally.close()
        self._kept.close()

    def add(self, rendered: Rendered) -> None:
        """Write a draft's samples. Raises UserError, naming every cause so far, where too many are rejected."""
        self.tally.add(rendered)
        fraction = self.part.max_rejected_fraction
        if self.tally.num_rejected_drafts > fraction * len(self.part.drafts):
            found = f"{', '.join(self.part.folders)}: {self.tally.rejections(len(self.part.drafts))}"
            raise UserError(f"{found}; more than max_rejected_fraction={fraction} allows")
        finished_shard = False
        for writer, records in zip(self._writers, rendered.records, strict=True):
            for record in filter(self._is_wanted, records):
                finished_shard |= writer.write(self.next_draft, record)
        self.next_draft += 1
        if finished_shard:
            self._save()

    def finish(self) -> None:
        """Complete the shards. Raises UserError where a folder has no samples."""
        for writer in self._writers:
            if self.part.drafts and not writer.num_samples:
                found = (
                    f"{writer.folder.relative_to(self._staging)}: none of the {len(self.part.drafts)} records"
                )
                raise UserError(f"{found} is for this folder")
            writer.finish()
        self.tally.finish()
        (self._staging / PROGRESS_NAME).unlink(missing_ok=True)  # from here, folders are moved out

    def _is_wanted(self, record: Record) -> bool:
        if self._sieve is None:
            return True
        if cause := self._sieve.judge(record.traits):
            self.tally.filter(cause)
            return False
        self._kept.append(struct.pack("<I", len(record.traits)) + record.traits)
        return True

    def _save(self) -> None:
        state = {
            **self._stamp,
            "next_draft": self.next_draft,
            "positions": {
                name: asdict(writer.position())
                for name, writer in zip(self.part.folders, self._writers, strict=True)
            },
            "tally": self.tally.state(),
            "kept_bytes": self._kept.position(),
        }
        aside = self._staging / f"{PROGRESS_NAME}.partial"
        aside.write_text(json.dumps(state))
        aside.replace(self._staging / PROGRESS_NAME)


def _read_progress(staging: Path) -> Any:
    """None where nothing was finished."""
    path = staging / PROGRESS_NAME
    return json.loads(path.read_bytes()) if path.exists() else None


def _read_kept(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size := file.read(4):
            yield file.read(struct.unpack("<I", size)[0])
