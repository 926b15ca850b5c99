"""`python -m data_tools.verify data=NAME`: compare all shards with their indexes and decode every sample."""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

from data_tools.command import run_command, source_folders, text_rule
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.images import FORMATS
from megatron_vl.data.index import SourceIndex, file_sha256
from megatron_vl.data.sample import SampleError, parse_sample
from megatron_vl.data.shard_reader import ShardReader


def verify(config: DataConfig) -> None:
    """Print every problem as it is found. Raises UserError with their number where there are any."""
    console, num_problems = Console(soft_wrap=True), 0
    folders = source_folders(config)
    for name, folder in track(folders.items(), "verifying", console=console, transient=True):
        for problem in folder_problems(name, folder, config):
            console.print(problem, markup=False, highlight=False)
            num_problems += 1
    if num_problems:
        raise UserError(f"data={config.name}: {num_problems} problems, listed above")
    console.print(
        f"data={config.name}: all shards in {len(folders)} folders are as indexed, all samples decode"
    )


def folder_problems(name: str, folder: Path, config: DataConfig) -> Iterator[str]:
    """What is wrong with a folder: the shard, and where a sample is affected its key and byte offset."""
    try:
        index = SourceIndex.open(
            folder,
            text_rule(config),
            name=name,
            max_image_pixels=config.max_image_pixels,
            build_command=config.build_command,
        )
    except UserError as error:
        yield str(error)
        return
    for shard in index.shards():
        found = file_sha256(folder / shard.name)
        if found != shard.sha256:
            difference = f"sha256 {found[:12]}, not {shard.sha256[:12]}"
            yield f"shard {folder / shard.name} differs from its index: {difference}"
    reader = ShardReader()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for problems in pool.map(lambda row: _sample_problems(index, row, reader), range(index.num_samples)):
            yield from problems


def _sample_problems(index: SourceIndex, row: int, reader: ShardReader) -> list[str]:
    location = index.locate(row)
    problems = []
    try:
        data = reader.read(location, location.text)
        parse_sample(data, location.key, location.shard, max_bytes=len(data))
    except SampleError as error:
        problems.append(f"{error} (at byte {location.text.offset})")
    for number, member in enumerate(location.images):
        try:
            with Image.open(io.BytesIO(reader.read(location, member)), formats=FORMATS) as image:
                image.load()
        except Exception as error:  # Pillow's plugins raise many kinds on garbage
            sample = f"sample {location.key!r} in {location.shard}"
            problems.append(f"{sample}: image {number} at byte {member.offset} cannot be decoded: {error}")
    return problems


if __name__ == "__main__":
    run_command(verify)
