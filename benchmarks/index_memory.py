"""How the memory of planning grows with the data: an index of some shards, and one of ten times as many.

Indexes are synthetic, without a byte of tar: the shards share one file of columns, as a plan reads those of few
shards at a time. Each is opened by a process of its own, which plans for the 64 lanes that deal rows to one another
(data.balance_lanes), of 256. Its memory is what it has for itself (USS) but for the table of shards, which is mapped:
these pages are the kernel's to drop, and one copy serves all processes of a node. They are told beside it.

    python -m benchmarks.index_memory
"""

import gc
import hashlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.packing import settings
from benchmarks.report import Goal, print_goals, run_benchmark, table
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.index import SourceIndex, write_index
from megatron_vl.data.plan import Planner
from megatron_vl.data.shard_index import arrays_name
from megatron_vl.data.shard_table import BYTES_PER_SHARD, TABLE_NAME, ShardEntry
from megatron_vl.data.source_table import source_table
from megatron_vl.data.storage.folder import DEFAULT_ACCESS
from megatron_vl.data.storage.opening import open_folder

NUM_SHARDS, TIMES = 2000, 10
SAMPLES_PER_SHARD = 1000
NUM_STEPS = 20
SAMPLE_BYTES = 60_000  # of a sample's files, by which shards have their size
GOAL = 1.05
# Projected on paper, in shards as ShardWriter fills them
PROJECTED = {
    "2 T tokens, 1000 a document": (2_000_000_000, 0),
    "1 B images, one a sample": (1_000_000_000, 1),
}
SAMPLES_OF_FULL_SHARD = 10_000

SETTINGS = settings(sources={"samples": 1.0}, text_ratio=0.0)


class Use(NamedTuple):
    """Bytes that a process has for itself, those that it maps of the table, and CPU seconds of a group's step."""

    before: int
    opened: int
    planned: int
    mapped: int
    step_seconds: float


def columns(num_images: int) -> bytes:
    """An .index.npz of samples with 0 images or 1: keys as a build makes them, texts of 20 to 1500 tokens."""
    num, rng = SAMPLES_PER_SHARD, np.random.default_rng(0)
    offsets = np.arange(num, dtype=np.int64)[:, None] * SAMPLE_BYTES
    arrays: dict[str, Any] = {
        "keys": np.array([f"samples-{number:09d}".encode() for number in range(num)]),
        "num_text_tokens": rng.integers(20, 1500, num, dtype=np.int32),
        "num_images": np.full(num, num_images, dtype=np.int32),
        "text_members": offsets + np.array([512, 0]) + [0, 2000],
        "image_members": (offsets + np.array([3072, 0]) + [0, 56_000])[: num * num_images],
        "image_sizes": rng.integers(200, 1000, (num * num_images, 2), dtype=np.int32),
    }
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    return data.getvalue()


def write_synthetic(folder: Path, num_shards: int) -> None:
    """An index of shards that are not there."""
    folder.mkdir()
    data = columns(num_images=1)
    (folder / "columns").write_bytes(data)
    entries = []
    for number in range(num_shards):
        name = f"shard-{number:06d}.tar"
        os.link(folder / "columns", folder / arrays_name(name))
        entries.append(
            ShardEntry(
                name=name,
                size_bytes=SAMPLES_PER_SHARD * SAMPLE_BYTES,
                sha256="0" * 64,
                index_sha256=hashlib.sha256(data).hexdigest(),
                first_sample=number * SAMPLES_PER_SHARD,
                num_samples=SAMPLES_PER_SHARD,
                num_images=SAMPLES_PER_SHARD,
                num_text_tokens=760 * SAMPLES_PER_SHARD,
                num_unreadable_images=0,
                max_image_pixels=10**6,
            )
        )
    write_index(folder, SimpleNamespace(fingerprints={}), entries)  # type: ignore[arg-type]  # of a text rule, only these are written


