"""Trains the tiny model on random packed rows at any parallel setting and gathers what the ranks hold."""

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.config.train import PARTS, TrainConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.data.types import Unit
from megatron_vl.model.initialize import global_names, initialize
from megatron_vl.model.spread import spread_encoders
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, build_chunks, freeze
from megatron_vl.parallel.gradients import distribute, parameters_at_rest
from megatron_vl.parallel.groups import Groups, build_groups
from megatron_vl.parallel.shares import image_sharing
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.topology import Topology
from megatron_vl.train.optimizer import Optimizer, build_optimizer
from megatron_vl.train.step import Vote, train_step

IMAGE_TOKEN = 5
TOKENS_PER_IMAGE = 36
ADAM_EPSILON = 1e-4  # a small one turns the rounding of nearly zero gradients into steps of full size
MODEL_CONFIGS = Path(__file__).parents[2] / "hydra_conf" / "model"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One parallel setting, what trains, and for how many steps; odd steps are multimodal, even ones text.

    `adaptor` and `towers` change the tiny model; `repeat` gives every step the first one's rows. `most_images` is at
    most 3.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    train: tuple[str, ...] = PARTS
    precision: str = "fp32"
    num_steps: int = 5
    num_rows: int = 8  # of the global batch
    adaptor: str = "hybrid_mlp_gelu"
    towers: tuple[str, ...] = ("sam", "siglip")
    repeat: bool = False
    most_images: int = 2  # of a row


@dataclass(kw_only=True)
class Outcome:
    """What one rank saw. Names are those of the whole model; tensors are whole (gathered over TP and DP)."""

    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]  # per step, before clipping
    weights: dict[str, Tensor]  # after the last step
    frozen_before: dict[str, Tensor]  # this rank's own, whole or sharded
    frozen_after: dict[str, Tensor]
    replicas_differ: list[str]  # stage zero's vision parameters that are not bit-equal over TP


@cache
def tiny_model() -> ModelConfig:
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(MODEL_CONFIGS / "deepseek_vl_tiny.yaml")
    )
    model: ModelConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    return model


def model_of(case: Case) -> ModelConfig:
    """The tiny model with the case's towers and adaptor."""
    vision = tiny_model().vision
    left_out = {name: None for name in ("sam", "siglip") if name not in case.towers}
    adaptor = replace(vision.adaptor, kind=case.adaptor)
    return replace(tiny_model(), vision=replace(vision, adaptor=adaptor, **left_out))


def build(case: Case) -> tuple[list[Any], Optimizer, Groups]:
    """The model of this rank, wrapped, with a non-zero HD alpha, and its optimizer."""
    topology = Topology(
        world_size=dist.get_world_size(),
        tensor_size=case.parallel.tensor_size,
        pipeline_size=case.parallel.pipeline_size,
        virtual_size=case.parallel.virtual_size,
    )
    model = model_of(case)
    groups = build_groups(topology, seed=1, device=torch.device("cpu"))
    division = Division(
        topology=topology,
        layout=resolve_layout(case.parallel.layout, model.language.num_layers, topology),
        sequence_parallel=case.parallel.sequence_parallel,
    )
    config = transformer_config(model.language, division, case.recompute, case.precision)
    options = BuildOptions(image_token=IMAGE_TOKEN, recompute_vision=case.recompute.vision)
    chunks = build_chunks(config, model, options, groups.collection, torch.device("cpu"))
    initialize(chunks, 7, 0.05, groups.collection)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("hd_alpha"):
                torch.nn.init.constant_(parameter, 0.5)
        freeze(chunk, list(case.train))
    wrapped = distribute(chunks, config, case.parallel, groups)
    optimizer = build_optimizer(
        wrapped,
        TrainConfig(precision=case.precision, adam_epsilon=ADAM_EPSILON),
        case.parallel,
        0.3,
        groups.device,
    )
    return wrapped, optimizer, groups


def train(case: Case) -> Outcome:
    """Run the case on this rank. To be called by `run_ranks`."""
    chunks, inner, groups = build(case)
    optimizer = _RecordingOptimizer(inner.inner, inner.device)
    optimizer.set_learning_rate(1e-3)
    gradients: list[dict[str, Tensor]] = []
    optimizer.record = lambda: gradients.append(gather(chunks, groups, gradients=True))
    frozen_before = _frozen(chunks)
    spreads = case.parallel.vision_placement == "spread"
    spread = spread_encoders(chunks, model_of(case).vision, case.train, groups) if spreads else None
    results = [
        train_step(
            chunks, optimizer, shared(batch(case, step, groups), case, groups), groups, 1.0, Vote(), spread
        )
        for step in range(1, case.num_steps + 1)
    ]
    with parameters_at_rest(chunks):
        weights = gather(chunks, groups)
    for sums, result in zip(gradients, results, strict=True):
        for gradient in sums.values():
            gradient /= result.num_supervised_tokens
    return Outcome(
        losses=[result.loss for result in results],
        norms=[result.gradient_norm for result in results],
        gradients=gradients,
        weights=weights,
        frozen_before=frozen_before,
        frozen_after=_frozen(chunks),
        replicas_differ=_differing_replicas(chunks, groups),
    )


