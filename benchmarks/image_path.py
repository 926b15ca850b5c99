"""CPU time from a shard's bytes to what both vision towers take (384 and 1024): ours against webdataset and Pillow.

Also ours against the sum of its stages, each measured alone with bare libraries: read, decode, resize, pad. One core,
one thread, medians of interleaved repeats. Ends within 3 minutes, plus one for webdataset's environment on first use.
"""

import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from benchmarks.our_loader import NAME, STAGE, open_photographs
from benchmarks.peer_environments import CPU, PEERS, measured, peer_python
from benchmarks.photographs import samples_folder
from benchmarks.report import Goal, print_goals, run_benchmark, table
from megatron_vl.data.loader import Role
from megatron_vl.data.shard_index import Location
from megatron_vl.data.types import Unit
from megatron_vl.data.units import IndexedUnits
from megatron_vl.train.sources import Sources

REPEATS, NUM_IMAGES, PEER_BATCHES = 7, 120, 20
ONLY_IMAGES = Role(reads_tokens=False, reads_images=True, reads_labels=False)
SIDE = 1024
FASTER_THAN_PEER, BEYOND_STAGES = 4.0, 1.25

Pixels = NDArray[np.uint8]  # [H, W, 3], or [3, H, W] once it is resized


def read(location: Location) -> bytes:
    (image,) = location.images
    descriptor = os.open(location.shard, os.O_RDONLY)
    try:
        return os.pread(descriptor, image.size, image.offset)
    finally:
        os.close(descriptor)


def decode(data: bytes) -> Pixels:
    if data[:2] == b"\xff\xd8":
        pixels: Pixels = simplejpeg.decode_jpeg(data)
        return pixels
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def resize(pixels: Pixels) -> Pixels:
    scale = SIDE / max(pixels.shape)
    height, width = (int(side * scale) for side in pixels.shape[:2])
    pixels_13HW = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(pixels_13HW, (height, width), mode="bicubic", antialias=True)[0].numpy()


def pad(pixels: Pixels) -> Pixels:
    square = np.zeros((3, SIDE, SIDE), dtype=np.uint8)
    square[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return square


def cpu_ms(work: Callable[[int], object], count: int) -> float:
    """Milliseconds of CPU that `work` takes for each of `count` images."""
    begun = time.process_time()
    for number in range(count):
        work(number)
    return (time.process_time() - begun) * 1e3 / count


def sides(sources: Sources, num_images: int) -> dict[str, Callable[[int], object]]:
    """Our whole path and its stages, each from the number of an image."""
    index = sources.training[NAME]
    reader = IndexedUnits(sources.training, sources.content, STAGE.values.sequence_length, ONLY_IMAGES)
    units = [Unit(source=NAME, sample=row, piece=0, num_tokens=1, num_images=1) for row in range(num_images)]
    locations = [index.locate(row) for row in range(num_images)]
    files = [read(location) for location in locations]
    decoded = [decode(file) for file in files]
    resized = [resize(pixels) for pixels in decoded]
    return {
        "ours": lambda number: reader.read(units[number], range(1)),
        "read": lambda number: read(locations[number]),
        "decode": lambda number: decode(files[number]),
        "resize": lambda number: resize(decoded[number]),
        "pad": lambda number: pad(resized[number]),
    }


def figures(folder: Path, python: Path) -> dict[str, float]:
    """Medians, in CPU milliseconds an image."""
    of_ours = sides(open_photographs(folder), NUM_IMAGES)
    times: dict[str, list[float]] = {"webdataset + Pillow": [], **{name: [] for name in of_ours}}
    script = [str(PEERS / "time_webdataset.py")]
    for _ in range(REPEATS):
        for name, work in of_ours.items():
            times[name].append(cpu_ms(work, NUM_IMAGES))
        peer = measured(python, script, str(folder), str(PEER_BATCHES), "usual")
        times["webdataset + Pillow"].append(peer["usual"])
    return {name: median(values) for name, values in times.items()}


def goals(medians: dict[str, float]) -> list[Goal]:
    ours, peer = medians["ours"], medians["webdataset + Pillow"]
    stages = sum(medians[name] for name in ("read", "decode", "resize", "pad"))
    return [
        Goal(
            name="times less than webdataset + Pillow",
            ours=ours,
            peer=peer,
            unit="ms",
            ratio=peer / ours,
            bound="at least",
            goal=FASTER_THAN_PEER,
        ),
        Goal(
            name="times the sum of the stages",
            ours=ours,
            peer=stages,
            unit="ms",
            ratio=ours / stages,
            bound="at most",
            goal=BEYOND_STAGES,
        ),
    ]


def main() -> None:
    folder, python = samples_folder(), peer_python("webdataset")
    os.sched_setaffinity(0, {int(CPU)})
    torch.set_num_threads(1)
    medians = figures(folder, python)
    print(table(["CPU ms an image", ""], [[name, value] for name, value in medians.items()]), end="\n\n")
    print_goals("image_path", goals(medians))


if __name__ == "__main__":
    run_benchmark(main)
