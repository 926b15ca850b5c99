"""One flipped bit in one rank's copy of a parameter is found, the rank named, and the step not done."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.parallel.replicas import digest, suspects, witnesses
from megatron_vl.planning.topology import Topology
from megatron_vl.train.step import Vote, train_step
from tests.support.ranks import run_ranks
from tests.support.training import Case, batch, build

CASES = {
    "dp2": Case(num_rows=4),
    "dp2_bf16": Case(num_rows=4, precision="bf16"),
    "tp2_sp": Case(num_rows=2, parallel=ParallelConfig(tensor_size=2, sequence_parallel=True)),
    "tp2_frozen": Case(num_rows=2, parallel=ParallelConfig(tensor_size=2), train=("adaptor", "decoder")),
    "pp2": Case(num_rows=2, parallel=ParallelConfig(pipeline_size=2)),
}
MAIN = "main parameter"
# Which parameters of rank 1 have a bit flipped, by what their names contain, and who is found then. Of two replicas
# either may be the one that is wrong; a rank's own share, and a pipeline stage that is alone, have none.
FLIPS: dict[str, list[tuple[str, list[int]]]] = {
    "dp2": [("linear_qkv.weight", [0, 1]), ("towers", [0, 1])],
    "dp2_bf16": [("linear_qkv.weight", [0, 1]), (MAIN, [1])],
    "tp2_sp": [("layernorm", [0, 1]), ("adaptor", [0, 1]), ("linear_qkv.weight", [])],
    "tp2_frozen": [("towers", [0, 1])],
    "pp2": [("linear_qkv.weight", [])],
}


def found_in(case: Case, flips: list[str]) -> list[tuple[list[int], bool]]:
    """Who is found at each step, and whether it changed the weights: three sound steps (multimodal, text, multimodal),
    then one with a flip for each of `flips`, after which the bit is set right again."""
    chunks, optimizer, groups = build(case)
    seen = []
    for step in range(1, 4 + len(flips)):
        step_of_rows = min(step, 3)
        witness = partial(witnesses, chunks, optimizer.inner, with_images=step_of_rows % 2 == 1)
        if step > 3 and dist.get_rank() == 1:
            witness = partial(after_flip, witness, target(chunks, optimizer.inner, flips[step - 4]))
        before = trained(chunks)
        rows = batch(case, step_of_rows, groups)
        result = train_step(chunks, optimizer, rows, groups, 1.0, Vote(witnesses=witness))
        seen.append((result.corrupted, any(map(torch.ne, before, trained(chunks)))))
    return seen


def after_flip(witness: Any, tensor: Tensor) -> Tensor:
    flip(tensor)
    told: Tensor = witness()
    flip(tensor)
    return told


def flip(tensor: Tensor) -> None:
    """A bit of the exponent of the last element."""
    integer, bit = (torch.int16, 1 << 9) if tensor.element_size() == 2 else (torch.int32, 1 << 25)
    tensor.view(integer).view(-1)[-1] ^= bit


def target(chunks: list[Any], optimizer: Any, name: str) -> Tensor:
    if name == MAIN:
        part = getattr(optimizer, "chained_optimizers", [optimizer])[0]
        return next(main for group in part.shard_fp32_from_float16_groups for main in group).data
    parameters = [pair for chunk in chunks for pair in chunk.module.named_parameters()]
    return next(parameter for full, parameter in parameters if name in full).data


def trained(chunks: list[Any]) -> list[Tensor]:
    """Sums of the parameters that train."""
    parameters = [one for chunk in chunks for one in chunk.parameters() if one.requires_grad]
    return [one.detach().double().sum() for one in parameters]


@pytest.mark.parametrize("name", CASES)
def test_a_flipped_bit_is_found_and_the_step_not_done(name: str) -> None:
    flips = FLIPS[name]
    by_rank = run_ranks(2, found_in, CASES[name], [part for part, _ in flips], timeout_seconds=300)
    for seen in by_rank:
        assert [found for found, _ in seen[:3]] == [[]] * 3
        assert [found for found, _ in seen[3:]] == [expected for _, expected in flips]
    for place, (_, expected) in enumerate(flips, start=3):
        if expected:
            assert not any(seen[place][1] for seen in by_rank)


def test_the_minority_is_named() -> None:
    """Of a world of TP 2, PP 2, DP 3, whose ranks hold what their place in the model says."""
    topology = Topology(world_size=12, tensor_size=2, pipeline_size=2)
    sound = [[10.0 + rank % 2 + 10 * (rank // 6), 7.0 + rank // 6, 0.0] for rank in range(12)]
    assert suspects(sound, topology) == []
    for rank in range(12):
        for number, expected in ((0, [rank]), (1, sorted([rank, rank ^ 1])), (2, [rank])):
            wrong = [list(one) for one in sound]
            wrong[rank][number] += 1
            assert suspects(wrong, topology) == expected  # of two tensor ranks it may be either


@given(
    st.lists(
        st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    st.data(),
)
def test_any_single_bit_changes_the_digest(values: list[list[int]], data: st.DataObject) -> None:
    tensors = [torch.tensor(one, dtype=torch.int32).view(torch.float32) for one in values]
    low_bits, cpu = (1 << 52) - 1, torch.device("cpu")
    before = int(digest(tensors, cpu)) & low_bits
    tensor = data.draw(st.sampled_from(tensors)).view(torch.int32)
    place, bit = data.draw(st.integers(0, len(tensor) - 1)), data.draw(st.integers(0, 31))
    tensor[place] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert int(digest(tensors, cpu)) & low_bits != before
