"""webdataset: its reader over the same shards."""

import json
from collections.abc import Iterator
from pathlib import Path

import webdataset as wds
from work import Sample, time_loader


def samples(folder: Path) -> Iterator[Sample]:
    shards = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    for sample in wds.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(64).repeat():
        image = sample.get("0.jpg") or sample["0.png"]
        yield image, json.loads(sample["json"])["text"]


if __name__ == "__main__":
    time_loader(samples)
