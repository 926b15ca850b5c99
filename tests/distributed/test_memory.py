"""Memory that planning predicts against tensors that ranks hold in real training steps, within 5 %."""

from dataclasses import dataclass

import pytest
import torch

from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.data.batch import PADDING
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.measure.memory_count import HeldMemory, LiveStorages, held_memory
from megatron_vl.model import relative_attention, vocabulary_loss
from megatron_vl.model.spread import spread_encoders
from megatron_vl.parallel.groups import Groups, destroy_groups
from megatron_vl.planning import activations, vision_memory
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.memory import Execution, RankMemory, rank_memory
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.workload import Workload
from megatron_vl.train.step import Vote, train_step
from tests.support.ranks import run_ranks
from tests.support.training import IMAGE_TOKEN, TOKENS_PER_IMAGE, Case, build, model_of, shared

TOLERANCE = 0.05
NUM_TOKENS = 1024
JOINT = ("adaptor", "embedding", "decoder", "head")

ONE_RANK = {
    "everything in fp32": Case(num_rows=2, most_images=6),
    "joint in bf16": Case(num_rows=2, train=JOINT, precision="bf16", most_images=6),
    "full recompute": Case(num_rows=2, train=JOINT, recompute=RecomputeConfig(language="full")),
    "selective recompute": Case(num_rows=2, train=JOINT, recompute=RecomputeConfig(language="selective")),
    "adaptor alone": Case(num_rows=2, train=("adaptor",), most_images=12),
    "siglip trains": Case(num_rows=2, train=("siglip", *JOINT), most_images=20),
    "siglip trains, recomputed": Case(
        num_rows=2, train=("siglip", *JOINT), recompute=RecomputeConfig(vision=True), most_images=20
    ),
}
TWO_RANKS = {
    "TP2": Case(num_rows=2, parallel=ParallelConfig(tensor_size=2), train=JOINT),
    "TP2 with SP": Case(
        num_rows=2, parallel=ParallelConfig(tensor_size=2, sequence_parallel=True), train=JOINT, most_images=6
    ),
    "PP2": Case(num_rows=4, parallel=ParallelConfig(pipeline_size=2), train=JOINT, most_images=6),
    "PP2 in bf16": Case(
        num_rows=4, parallel=ParallelConfig(pipeline_size=2), train=JOINT, precision="bf16", most_images=6
    ),
    "PP2, two virtual stages": Case(
        num_rows=4, parallel=ParallelConfig(pipeline_size=2, virtual_size=2), train=JOINT, most_images=6
    ),
    "PP2, an uneven layout": Case(
        num_rows=4, parallel=ParallelConfig(pipeline_size=2, layout="Ettt|tL"), train=JOINT
    ),
    "DP2": Case(num_rows=4, train=JOINT, precision="bf16", most_images=6),
    "split": Case(
        num_rows=2,
        parallel=ParallelConfig(tensor_size=2, vision_placement="split"),
        train=("siglip", *JOINT),
        most_images=20,
    ),
    "spread": Case(
        num_rows=4,
        parallel=ParallelConfig(pipeline_size=2, vision_placement="spread"),
        train=JOINT,
        most_images=20,
    ),
}
FOUR_RANKS = {
    "TP2 with SP, PP2": Case(
        num_rows=4,
        parallel=ParallelConfig(tensor_size=2, pipeline_size=2, sequence_parallel=True),
        train=JOINT,
        most_images=6,
    ),
    "DP2, PP2, two virtual stages": Case(
        num_rows=8, parallel=ParallelConfig(pipeline_size=2, virtual_size=2), precision="bf16", most_images=6
    ),
    "spread, siglip trains": Case(
        num_rows=4,
        parallel=ParallelConfig(tensor_size=2, pipeline_size=2, vision_placement="spread"),
        train=("siglip", *JOINT),
        most_images=20,
    ),
}


@dataclass(frozen=True)
class Counted:
    held: HeldMemory
    peak_bytes: int
    predicted: RankMemory


def count_all(cases: dict[str, Case]) -> dict[str, Counted]:
    """What this rank holds in the second step of each case. To be called by `run_ranks`."""
    return {name: count(case) for name, case in cases.items()}