class _RecordingOptimizer(Optimizer):
    """Tells when the finalised gradients are complete, before anything is clipped."""

    record: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def prepare(self) -> Tensor:
        self.record()
        return super().prepare()


def batch(case: Case, step: int, groups: Groups) -> list[Microbatch]:
    """This data-parallel rank's rows of a global batch that depends on the step alone."""
    step = 1 if case.repeat else step
    source = torch.Generator().manual_seed(step)
    numbers = [(row + step) % (case.most_images + 1) if step % 2 else 0 for row in range(case.num_rows)]
    rows = [random_row(source, images=images) for images in numbers]
    share = case.num_rows // groups.topology.data_size
    return rows[groups.data_rank * share : (groups.data_rank + 1) * share]


def shared(microbatches: list[Microbatch], case: Case, groups: Groups) -> list[Microbatch]:
    """The same microbatches with the images that this rank encodes."""
    sharing = image_sharing(case.parallel.vision_placement, groups)
    shares = sharing.shares([one.num_images for one in microbatches])
    return [
        replace(one, images_NCHW=one.images_NCHW[mine.start : mine.stop], shares_images=sharing.size > 1)
        for one, mine in zip(microbatches, shares, strict=True)
        if one.images_NCHW is not None
    ]


def random_row(source: torch.Generator, images: int) -> Microbatch:
    """A row of 160 positions: two samples, the first with up to one image, the other with up to two, and padding."""
    lengths = [70, 74, 16]
    tokens = torch.randint(IMAGE_TOKEN + 1, 2048, (1, 160), generator=source)
    labels = torch.randint(IMAGE_TOKEN + 1, 2048, (1, 160), generator=source)
    for image in range(images):
        start = (1, 71, 107)[image]
        tokens[0, start : start + TOKENS_PER_IMAGE] = IMAGE_TOKEN
    mask = (tokens != IMAGE_TOKEN).float() * (torch.rand(1, 160, generator=source) > 0.2)
    mask[0, -lengths[2] :] = 0
    pixels = torch.randint(0, 256, (images, 3, 256, 256), generator=source, dtype=torch.uint8)
    units = tuple(
        Unit(source="random", sample=n, piece=0, num_tokens=lengths[n], num_images=number)
        for n, number in enumerate((min(images, 1), max(images - 1, 0)))
    )
    return Microbatch(
        cu_seqlens=torch.tensor([0, 70, 144, 160], dtype=torch.int32),
        max_seqlen=74,
        num_images=images,
        units=units,
        segment_units=(0, 1, -1),
        tokens_1S=tokens,
        images_NCHW=pixels,
        labels_1S=labels,
        loss_mask_1S=mask,
    )


def gather(chunks: list[Any], groups: Groups, gradients: bool = False) -> dict[str, Tensor]:
    """Trainable parameters of this pipeline rank (or their gradients) by global name, whole."""
    if gradients:
        for chunk in chunks:
            _gather_gradient_shards(chunk, groups)
    whole = {}
    for chunk in chunks:
        names = global_names(chunk.module)
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                value = parameter.main_grad if gradients else parameter.detach()
                whole[names[name]] = _gather_tensor_parallel(parameter, value.float().clone(), groups)
    return whole


def _gather_gradient_shards(chunk: Any, groups: Groups) -> None:
    """The distributed optimizer leaves each data-parallel rank its shard of a bucket's reduced gradients."""
    size, rank = groups.topology.data_size, groups.data_rank
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            shard = bucket.grad_data.numel() // size
            mine = bucket.grad_data[rank * shard : (rank + 1) * shard].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=groups.collection.dp)


def _gather_tensor_parallel(parameter: Tensor, value: Tensor, groups: Groups) -> Tensor:
    size = groups.topology.tensor_size
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return value
    shards = [torch.empty_like(value) for _ in range(size)]
    dist.all_gather(shards, value.contiguous(), group=groups.collection.tp)
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    parts = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([parts[rank][part] for part in range(stride) for rank in range(size)], dim)


def _frozen(chunks: list[Any]) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": parameter.detach().clone()
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.module.named_parameters()
        if not parameter.requires_grad
    }


def _differing_replicas(chunks: list[Any], groups: Groups) -> list[str]:
    if not chunks[0].module.pre_process:
        return []
    names = []
    for name, parameter in chunks[0].module.named_parameters():
        if not name.startswith(("stage_zero.towers.", "stage_zero.adaptor.")):
            continue
        replicas = [torch.empty_like(parameter) for _ in range(groups.topology.tensor_size)]
        dist.all_gather(replicas, parameter.detach().contiguous(), group=groups.collection.tp)
        if any(not torch.equal(replicas[0], replica) for replica in replicas):
            names.append(name)
    return names


def merged(outcomes: list[Outcome]) -> Outcome:
    """One outcome with the tensors of all pipeline ranks."""
    steps = range(len(outcomes[0].gradients))
    gradients = [{name: g for o in outcomes for name, g in o.gradients[step].items()} for step in steps]
    weights = {name: weight for outcome in outcomes for name, weight in outcome.weights.items()}
    return replace(outcomes[0], gradients=gradients, weights=weights)
