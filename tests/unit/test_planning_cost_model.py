"""The cost of the whole model on a tensor-parallel rank against FLOPs that torch counts of that rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist

from megatron_vl.config.parallel import RecomputeConfig
from megatron_vl.config.train import PARTS
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, build_chunks, freeze
from megatron_vl.parallel.groups import build_groups, destroy_groups
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.passes import backward, chunk_units, passes
from megatron_vl.planning.recompute import computed_again
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.work import Work
from megatron_vl.planning.workload import Load
from tests.support.flops import count_flops, small_model
from tests.support.ranks import run_ranks

IMAGE_TOKEN = 5
TOKENS_PER_IMAGE = 36
SEGMENTS = (50, 90, 20)
ADAPTOR = ("adaptor",)
JOINT = ("adaptor", "embedding", "decoder", "head")
SFT = ("siglip", *JOINT)
LAYOUT = "EtttL"


@dataclass(frozen=True, kw_only=True)
class Case:
    tensor_size: int = 1
    sequence_parallel: bool = False
    trained: tuple[str, ...] = JOINT
    num_images: int = 2
    recompute: str = "none"
    recompute_vision: bool = False


CASES = [
    *(Case(trained=trained, num_images=n) for trained in (ADAPTOR, JOINT, SFT, PARTS) for n in (0, 2)),
    *(
        Case(trained=trained, recompute=again)
        for trained in (ADAPTOR, JOINT)
        for again in ("selective", "full")
    ),
    Case(trained=PARTS, num_images=1, recompute="full", recompute_vision=True),
    Case(trained=("decoder",), num_images=1),
    Case(trained=("head",), num_images=0),
    *(
        Case(tensor_size=2, sequence_parallel=divided, trained=trained, num_images=n)
        for divided in (False, True)
        for trained, n in ((ADAPTOR, 2), (JOINT, 0), (SFT, 1))
    ),
    *(Case(tensor_size=2, sequence_parallel=True, recompute=again) for again in ("selective", "full")),
]


def count_rank(cases: Sequence[Case]) -> list[tuple[int, int]]:
    """FLOPs of one rank, forward and backward, of each case."""
    return [_count(case) for case in cases]


def _count(case: Case) -> tuple[int, int]:
    model = small_model()
    topology = Topology(world_size=dist.get_world_size(), tensor_size=case.tensor_size)
    groups = build_groups(topology, 1, torch.device("cpu"))
    division = Division(topology=topology, layout=LAYOUT, sequence_parallel=case.sequence_parallel)
    recompute = RecomputeConfig(language=case.recompute, vision=case.recompute_vision)
    config = transformer_config(model.language, division, recompute, "fp32")
    options = BuildOptions(image_token=IMAGE_TOKEN, recompute_vision=case.recompute_vision)
    (chunk,) = build_chunks(config, model, options, groups.collection, torch.device("cpu"))
    freeze(chunk, list(case.trained))
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    num_tokens = sum(SEGMENTS)
    tokens = torch.full((1, num_tokens), IMAGE_TOKEN + 1)
    tokens[0, : case.num_images * TOKENS_PER_IMAGE] = IMAGE_TOKEN
    images = torch.randint(0, 256, (case.num_images, 3, 208, 208), dtype=torch.uint8)
    ends = torch.tensor([0, *SEGMENTS]).cumsum(0).to(torch.int32)
    forward_flops, losses = count_flops(lambda: chunk(tokens, images, tokens, ends, max(SEGMENTS)))
    backward_flops, _ = count_flops(lambda: losses.sum().backward())
    destroy_groups()
    return forward_flops, backward_flops


@cache
def counts(tensor_size: int) -> dict[Case, tuple[int, int]]:
    """All cases of a size, on ranks started once; both ranks count alike."""
    cases = [case for case in CASES if case.tensor_size == tensor_size]
    ranks = run_ranks(tensor_size, count_rank, cases)
    assert all(rank == ranks[0] for rank in ranks)
    return dict(zip(cases, ranks[0], strict=True))


def work_of(case: Case) -> tuple[Work, Work]:
    """Forward and backward of one rank, by the units' costs; every pair of a segment counted, as torch does."""
    model = small_model()
    load = Load(
        num_tokens=sum(SEGMENTS),
        num_images=case.num_images,
        num_pairs=sum(length**2 for length in SEGMENTS),
    )
    costs = CostModel(
        model=model,
        tensor_size=case.tensor_size,
        sequence_parallel=case.sequence_parallel,
        folded_positions="sam" in case.trained,
    )
    setting = Setting(
        topology=Topology(world_size=case.tensor_size, tensor_size=case.tensor_size),
        layout=LAYOUT,
        sequence_parallel=case.sequence_parallel,
        micro_batch_size=1,
        recompute=case.recompute,
        recompute_vision=case.recompute_vision,
    )
    forward_work = backward_work = Work()
    for name, count in chunk_units(LAYOUT, model).items():
        work, run = costs.unit(name, load), passes(name, frozenset(case.trained))
        again = computed_again(name, model, setting)
        forward_work += work.forward * count
        backward_work += backward(work, run) * count
        if run.any and again is not None:
            backward_work += costs.unit(again.name, load).forward * (again.share * count)
    return forward_work, backward_work


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_s_model_costs_what_torch_counts(case: Case) -> None:
    forward_flops, backward_flops = counts(case.tensor_size)[case]
    forward_work, backward_work = work_of(case)
    assert forward_work.flops == pytest.approx(forward_flops, rel=0.02)
    assert backward_work.flops == pytest.approx(backward_flops, rel=0.02)
