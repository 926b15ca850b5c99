"""What peers do with a sample's bytes, and the clock. Runs in the environments of peers, so nothing of ours is here.

H, W pixels.
"""

import io
import json
import shutil
import tarfile
import time
from argparse import ArgumentParser
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from tokenizers import Tokenizer

BACKGROUND = (122, 116, 104)  # of the larger tower
# Side of a tower's image: mean, std.
TOWERS = {384: ((0.5,) * 3, (0.5,) * 3), 1024: ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))}
# As in our loader: a row of 4096 positions holds six samples, two steps of four rows are held ahead.
BATCH_SIZE, BATCHES_AHEAD = 6, 8

Sample = tuple[bytes, str]  # image file, caption
Samples = Callable[[Path], Iterator[Sample]]  # of a folder's, epoch after epoch


def decode_by_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode_by_turbo(data: bytes) -> np.ndarray:
    """[H, W, 3]; simplejpeg is libjpeg-turbo, the fastest decoder that any of the peers can be given."""
    return simplejpeg.decode_jpeg(data) if data[:2] == b"\xff\xd8" else np.array(decode_by_pillow(data))


def pixels_as_usual(data: bytes) -> list[torch.Tensor]:
    """As models' own preprocessing does it: for each tower resized, padded, and normalised in float, by Pillow."""
    image = decode_by_pillow(data)
    return [_normalised(_padded(image, side), mean, std) for side, (mean, std) in TOWERS.items()]


def pixels_at_best(data: bytes) -> list[torch.Tensor]:
    """The same in bytes, with the fastest parts that there are; normalising is left to the device."""
    pixels = torch.from_numpy(decode_by_turbo(data)).permute(2, 0, 1)[None]
    return [_square_of_bytes(pixels, side) for side in TOWERS]


def one_square_at_best(data: bytes) -> list[torch.Tensor]:
    """Our own recipe: one square of bytes, of which the device makes the smaller tower's image too."""
    return [_square_of_bytes(torch.from_numpy(decode_by_turbo(data)).permute(2, 0, 1)[None], max(TOWERS))]


PIXELS = {"usual": pixels_as_usual, "best": pixels_at_best, "one-square": one_square_at_best}


def time_loader(samples: Samples) -> None:
    """The main of a peer's script: prints, for each way to make pixels, CPU milliseconds a sample, of all threads."""
    parser = ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_batches", type=int)
    parser.add_argument("pixels", choices=PIXELS, nargs="+")
    parser.add_argument("--batches", action="store_true", help="tokens too, and all of it as batches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    endless = samples(options.folder)
    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    ahead = deque(maxlen=BATCHES_AHEAD)

    def batch(pixels_of: Callable[[bytes], list[torch.Tensor]]) -> None:
        images, tokens = [], []
        for data, caption in islice(endless, BATCH_SIZE):
            images.append(pixels_of(data))
            if options.batches:
                tokens.append(torch.tensor(tokenizer.encode(caption).ids))
        if options.batches:
            ahead.append((torch.cat(tokens), *map(torch.stack, zip(*images, strict=True))))

    def cpu_ms(pixels_of: Callable[[bytes], list[torch.Tensor]]) -> float:
        for _ in range(BATCHES_AHEAD):
            batch(pixels_of)
        begun = time.process_time()
        for _ in range(options.num_batches):
            batch(pixels_of)
        return (time.process_time() - begun) * 1e3 / (options.num_batches * BATCH_SIZE)

    print(json.dumps({name: cpu_ms(PIXELS[name]) for name in options.pixels}))


def in_its_format(folder: Path, name: str, convert: Callable[[Iterator[Sample], Path], None]) -> Path:
    """The folder that `convert` writes the samples of the shards to, on first use."""
    converted, aside = folder / name, folder / f"{name}.partial"
    if not converted.exists():
        shutil.rmtree(aside, ignore_errors=True)
        convert(_samples_of_shards(folder), aside)
        aside.rename(converted)
    return converted


def _samples_of_shards(folder: Path) -> Iterator[Sample]:
    """In the order of the shards, where a sample's image stands before its JSON file."""
    for shard in sorted((folder / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = [tar.extractfile(member).read() for member in tar]
        for image, text in zip(files[::2], files[1::2], strict=True):
            yield image, json.loads(text)["text"]


def _square_of_bytes(pixels_13HW: torch.Tensor, side: int) -> torch.Tensor:
    scale = side / max(pixels_13HW.shape[2:])
    height, width = (int(length * scale) for length in pixels_13HW.shape[2:])
    resized = torch.nn.functional.interpolate(pixels_13HW, (height, width), mode="bicubic", antialias=True)
    square = torch.empty(3, side, side, dtype=torch.uint8)
    for channel, colour in zip(square, BACKGROUND, strict=True):
        channel.fill_(colour)
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = resized[0]
    return square


def _padded(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    resized = image.resize([int(length * scale) for length in image.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), BACKGROUND)
    square.paste(resized, ((side - resized.width) // 2, (side - resized.height) // 2))
    return square


def _normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """[3, side, side], as torchvision's ToTensor and Normalize compute it."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
