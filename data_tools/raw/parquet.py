"""Rows of parquet files: read a row group at a time, of which a process holds one."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.raw.format import RecordError
from data_tools.raw.places import Places
from megatron_vl.config.errors import UserError

MAX_GROUP_BYTES = 2 << 30  # of a row group, uncompressed: every process that renders holds one


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row `number` of a file, which is row `row` of a row group."""

    number: int
    group: int
    row: int

    def __str__(self) -> str:
        return f"row {self.number}"

    def read(self, path: Path, max_bytes: int) -> dict[str, Any]:
        """Its columns by name. Raises RecordError where it cannot be read or is longer than `max_bytes`."""
        try:
            row = _group(str(path), self.group).slice(self.row, 1)
            if row.nbytes > max_bytes:
                raise RecordError(
                    "record too large", f"{row.nbytes} bytes; data.max_sample_bytes is {max_bytes}"
                )
            record: dict[str, Any] = row.to_pylist()[0]
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a text that is no UTF-8
            raise RecordError("broken parquet", f"row group {self.group}: {error}") from error
        return record


class Rows(Places[Row]):
    """The rows of a file, by its row groups' sizes."""

    def __init__(self, group_sizes: list[int]) -> None:
        self._ends = np.cumsum(group_sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _at(self, number: int) -> Row:
        group = int(np.searchsorted(self._ends, number, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        return Row(number=number, group=group, row=number - start)


def locate_in_parquet(path: Path, field: str, max_bytes: int) -> Rows:
    """The rows of a file. Raises UserError, naming `field`, where it is no parquet or a row group is too large."""
    del max_bytes
    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{field} has {path}, which cannot be read as parquet: {error}") from error
    for number, (_, size) in enumerate(sizes):
        if size > MAX_GROUP_BYTES:
            raise UserError(
                f"{field} has {path}, whose row group {number} has {size} bytes; at most {MAX_GROUP_BYTES} are read "
                "at once: write it with smaller row groups (row_group_size)"
            )
    return Rows([num_rows for num_rows, _ in sizes])


@lru_cache(maxsize=1)
def _group(path: str, number: int) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read_row_group(number)
