"""A small file of conversations with its images, as a user has one, and the data set of it."""

import json
from pathlib import Path
from typing import Any

from megatron_vl.config.data import DataConfig, RawConfig, SourceConfig
from tests.support.tiny_data import BOS, EOS, picture, write_tokenizer

ANSWER = {"from": "gpt", "value": "A red bar."}


def write_images(folder: Path, count: int) -> list[str]:
    """Pictures of noise; their names."""
    folder.mkdir(parents=True)
    names = [f"{number}.{'png' if number % 2 else 'jpg'}" for number in range(count)]
    for number, name in enumerate(names):
        file_format = "PNG" if number % 2 else "JPEG"
        (folder / name).write_bytes(picture(40, 30, seed=number, file_format=file_format))
    return names


def write_raw(folder: Path, num_records: int = 60) -> None:
    """`folder`/records.json, images and tokenizer.json. Record i has i % 3 images and 1 + i % 2 turns."""
    names = write_images(folder / "images", num_records)
    records: list[dict[str, Any]] = []
    for number in range(num_records):
        images = [names[number], names[0]][: number % 3]
        turns = [{"from": "human", "value": "<image>\n" * len(images) + f"What is {number}?"}, ANSWER]
        turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": f"Yes, {number}."}] * (
            number % 2
        )
        field = {"image": images if len(images) > 1 else images[0]} if images else {}
        records.append({"id": f"r{number}", **field, "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records, indent=1))
    write_tokenizer(folder / "tokenizer.json")


def config_for(root: Path, raw: Path, **values: Any) -> DataConfig:
    """Conversations of `raw`, a fifth of them held out, built in `root`."""
    given = {"file": f"{raw}/records.json", "images": f"{raw}/images", "heldout_fraction": 0.2} | values
    source = SourceConfig(
        path=f"{root}/chat",
        heldout=f"{root}/heldout/chat" if given["heldout_fraction"] else None,
        modality="multimodal",
        raw=RawConfig(**given),
    )
    return DataConfig(
        name="mine",
        root=str(root),
        sources={"chat": source},
        tokenizer=f"{raw}/tokenizer.json",
        bos_token=BOS,
        eos_token=EOS,
        lanes=4,
    )
