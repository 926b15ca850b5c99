"""Reads back what wandb recorded offline: LevelDB's log format, with the records that wandb's own protocol defines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
FULL, LAST = 1, 4


def history(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Step and values of every row that was logged, without those that wandb adds."""
    for message in _messages(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(message)
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            yield (
                record.history.step.num,
                {name: value for name, value in values.items() if not name.startswith("_")},
            )


def _messages(data: bytes) -> Iterator[bytes]:
    """A record is cut where a block ends; less than a header's room there is filled with zeros."""
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + RECORD_HEADER <= len(data):
        if BLOCK - at % BLOCK < RECORD_HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += RECORD_HEADER
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