def use_of(folder: Path) -> Use:
    """Open the index at `folder` and plan with it, in a process that has done nothing else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(plan_steps, folder).result()


def plan_steps(folder: Path) -> Use:
    """What `use_of` has done elsewhere."""
    before = sum(own_bytes())
    index = SourceIndex(open_folder(folder, DEFAULT_ACCESS), "samples")
    planner = Planner(
        {"samples": source_table(index, "multimodal", ImageTokens(tokens_per_image=576))}, SETTINGS, 0, 256
    )
    opened, _ = own_bytes()
    begun = psutil.Process().cpu_times().user
    for _ in range(NUM_STEPS):
        planner.next_of_group()
    seconds = psutil.Process().cpu_times().user - begun
    return Use(before, opened, *own_bytes(), seconds / NUM_STEPS)


def own_bytes() -> tuple[int, int]:
    """What this process has for itself without the table, and the table's pages that it has mapped."""
    gc.collect()
    process = psutil.Process()
    tables = [part for part in process.memory_maps() if Path(part.path).name == TABLE_NAME]
    own = sum(part.private_clean + part.private_dirty for part in tables)
    return process.memory_full_info().uss - own, sum(part.rss for part in tables)


def window_bytes(use: Use) -> float:
    """What a sample takes while a lane stands in its window."""
    return (use.planned - use.opened) / (SETTINGS.balance_lanes * SETTINGS.shuffle_window * SAMPLES_PER_SHARD)


def projection(use: Use) -> list[list[str | float]]:
    """Large sources on paper: on disk, mapped, and held by a node that plans for one group of lanes."""
    rows: list[list[str | float]] = []
    for name, (num_samples, num_images) in PROJECTED.items():
        num_shards = num_samples // SAMPLES_OF_FULL_SHARD
        per_sample = len(columns(num_images)) / SAMPLES_PER_SHARD
        windows = SETTINGS.balance_lanes * SETTINGS.shuffle_window * SAMPLES_OF_FULL_SHARD * window_bytes(use)
        rows.append(
            [
                name,
                f"{num_shards:,}",
                per_sample,
                f"{num_samples * per_sample / 1e9:,.0f}",
                f"{num_shards * BYTES_PER_SHARD / 1e6:,.0f}",
                f"{windows / 1e6:,.0f}",
            ]
        )
    return rows


def main() -> None:
    with TemporaryDirectory() as scratch:
        folders = {NUM_SHARDS * times: Path(scratch) / str(times) for times in (1, TIMES)}
        for num, folder in folders.items():
            write_synthetic(folder, num)
        uses = {num: use_of(folder) for num, folder in folders.items()}
    rows: list[list[str | float]] = [
        [
            f"{num:,} shards, {num * SAMPLES_PER_SHARD:,} samples",
            *(size / 1e6 for size in use[:4]),
            1e3 * use.step_seconds,
        ]
        for num, use in uses.items()
    ]
    print(
        table(["", "MB before", "opened", "after planning", "table, mapped", "ms a step"], rows), end="\n\n"
    )
    use = next(iter(uses.values()))
    print(
        f"held of a sample in a lane's window: {window_bytes(use):.0f} bytes; on disk of a shard: {BYTES_PER_SHARD}\n"
    )
    full = f"projected, {SAMPLES_OF_FULL_SHARD:,} samples a shard"
    header = [full, "shards", "bytes a sample", "GB on disk", "MB of table, mapped", "MB of windows, held"]
    print(table(header, projection(use)), end="\n\n")
    few, many = (uses[num].planned / 1e6 for num in uses)
    goal = Goal(
        name=f"memory with {TIMES} times the shards",
        ours=many,
        peer=few,
        unit="MB",
        ratio=many / few,
        bound="at most",
        goal=GOAL,
    )
    print_goals("index_memory", [goal])


if __name__ == "__main__":
    run_benchmark(main)
