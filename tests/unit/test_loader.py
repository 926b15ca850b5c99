"""The loader: bytes reach the roles that need them, as tokens and pixels; all ranks know the shapes."""

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vl.data.batch import RowRule
from megatron_vl.data.images import decode_image
from megatron_vl.data.loader import Role
from megatron_vl.data.sample import Message, Sample
from tests.support.tiny_loader import (
    ALL,
    CAPTION,
    CHAT,
    CHAT_ROW,
    DOCUMENT,
    LONG,
    NOTHING,
    PLAIN,
    ROW,
    SAMPLES,
    TOKENS_PER_IMAGE,
    FixedPlanner,
    LoaderSetup,
    segments,
)


@pytest.fixture
def source(tmp_path: Path) -> LoaderSetup:
    return LoaderSetup(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_a_microbatch_holds_its_samples_tokens_and_pixels(source: LoaderSetup) -> None:
    step = source.step([[source.unit(CHAT_ROW)], [source.unit(PLAIN), source.unit(CAPTION)]])
    chat, pair = step.microbatches
    text = source.content.text
    question, answer = (Message(role=turn["role"], content=turn["content"]) for turn in CHAT)
    expected = {
        "chat": text.encode(Sample(messages=(question, answer)), [4, 4]),
        "plain": text.encode(Sample(text="only words", supervised=((5, 10),)), []),
        "caption": text.encode(Sample(text="a red bar <image>"), [4]),
    }
    for batch, keys in ((chat, ["chat"]), (pair, ["plain", "caption"])):
        assert segments(batch, batch.tokens_1S) == [expected[key].tokens[:-1].tolist() for key in keys]
        assert segments(batch, batch.labels_1S) == [expected[key].tokens[1:].tolist() for key in keys]
        assert segments(batch, batch.loss_mask_1S) == [expected[key].supervised[1:].tolist() for key in keys]
        assert int((batch.tokens_1S == text.image_id).sum()) == batch.num_images * TOKENS_PER_IMAGE
        files = [file for key in keys for file in SAMPLES[key][1].values()]
        pixels = np.stack([decode_image(file, source.content.image, "key", "shard") for file in files])
        np.testing.assert_array_equal(batch.images_NCHW, pixels)
        assert batch.images_NCHW.dtype == torch.uint8
        assert batch.loss_mask_1S.dtype == torch.float32
        assert (batch.tokens_1S.dtype, batch.labels_1S.dtype) == (torch.int64, torch.int64)


def test_each_label_of_a_long_document_is_supervised_once(source: LoaderSetup) -> None:
    num_pieces = -(-source.num_positions(LONG) // ROW)
    assert num_pieces >= 3
    step = source.step([[source.unit(LONG, piece)] for piece in range(num_pieces)])
    whole = source.content.text.encode(Sample(text=DOCUMENT), []).tokens.tolist()
    pairs: list[tuple[int, int]] = []
    for batch in step.microbatches:
        mask = batch.loss_mask_1S[0].bool()
        pairs += zip(batch.tokens_1S[0][mask].tolist(), batch.labels_1S[0][mask].tolist(), strict=True)
    assert pairs == list(pairwise(whole))


@pytest.mark.parametrize(
    "role",
    [NOTHING, Role.of_stage(is_first=True, is_last=False), Role.of_stage(is_first=False, is_last=True)],
)
@pytest.mark.parametrize("packing", [True, False])
def test_all_roles_see_the_same_shapes_and_only_their_tensors(
    source: LoaderSetup, role: Role, packing: bool
) -> None:
    rows = RowRule(sequence_length=ROW, packing=packing, micro_batch_size=2, pad_multiple=8)
    packs = [[source.unit(row)] for row in (CHAT_ROW, PLAIN, CAPTION, LONG)]
    for part, whole in zip(
        source.step(packs, role, rows).microbatches, source.step(packs, ALL, rows).microbatches, strict=True
    ):
        assert part.cu_seqlens.tolist() == whole.cu_seqlens.tolist()
        shapes = (part.max_seqlen, part.num_images, part.units, part.segment_units)
        assert shapes == (whole.max_seqlen, whole.num_images, whole.units, whole.segment_units)
        for name, is_read in (
            ("tokens_1S", role.reads_tokens),
            ("images_NCHW", role.reads_images),
            ("labels_1S", role.reads_labels),
            ("loss_mask_1S", role.reads_labels),
        ):
            tensor = getattr(part, name)
            assert (tensor is not None) == is_read
            assert not is_read or torch.equal(tensor, getattr(whole, name))


def test_a_rank_that_reads_nothing_opens_no_shard(source: LoaderSetup) -> None:
    packs = [[source.unit(CHAT_ROW)]]
    for shard in source.folder.glob("*.tar"):
        shard.unlink()
    assert source.step(packs, NOTHING).microbatches[0].num_images == 2


def test_a_step_without_images_has_an_empty_image_tensor(source: LoaderSetup) -> None:
    batch = source.step([[source.unit(PLAIN)]]).microbatches[0]
    assert (batch.num_images, batch.images_NCHW.shape) == (0, (0, 3, 32, 32))


def test_steps_come_in_order(source: LoaderSetup) -> None:
    with source.loader(FixedPlanner([[source.unit(PLAIN)]]), prefetch_steps=3) as loader:
        for number in range(1, 8):
            step = next(loader)
            assert step.plan.step == number
            assert step.wait_seconds >= 0


def test_the_content_of_a_step_does_not_depend_on_threads(source: LoaderSetup) -> None:
    packs = [[source.unit(CHAT_ROW)], [source.unit(CAPTION), source.unit(PLAIN)], [source.unit(LONG, 1)]]
    one, many = (source.step(packs, num_threads=number) for number in (1, 8))
    for first, second in zip(one.microbatches, many.microbatches, strict=True):
        for name in ("tokens_1S", "labels_1S", "loss_mask_1S", "images_NCHW"):
            assert torch.equal(getattr(first, name), getattr(second, name))
