"""The loader: bytes reach the roles that need them, failures change no plan, and nothing hangs."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vl.config.errors import UserError
from megatron_vl.data.batch import PADDING, RowRule
from megatron_vl.data.images import ImageRule, ImageTokens, decode_image
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import build_index
from megatron_vl.data.loader import ContentRule, Failures, LoadedStep, Loader, Role
from megatron_vl.data.plan_state import PlanState
from megatron_vl.data.sample import Message, Sample
from megatron_vl.data.types import MULTIMODAL, Microbatch, Pack, StepPlan, Unit
from tests.support.tiny_data import picture, text_rule, write_source, write_tokenizer

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
SAMPLES: dict[str, tuple[dict[str, Any], dict[str, bytes]]] = {
    "caption": ({"text": "a red bar <image>"}, {"0.png": picture(40, 30, seed=1)}),
    "chat": (
        {"messages": CHAT},
        {"0.png": picture(seed=2), "1.jpg": picture(9, 50, seed=3, file_format="JPEG")},
    ),
    "plain": ({"text": "only words", "supervised": [[5, 10]]}, {}),
    "document": ({"text": DOCUMENT}, {}),
}
CAPTION, CHAT_ROW, PLAIN, LONG = range(4)


class Setup:
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
        self.num_positions = self.index.num_positions(self.content.image_tokens)

    def unit(self, row: int, piece: int = 0) -> Unit:
        rest = int(self.num_positions[row]) - piece * ROW
        num_images = int(self.index.num_images[row])
        return Unit(source="mixed", sample=row, piece=piece, num_tokens=min(rest, ROW), num_images=num_images)

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
        return Loader(planner, {"mixed": self.index}, self.content, rows, role, **options)

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
            step=self.step, modality=MULTIMODAL, text_ratio=0.5, packs=self.packs, digest=self.step
        )

    def state(self) -> PlanState:
        return ("state after", self.step)  # type: ignore[return-value]  # the loader passes it on unread


@pytest.fixture
def source(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def segments(batch: Microbatch, tensor: torch.Tensor | None) -> list[list[Any]]:
    """The part of each unit, in order."""
    assert tensor is not None
    bounds = batch.cu_seqlens.tolist()
    return [
        tensor[0, bounds[segment] : bounds[segment + 1]].tolist()
        for segment, index in enumerate(batch.segment_units)
        if index != PADDING
    ]


def test_a_microbatch_holds_its_samples_tokens_and_pixels(source: Setup) -> None:
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


def test_each_label_of_a_long_document_is_supervised_once(source: Setup) -> None:
    num_pieces = -(-int(source.num_positions[LONG]) // ROW)
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
    source: Setup, role: Role, packing: bool
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


def test_a_rank_that_reads_nothing_opens_no_shard(source: Setup) -> None:
    packs = [[source.unit(CHAT_ROW)]]
    for shard in source.folder.glob("*.tar"):
        shard.unlink()
    assert source.step(packs, NOTHING).microbatches[0].num_images == 2


def test_a_step_without_images_has_an_empty_image_tensor(source: Setup) -> None:
    batch = source.step([[source.unit(PLAIN)]]).microbatches[0]
    assert (batch.num_images, batch.images_NCHW.shape) == (0, (0, 3, 32, 32))


def test_steps_come_in_order_each_with_the_state_after_it(source: Setup) -> None:
    with source.loader(FixedPlanner([[source.unit(PLAIN)]]), prefetch_steps=3) as loader:
        for number in range(1, 8):
            step = next(loader)
            assert (step.plan.step, step.state) == (number, ("state after", number))
            assert step.wait_seconds >= 0


def test_an_image_that_does_not_decode_costs_its_sample_s_loss_only(source: Setup) -> None:
    packs = [[source.unit(CHAT_ROW)], [source.unit(PLAIN), source.unit(CAPTION)]]
    clean = source.step(packs)
    source.overwrite(CHAT_ROW, b"no image", image=1)
    with source.loader(FixedPlanner(packs)) as loader:
        step = next(loader)
    assert step.plan == clean.plan
    chat, pair = step.microbatches
    assert (chat.failed_units, pair.failed_units) == ((0,), ())
    assert not chat.loss_mask_1S.any()
    assert torch.equal(chat.tokens_1S, clean.microbatches[0].tokens_1S)
    assert torch.equal(chat.images_NCHW[0], clean.microbatches[0].images_NCHW[0])
    assert not chat.images_NCHW[1].any()
    for name in ("tokens_1S", "labels_1S", "loss_mask_1S", "images_NCHW"):
        assert torch.equal(getattr(pair, name), getattr(clean.microbatches[1], name))
    assert loader.failures.causes == {"image cannot be decoded": 1}
    assert (loader.failures.num_units, loader.failures.num_failed) == (3, 1)
    assert loader.failures.examples[0].startswith("sample 'chat' in ")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"{", "invalid JSON"),
        (b'{"text": ""}', "invalid sample"),
        (b'{"text": "<image><image>"}', "differs from its index"),
        (b'{"text": "a red <image>"}', "differs from its index"),
    ],
)
def test_a_text_that_is_not_the_indexed_one_is_blanked(source: Setup, data: bytes, cause: str) -> None:
    packs = [[source.unit(PLAIN), source.unit(CAPTION)]]
    clean = source.step(packs).microbatches[0]
    source.overwrite(CAPTION, data)
    with source.loader(FixedPlanner(packs)) as loader:
        batch = next(loader).microbatches[0]
    assert batch.failed_units == (1,)
    assert loader.failures.causes == {cause: 1}
    assert not any(segments(batch, batch.loss_mask_1S)[1])
    assert segments(batch, batch.tokens_1S)[0] == segments(clean, clean.tokens_1S)[0]
    assert int((batch.tokens_1S == source.content.text.image_id).sum()) == TOKENS_PER_IMAGE
    assert torch.equal(batch.images_NCHW, clean.images_NCHW)


def test_the_stage_with_the_labels_masks_a_broken_text_too(source: Setup) -> None:
    source.overwrite(CAPTION, b"{")
    batch = source.step([[source.unit(CAPTION)]], Role.of_stage(is_first=False, is_last=True)).microbatches[0]
    assert batch.failed_units == (0,)
    assert not batch.loss_mask_1S.any()


def test_failures_stop_the_run_past_the_threshold() -> None:
    Failures(num_units=99, num_failed=9).check(0.01)  # too few seen, too few failed
    Failures(num_units=100, num_failed=1).check(0.01)
    Failures(num_units=2000, num_failed=20).check(0.01)
    failures = Failures(num_units=100, num_failed=2, examples=["sample 'a' in b"])
    failures.causes["image cannot be decoded"] = 2
    with pytest.raises(
        UserError, match=r"2 of 100 .*max_failed_fraction=0.01: image cannot be decoded .2..*sample 'a'"
    ):
        failures.check(0.01)
    with pytest.raises(UserError, match="10 of 10"):
        Failures(num_units=10, num_failed=10).check(0.5)


def test_an_error_of_the_planner_reaches_the_loop_after_the_steps_before_it(source: Setup) -> None:
    def fail_at_three(step: int) -> None:
        if step == 3:
            raise UserError("no more")

    loader = source.loader(FixedPlanner([[source.unit(PLAIN)]], fail_at_three), prefetch_steps=4)
    assert [next(loader).plan.step for _ in range(2)] == [1, 2]
    with pytest.raises(UserError, match="no more"):
        next(loader)
    assert list(loader) == []


def test_a_shard_that_vanishes_ends_the_iteration_with_its_name(source: Setup) -> None:
    shard, _ = source.member(PLAIN)
    shard.unlink()
    with (
        source.loader(FixedPlanner([[source.unit(PLAIN)]])) as loader,
        pytest.raises(UserError, match=f"{shard}"),
    ):
        next(loader)


def test_no_more_than_the_prefetched_steps_are_planned(source: Setup) -> None:
    planner = FixedPlanner([[source.unit(PLAIN)]])
    with source.loader(planner, prefetch_steps=2) as loader:
        for number in range(1, 4):
            next(loader)
            deadline = time.monotonic() + 10
            while planner.step < number + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert planner.step == number + 2


def test_close_waits_for_the_step_in_hand_only(source: Setup) -> None:
    is_planning, may_plan = threading.Event(), threading.Event()

    def block(step: int) -> None:
        is_planning.set()
        assert may_plan.wait(10)

    planner = FixedPlanner([[source.unit(PLAIN)]], block)
    loader = source.loader(planner, prefetch_steps=5)
    assert is_planning.wait(10)
    threading.Timer(0.05, may_plan.set).start()
    loader.close()
    loader.close()
    assert planner.step == 1
    assert list(loader) == []


def test_the_content_of_a_step_does_not_depend_on_threads(source: Setup) -> None:
    packs = [[source.unit(CHAT_ROW)], [source.unit(CAPTION), source.unit(PLAIN)], [source.unit(LONG, 1)]]
    one, many = (source.step(packs, num_threads=number) for number in (1, 8))
    for first, second in zip(one.microbatches, many.microbatches, strict=True):
        for name in ("tokens_1S", "labels_1S", "loss_mask_1S", "images_NCHW"):
            assert torch.equal(getattr(first, name), getattr(second, name))
