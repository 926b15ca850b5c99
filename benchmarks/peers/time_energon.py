"""megatron-energon: a crude dataset over copies of the same shards, prepared by its own tool, read in this process."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron import energon
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from work import Sample, time_loader


@dataclass
class Photograph(energon.Sample):
    image: bytes
    text: str


@energon.stateless
def cook(sample: dict[str, Any]) -> Photograph:
    image = sample.get("0.jpg") or sample["0.png"]
    return Photograph(
        **energon.basic_sample_keys(sample), image=image, text=json.loads(sample["json"])["text"]
    )


class Encoder(energon.DefaultTaskEncoder):
    """Samples one by one: no decoding and no batches, which all peers leave to `work`."""

    decoder = None
    cookers = (energon.Cooker(cook),)


def prepare(folder: Path) -> Path:
    """The data set, made on first use."""
    prepared = folder / "energon"
    if not prepared.exists():
        aside = folder / "energon.partial"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(folder / "shards", aside, ignore=shutil.ignore_patterns("*index*"))
        shards = sorted(path.name for path in aside.glob("*.tar"))
        WebdatasetPreparator.prepare_dataset(
            EPath(str(aside)), shards, split_parts_ratio=[("train", 1.0)], workers=1
        )
        kind = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        (aside / ".nv-meta" / "dataset.yaml").write_text(kind)
        aside.rename(prepared)
    return prepared


def samples(folder: Path) -> Iterator[Sample]:
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_train_dataset(
        str(prepare(folder)),
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=64,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    for photograph in energon.get_loader(dataset):
        yield photograph.image, photograph.text


if __name__ == "__main__":
    time_loader(samples)
