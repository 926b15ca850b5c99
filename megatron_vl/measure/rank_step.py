"""One rank's part of a training step without data: the real model, schedule and optimizer, and what they hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor, nn

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.model_check import image_size, tokens_per_image
from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.measure.memory_count import HeldMemory, LiveStorages, held_memory
from megatron_vl.measure.without_data import META, without_data
from megatron_vl.model.spread import Spread, spread_encoders
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, VisionLanguageModel, build_chunks, freeze
from megatron_vl.parallel.gradients import distribute
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.pipeline import run_microbatches
from megatron_vl.parallel.shares import image_sharing
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.workload import Workload

IMAGE_TOKEN, TEXT_TOKEN = 0, 1


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """What a rank was built of and did. `output_shapes`: what each forward of a chunk gave, the same every time."""

    modules: list[VisionLanguageModel]
    held: HeldMemory
    peak_bytes: int  # of everything
    output_shapes: list[set[tuple[int, ...]]]  # by chunk


def run_rank_step(
    model: ModelConfig,
    workload: Workload,
    setting: Setting,
    precision: str,
    num_microbatches: int,
    groups: Groups,
) -> RankStep:
    """Build this rank's model and take a multimodal step in which every row holds `max_images_per_row` images."""
    microbatches = _microbatches(model, workload, setting, num_microbatches, groups)
    with without_data(), LiveStorages() as live:
        live.leave_out(
            tensor for one in microbatches for tensor in vars(one).values() if torch.is_tensor(tensor)
        )
        chunks = _build(model, workload, setting, precision, groups)
        optimizer = _optimizer(chunks, precision)
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()  # Adam's means are made by the first step
        spread = None
        if setting.vision_placement == "spread":
            parts, recompute = sorted(workload.trained), setting.recompute_vision
            spread = spread_encoders(chunks, model.vision, parts, groups, recompute)
        held = held_memory(chunks, optimizer, [] if spread is None else spread.towers.parameters())
        live.restart_peak()
        if spread is not None:
            microbatches = _encode_ahead(spread, microbatches)
        with _output_shapes(chunks) as shapes:
            run_microbatches(chunks, microbatches, groups)
    return RankStep(
        modules=[chunk.module for chunk in chunks],
        held=held,
        peak_bytes=live.peak_bytes,
        output_shapes=shapes,
    )


def _build(
    model: ModelConfig, workload: Workload, setting: Setting, precision: str, groups: Groups
) -> list[Any]:
    """As training does, without initial weights."""
    division = Division(
        topology=setting.topology, layout=setting.layout, sequence_parallel=setting.sequence_parallel
    )
    recompute = RecomputeConfig(language=setting.recompute, vision=setting.recompute_vision)
    config = transformer_config(model.language, division, recompute, precision)
    options = BuildOptions(image_token=IMAGE_TOKEN, recompute_vision=setting.recompute_vision)
    chunks = build_chunks(config, model, options, groups.collection, META)
    for chunk in chunks:
        freeze(chunk, sorted(workload.trained))
    parallel = ParallelConfig(
        tensor_size=setting.topology.tensor_size,
        pipeline_size=setting.topology.pipeline_size,
        virtual_size=setting.topology.virtual_size,
        sequence_parallel=setting.sequence_parallel,
        layout=setting.layout,
        vision_placement=setting.vision_placement,
    )
    return list(distribute(chunks, config, parallel, groups))


def _optimizer(chunks: list[Any], precision: str) -> Any:
    """The distributed optimizer in the form that training uses it in."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=0.0,
        bf16=precision == "bf16",
        params_dtype=chunks[0].module.config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
    )
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def _microbatches(
    model: ModelConfig, workload: Workload, setting: Setting, number: int, groups: Groups
) -> list[Microbatch]:
    """With the images that this rank encodes, and what else its stage needs."""
    num_images = setting.micro_batch_size * workload.max_images_per_row
    is_encoder = groups.is_first_stage or setting.vision_placement == "spread"
    shares = image_sharing(setting.vision_placement, groups).shares([num_images] * number)
    side = image_size(model)
    whole = _microbatch(model, workload, setting.micro_batch_size, groups)
    return [
        replace(
            whole,
            images_NCHW=torch.empty(len(share), 3, side, side, dtype=torch.uint8, device=META)
            if is_encoder
            else None,
            shares_images=setting.vision_placement == "split",
        )
        for share in shares
    ]


def _microbatch(model: ModelConfig, workload: Workload, num_rows: int, groups: Groups) -> Microbatch:
    """Rows of one segment each, without the images. Tokens are real: the images' places are looked for."""
    num_tokens = num_rows * workload.sequence_length
    num_images = num_rows * workload.max_images_per_row
    tokens = torch.full((1, num_tokens), TEXT_TOKEN)
    tokens[0, : num_images * tokens_per_image(model)] = IMAGE_TOKEN
    return Microbatch(
        cu_seqlens=torch.arange(0, num_tokens + 1, workload.sequence_length, dtype=torch.int32),
        max_seqlen=workload.sequence_length,
        num_images=num_images,
        units=(),
        segment_units=(),
        tokens_1S=tokens if groups.is_first_stage else None,
        images_NCHW=None,
        labels_1S=tokens if groups.is_last_stage else None,
        loss_mask_1S=torch.ones(1, num_tokens) if groups.is_last_stage else None,
    )


def _encode_ahead(spread: Spread, microbatches: list[Microbatch]) -> list[Microbatch]:
    """As the training step does."""
    images = [one.images_NCHW for one in microbatches if one.images_NCHW is not None]
    features = spread.encode(images, [one.num_images for one in microbatches])
    pairs = zip(microbatches, features, strict=True)
    return [replace(one, images_NCHW=None, features_NTC=of_one) for one, of_one in pairs]


@contextmanager
def _output_shapes(chunks: list[nn.Module]) -> Iterator[list[set[tuple[int, ...]]]]:
    shapes: list[set[tuple[int, ...]]] = [set() for _ in chunks]

    def note(index: int, output: Tensor) -> None:
        shapes[index].add(tuple(output.shape))

    handles = [
        chunk.register_forward_hook(lambda _module, _inputs, output, index=index: note(index, output))
        for index, chunk in enumerate(chunks)
    ]
    try:
        yield shapes
    finally:
        for handle in handles:
            handle.remove()
