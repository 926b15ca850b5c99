"""mosaicml-streaming: MDS shards of the same samples, local, read in this process."""

from collections.abc import Iterator
from pathlib import Path

import torch
from work import Sample, in_its_format, time_loader

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # streaming imports torchvision, whose wheels on PyPI fit torch's for CUDA only. It uses none of its operators here,
    # but importing it asks for the names of two.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float limit) -> Tensor")

from streaming import MDSWriter, StreamingDataset


def convert(samples: Iterator[Sample], folder: Path) -> None:
    with MDSWriter(out=str(folder), columns={"image": "bytes", "text": "str"}) as writer:
        for image, text in samples:
            writer.write({"image": image, "text": text})


def samples(folder: Path) -> Iterator[Sample]:
    local = in_its_format(folder, "streaming", convert)
    dataset = StreamingDataset(local=str(local), shuffle=True, batch_size=1)
    while True:
        for sample in dataset:
            yield sample["image"], sample["text"]


if __name__ == "__main__":
    time_loader(samples)
