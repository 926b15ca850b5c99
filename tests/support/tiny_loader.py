"""A source of four samples and what a loader over it needs, for tests of the loader."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_vl.data.batch import PADDING, RowRule
from megatron_vl.data.image_tokens import ImageTokens
from megatron_vl.data.images import ImageRule
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import build_index
from megatron_vl.data.loader import ContentRule, LoadedStep, Loader, LoadingRule, Role
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.source_table import source_table
from megatron_vl.data.types import MULTIMODAL, Pack, StepPlan, Unit
from megatron_vl.data.units import IndexedUnits
from tests.support.tiny_data import Samples, picture, text_rule, write_source, write_tokenizer

TOKENS_PER_IMAGE = 4
ROW = 64
PACKED = RowRule(sequence_length=ROW, packing=True, micro_batch_size=1)
ALL = Role(reads_tokens=True, reads_images=True, reads_labels=True)
NOTHING = Role(reads_tokens=False, reads_images=False, reads_labels=False)
DOCUMENT = " ".join(f"word{i}" for i in range(60))
CHAT = [
    {"role": "user", "content": "<image><image>which is red?"},
    {"role": "assistant", "content": "the line"},
]
SAMPLES: Samples = {
    "caption": ({"text": "a red bar <image>"}, {"0.png": picture(40, 30, seed=1)}),
    "chat": (
        {"messages": CHAT},
        {"0.png": picture(seed=2), "1.jpg": picture(9, 50, seed=3, file_format="JPEG")},
    ),
    "plain": ({"text": "only words", "supervised": [[5, 10]]}, {}),
    "document": ({"text": DOCUMENT}, {}),
}
CAPTION, CHAT_ROW, PLAIN, LONG = range(4)


class LoaderSetup:
    """A source of the samples above, in one shard each."""

    def __init__(self, folder: Path) -> None:
        text = text_rule(write_tokenizer(folder / "tokenizer.json"))
        self.folder = folder / "source"
        write_source(self.folder, SAMPLES, max_samples=1)
        build_index(self.folder, text, max_sample_bytes=100_000)
        self.index = SourceIndex.open(self.folder, text, name="mixed")
        image = ImageRule(size=32, mean=(0.5, 0.5, 0.5), max_pixels=10_000)
        self.content = ContentRule(
            text=text,
            image=image,
            image_tokens=ImageTokens(tokens_per_image=TOKENS_PER_IMAGE),
            max_sample_bytes=100_000,
        )

    def unit(self, row: int, piece: int = 0) -> Unit:
        rest = self.num_positions(row) - piece * ROW
        num_images = len(self.index.locate(row).images)
        return Unit(source="mixed", sample=row, piece=piece, num_tokens=min(rest, ROW), num_images=num_images)

    def num_positions(self, row: int) -> int:
        table = source_table(self.index, MULTIMODAL, self.content.image_tokens)
        return int(table.read(row, row + 1)[0][0])

    def member(self, row: int, image: int | None = None) -> tuple[Path, slice]:
        """The shard of a sample, and where in it lies its text or one of its images."""
        location = self.index.locate(row)
        member = location.text if image is None else location.images[image]
        return Path(location.shard), slice(member.offset, member.offset + member.size)

    def overwrite(self, row: int, data: bytes, image: int | None = None) -> None:
        """Damage a sample without changing the size of its shard."""
        shard, where = self.member(row, image)
        content = bytearray(shard.read_bytes())
        content[where] = data.ljust(where.stop - where.start)[: where.stop - where.start]
        shard.write_bytes(content)

    def loader(
        self, planner: "FixedPlanner", role: Role = ALL, rows: RowRule = PACKED, **options: Any
    ) -> Loader:
        reader = IndexedUnits({"mixed": self.index}, self.content, rows.sequence_length, role)
        return Loader(planner, reader, self.content, rows, role, LoadingRule(**options))

    def step(
        self, packs: Sequence[Sequence[Unit]], role: Role = ALL, rows: RowRule = PACKED, **options: Any
    ) -> LoadedStep:
        with self.loader(FixedPlanner(packs), role, rows, **options) as loader:
            return next(loader)


class FixedPlanner:
    """The same packs every step; its state tells the step it has come to."""

    def __init__(
        self, packs: Sequence[Sequence[Unit]], before_step: Callable[[int], None] = lambda step: None
    ) -> None:
        self.packs = tuple(Pack(units=tuple(units)) for units in packs)
        self.step, self.before_step = 0, before_step

    def next(self) -> StepPlan:
        self.before_step(self.step + 1)
        self.step += 1
        return StepPlan(
            step=self.step,
            modality=MULTIMODAL,
            text_ratio=0.5,
            text_share=0.0,
            packs=self.packs,
            group=0,
            digest=self.step,
        )


def segments(batch: Microbatch, tensor: torch.Tensor | None) -> list[list[Any]]:
    """The part of each unit, in order."""
    assert tensor is not None
    bounds = batch.cu_seqlens.tolist()
    return [
        tensor[0, bounds[segment] : bounds[segment + 1]].tolist()
        for segment, index in enumerate(batch.segment_units)
        if index != PADDING
    ]
