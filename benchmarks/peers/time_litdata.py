"""litdata: its chunks of the same samples, local, read in this process."""

from collections.abc import Iterator
from pathlib import Path

from litdata import StreamingDataset, optimize
from work import Sample, in_its_format, time_loader


def convert(samples: Iterator[Sample], folder: Path) -> None:
    inputs = [{"image": image, "text": text} for image, text in samples]
    optimize(fn=dict, inputs=inputs, output_dir=str(folder), chunk_bytes="16MB", num_workers=1, verbose=False)


def samples(folder: Path) -> Iterator[Sample]:
    dataset = StreamingDataset(str(in_its_format(folder, "litdata", convert)), shuffle=True)
    while True:
        for sample in dataset:
            yield sample["image"], sample["text"]


if __name__ == "__main__":
    time_loader(samples)
