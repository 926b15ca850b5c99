"""What goes wrong while loading: failures change no plan, errors reach the loop, and nothing hangs."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vl.config.errors import UserError
from megatron_vl.data.batch import RowRule
from megatron_vl.data.loader import Failures, Role
from megatron_vl.data.sample import SampleError
from tests.support.tiny_loader import (
    CAPTION,
    CHAT_ROW,
    PLAIN,
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


def test_an_image_that_does_not_decode_costs_its_sample_s_loss_only(source: LoaderSetup) -> None:
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
    ],
)
def test_a_text_that_cannot_be_used_is_blanked(source: LoaderSetup, data: bytes, cause: str) -> None:
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


@pytest.mark.parametrize("data", [b'{"text": "<image><image>"}', b'{"text": "a red <image>"}'])
def test_a_text_that_is_not_the_indexed_one_ends_the_run(source: LoaderSetup, data: bytes) -> None:
    """Every rank's plan rests on its length."""
    packs = [[source.unit(PLAIN), source.unit(CAPTION)]]
    source.overwrite(CAPTION, data)
    with pytest.raises(
        UserError, match=r"sample 'caption' in .* differs from its index: .*Index the source anew"
    ):
        source.step(packs)


def test_a_bad_sample_ends_the_run_where_it_is_to_be_refused(source: LoaderSetup) -> None:
    source.overwrite(CHAT_ROW, b"no image", image=1)
    with pytest.raises(SampleError, match=r"sample 'chat' in .*: image cannot be decoded"):
        source.step([[source.unit(CHAT_ROW)]], refuse_failed=True)


def test_image_tokens_that_are_fewer_than_the_images_need_end_the_run(source: LoaderSetup) -> None:
    """No plan cuts a sample with images; if one did, features would not match their places."""
    rows = RowRule(sequence_length=6, packing=True, micro_batch_size=1)
    cut = source.unit(CHAT_ROW)._replace(num_tokens=6)
    with pytest.raises(UserError, match="6 tokens, 2 of images; the index says 6 and 8"):
        source.step([[cut]], rows=rows)


def test_the_stage_with_the_labels_masks_a_broken_text_too(source: LoaderSetup) -> None:
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
        Failures(num_units=10, num_failed=10, examples=["sample 'a' in b"]).check(0.5)


def test_failures_on_ranks_that_read_other_images_count_where_an_example_can_be_given() -> None:
    Failures(num_units=100, num_elsewhere=3).check(0.02)
    with pytest.raises(UserError, match=r"3 of 100 .*sample 'a'"):
        Failures(num_units=100, num_failed=1, num_elsewhere=2, examples=["sample 'a' in b"]).check(0.02)


def test_an_error_of_the_planner_reaches_the_loop_after_the_steps_before_it(source: LoaderSetup) -> None:
    def fail_at_three(step: int) -> None:
        if step == 3:
            raise UserError("no more")

    loader = source.loader(FixedPlanner([[source.unit(PLAIN)]], fail_at_three), prefetch_steps=4)
    assert [next(loader).plan.step for _ in range(2)] == [1, 2]
    with pytest.raises(UserError, match="no more"):
        next(loader)
    assert list(loader) == []


def test_a_shard_that_vanishes_ends_the_iteration_with_its_name(source: LoaderSetup) -> None:
    shard, _ = source.member(PLAIN)
    shard.unlink()
    with (
        source.loader(FixedPlanner([[source.unit(PLAIN)]])) as loader,
        pytest.raises(UserError, match=f"{shard}"),
    ):
        next(loader)


def test_no_more_than_the_prefetched_steps_are_planned(source: LoaderSetup) -> None:
    planner = FixedPlanner([[source.unit(PLAIN)]])
    with source.loader(planner, prefetch_steps=2) as loader:
        for number in range(1, 4):
            next(loader)
            deadline = time.monotonic() + 10
            while planner.step < number + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert planner.step == number + 2


def test_close_waits_for_the_step_in_hand_only(source: LoaderSetup) -> None:
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