def count(case: Case) -> Counted:
    live = LiveStorages()
    with live:
        chunks, optimizer, groups = build(case)
        spread = None
        if case.parallel.vision_placement == "spread":
            spread = spread_encoders(chunks, model_of(case).vision, case.train, groups)
    rows = shared(microbatches(case, groups), case, groups)  # what the host holds is not counted
    live.leave_out(tensor for row in rows for tensor in vars(row).values() if torch.is_tensor(tensor))
    with live:
        for _ in range(2):  # the first one makes Adam's means
            live.restart_peak()
            train_step(chunks, optimizer, rows, groups, 1.0, Vote(), spread)
    copies = [] if spread is None else spread.towers.parameters()
    held = held_memory(chunks, optimizer.inner, copies)
    destroy_groups()
    return Counted(held, live.peak_bytes, predict(case, groups))


def microbatches(case: Case, groups: Groups) -> list[Microbatch]:
    """Of this data-parallel rank: rows of one segment that begin with `most_images` images."""
    tokens = torch.full((1, NUM_TOKENS), IMAGE_TOKEN + 1)
    tokens[0, : case.most_images * TOKENS_PER_IMAGE] = IMAGE_TOKEN
    images = torch.zeros(case.most_images, 3, 256, 256, dtype=torch.uint8)
    row = Microbatch(
        cu_seqlens=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        max_seqlen=NUM_TOKENS,
        num_images=case.most_images,
        units=(),
        segment_units=(PADDING,),
        tokens_1S=tokens,
        images_NCHW=images,
        labels_1S=tokens,
        loss_mask_1S=torch.ones(1, NUM_TOKENS),
    )
    return [row] * (case.num_rows // groups.topology.data_size)


def predict(case: Case, groups: Groups) -> RankMemory:
    model, parallel = model_of(case), case.parallel
    workload = Workload(
        stage="joint",
        trained=frozenset(case.train),
        num_steps=1,
        global_batch_size=case.num_rows,
        sequence_length=NUM_TOKENS,
        text_ratio=0.0,
        images_per_row=case.most_images,
        max_images_per_row=case.most_images,
        tokens_per_row=NUM_TOKENS,
        segment_tokens=NUM_TOKENS,
    )
    setting = Setting(
        topology=groups.topology,
        layout=resolve_layout(parallel.layout, model.language.num_layers, groups.topology),
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=1,
        recompute=case.recompute.language,
        recompute_vision=case.recompute.vision,
        vision_placement=parallel.vision_placement,
    )
    execution = Execution(precision=case.precision, fused=False)
    return rank_memory(model, workload, setting, groups.pipeline_rank, execution)


def check(cases: dict[str, Case], world_size: int) -> None:
    far = []
    for rank, counts in enumerate(run_ranks(world_size, count_all, cases, timeout_seconds=240)):
        for name, counted in counts.items():
            pairs = {
                "parameters": (counted.predicted.parameters, counted.held.parameters),
                "gradients": (counted.predicted.gradients, counted.held.gradients),
                "optimizer": (counted.predicted.optimizer, counted.held.optimizer),
                "peak": (counted.predicted.total, counted.peak_bytes),
            }
            for kind, (predicted, held) in pairs.items():
                line = f"{name}, rank {rank}, {kind}: {predicted / held - 1:+.2%} of {held / 1e6:.2f} MB"
                print(line, flush=True)
                if predicted != pytest.approx(held, rel=TOLERANCE):
                    far.append(line)
    assert not far, "\n".join(far)


def test_one_rank() -> None:
    check(ONE_RANK, 1)


@pytest.mark.slow
def test_two_ranks() -> None:
    check(TWO_RANKS, 2)


@pytest.mark.slow
def test_four_ranks() -> None:
    check(FOUR_RANKS, 4)


def test_planning_knows_the_sizes_of_blocks() -> None:
    assert activations.LOSS_BLOCK == vocabulary_loss.MAX_BLOCK_LOGITS
    assert vision_memory.BIAS_SCORES == relative_attention.MAX_BLOCK_SCORES
