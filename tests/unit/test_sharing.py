"""Shares of images: every image has one rank, in order, and ranks' loaders read what is theirs and no more."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.data.loader import LoadedStep, Role
from megatron_vl.data.sharing import ImageSharing, cut, share
from megatron_vl.train.settings import resolve_stages
from tests.support.tiny_loader import ALL, CAPTION, CHAT_ROW, PLAIN, LoaderSetup
from tests.unit.test_recipes import compose

NUMBERS = st.lists(st.integers(0, 5), min_size=1, max_size=6)  # of images, by microbatch
SIZES = st.integers(1, 9)


def sharers(size: int, of_step: bool) -> list[ImageSharing]:
    return [ImageSharing(size=size, rank=rank, of_step=of_step) for rank in range(size)]


@given(st.integers(0, 40), SIZES)
def test_padded_shares_joined_begin_with_all_images(num_images: int, size: int) -> None:
    """What stage zero rests on when it gathers features."""
    longest = -(-num_images // size)
    shares = [list(share(num_images, size, rank)) for rank in range(size)]
    padded = [image for one in shares for image in one + [-1] * (longest - len(one))]
    assert padded == [*range(num_images), *[-1] * (longest * size - num_images)]


@given(NUMBERS, SIZES, st.booleans())
def test_every_image_of_a_step_has_one_rank(numbers: list[int], size: int, of_step: bool) -> None:
    by_rank = [sharing.shares(numbers) for sharing in sharers(size, of_step)]
    for microbatch, number in enumerate(numbers):
        assert [image for shares in by_rank for image in shares[microbatch]] == list(range(number))
    for shares in by_rank:
        counted = [sum(numbers)] if of_step else numbers
        found = [sum(map(len, shares))] if of_step else [len(one) for one in shares]
        assert all(mine <= -(-number // size) for mine, number in zip(found, counted, strict=True))


@given(NUMBERS, st.data())
def test_a_range_is_cut_at_the_bounds_of_parts(lengths: list[int], data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.lists(st.integers(0, sum(lengths)), min_size=2, max_size=2)))
    parts = cut(range(start, stop), lengths)
    images = [(part, image) for part, length in enumerate(lengths) for image in range(length)]
    assert [(part, image) for part, one in enumerate(parts) for image in one] == images[start:stop]


@pytest.fixture
def source(tmp_path: Path) -> LoaderSetup:
    return LoaderSetup(tmp_path)


def load(source: LoaderSetup, role: Role) -> LoadedStep:
    """A step of 3, 0 and 2 images."""
    rows = ((CAPTION, CHAT_ROW), (PLAIN,), (CHAT_ROW,))
    return source.step([[source.unit(row) for row in pack] for pack in rows], role)


@pytest.mark.parametrize("of_step", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_decode_each_image_once(source: LoaderSetup, size: int, of_step: bool) -> None:
    whole = load(source, ALL)
    only_text = load(source, Role(reads_tokens=True, reads_images=False, reads_labels=False))
    by_rank = [
        load(source, Role.of_stage(is_first=False, is_last=False, sharing=sharing))
        if of_step
        else load(source, Role(reads_tokens=False, reads_images=True, reads_labels=False, sharing=sharing))
        for sharing in sharers(size, of_step)
    ]
    for number, batch in enumerate(whole.microbatches):
        parts = [step.microbatches[number] for step in by_rank]
        assert all(part.shares_images and part.num_images == batch.num_images for part in parts)
        assert torch.equal(torch.cat([part.images_NCHW for part in parts]), batch.images_NCHW)
    of_images = whole.traffic.bytes_used - only_text.traffic.bytes_used
    assert sum(step.traffic.bytes_used for step in by_rank) == of_images > 0


def test_a_broken_image_fails_on_the_rank_that_reads_it(source: LoaderSetup) -> None:
    source.overwrite(CHAT_ROW, b"no image", image=1)
    steps = [
        load(source, Role.of_stage(is_first=sharing.rank == 0, is_last=False, sharing=sharing))
        for sharing in sharers(5, of_step=True)
    ]
    failed = [[batch.failed_units for batch in step.microbatches] for step in steps]
    none = ((), (), ())
    assert list(map(tuple, failed)) == [none, none, ((1,), (), ()), none, ((), (), (0,))]
    assert not steps[2].microbatches[0].images_NCHW.any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.vision_placement=nowhere"], "must be one of replicated, split, spread"),
        (["parallel.vision_placement=split", "parallel.pipeline_size=2"], "needs parallel.tensor_size of at"),
        (
            ["+stage.joint.parallel.vision_placement=spread"],
            "stage joint needs parallel.tensor_size x pipeline",
        ),
    ],
)
def test_a_placement_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_stages(compose(*overrides), 2)


def test_placements_are_taken_where_there_are_ranks_to_share() -> None:
    for overrides in (
        ["tensor_size=2", "vision_placement=split"],
        ["pipeline_size=2", "vision_placement=spread"],
    ):
        stages = resolve_stages(compose(*(f"parallel.{override}" for override in overrides)), 2)
        assert {stage.parallel.vision_placement for stage in stages} == {overrides[1].split("=")[1]}
