"""What a part leaves out: rejected records by cause with an example of each, filtered ones by cause."""

import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_tools.recipe import Rejection, Rendered

REJECTED_NAME, FILTERED_NAME = "rejected.jsonl", "filtered.json"


class Journal:
    """A file that is only appended to; opened at `num_bytes`, what lies beyond that is cut off."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self._file = path.open("r+b" if num_bytes else "wb")
        self._file.truncate(num_bytes)
        self._file.seek(num_bytes)

    def append(self, data: bytes) -> None:
        self._file.write(data)

    def position(self) -> int:
        """Its bytes, all written to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class Tally:
    """Counts, which `state` brings back, and rejected.jsonl in `folder`, which lists every rejection."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self._rejected: Counter[str] = Counter(state.get("rejected", {}))
        self._filtered: Counter[str] = Counter(state.get("filtered", {}))
        self._examples: dict[str, str] = state.get("examples", {})
        # A draft of which some samples are rejected counts in part.
        self.num_rejected_drafts: float = state.get("num_rejected_drafts", 0.0)
        self._folder = folder
        self._list = Journal(folder / REJECTED_NAME, state.get("list_bytes", 0))

    def add(self, rendered: Rendered) -> None:
        """Count what of a draft is left out."""
        self._filtered.update(rendered.filtered)
        self.num_rejected_drafts += rendered.rejected_fraction
        for rejection in rendered.rejections:
            self._reject(rejection)

    def filter(self, cause: str) -> None:
        """Count a sample that is not wanted."""
        self._filtered[cause] += 1

    def state(self) -> dict[str, Any]:
        """What brings this back."""
        return {
            "rejected": self._rejected,
            "filtered": self._filtered,
            "examples": self._examples,
            "num_rejected_drafts": self.num_rejected_drafts,
            "list_bytes": self._list.position(),
        }

    def finish(self) -> None:
        """Leave rejected.jsonl and filtered.json, each where there is something to tell."""
        self._list.close()
        if not self._rejected:
            self._list.path.unlink()
        if self._filtered:
            (self._folder / FILTERED_NAME).write_text(
                json.dumps(dict(sorted(self._filtered.items())), indent=1)
            )

    def close(self) -> None:
        """Leave the list as it is."""
        self._list.close()

    def rejections(self, num_drafts: int) -> str:
        """The rejected by cause; empty for none."""
        causes = "; ".join(
            f"{count} x {cause}, such as {self._examples[cause]}"
            for cause, count in self._rejected.most_common()
        )
        found = f"{self.num_rejected_drafts:.6g} of {num_drafts} records cannot be used"
        return f"{found}: {causes}" if causes else ""

    def filters(self) -> str:
        """The filtered by cause; empty for none."""
        causes = "; ".join(f"{count} x {cause}" for cause, count in sorted(self._filtered.items()))
        return f"{self._filtered.total()} samples are filtered out: {causes}" if causes else ""

    def _reject(self, rejection: Rejection) -> None:
        self._rejected[rejection.cause] += 1
        self._examples.setdefault(rejection.cause, str(rejection))
        line = json.dumps(asdict(rejection), ensure_ascii=False) + "\n"
        self._list.append(line.encode(errors="backslashreplace"))
