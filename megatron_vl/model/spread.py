"""`parallel.vision_placement=spread`: all ranks of a replica encode images, before the pipeline begins.

    encode      images of the step ── shares, without graph ──> features ── first stage ──> adaptor, decoder ...
    backward    gradients of features ── shares, encoded again ──> gradients of encoders ── first stage ──> DDP

Both run outside megatron-core's schedule. The stages after the first one hold copies of the encoders, which belong to
no optimizer and no checkpoint. An encoder that trains is encoded with twice: no activations wait for the pipeline.

Shapes: N images, K images of the longest share, C channels (3 colours or a tower's width), H W pixels, T tokens.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_vl.config.model import VisionConfig
from megatron_vl.model.encoders import VisionTowers, build_towers, part_of
from megatron_vl.model.vit import VisionEncoder
from megatron_vl.parallel.groups import Groups
from megatron_vl.parallel.shares import (
    gather_to_first_stage,
    scatter_from_first_stage,
    send_from_first_stage,
    sum_on_first_stage,
)

Features = tuple[Tensor, ...]  # [N, T, C] of each tower


class Spread:
    """The encoders of this rank and, where some train, the images of the step at hand. Its methods are collective over
    the replica."""

    def __init__(
        self, towers: VisionTowers, first_chunk: DistributedDataParallel | None, groups: Groups
    ) -> None:
        """`towers` are stage zero's, which `first_chunk` wraps, or a copy where that is None; copies become equal."""
        self.towers, self.groups = towers, groups
        self._first_chunk = first_chunk
        self._trained = towers.trained
        self._parameters = [parameter for parameter in towers.parameters() if parameter.requires_grad]
        if first_chunk is None:
            for parameter in self._parameters:
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)  # type: ignore[attr-defined]
        self._images_NCHW: Tensor | None = None
        self._longest = 0
        self._leaves: list[Features] = []  # features of trained towers, by microbatch
        send_from_first_stage([parameter.data for parameter in towers.parameters()], groups)

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor], num_images: Sequence[int]) -> list[Features | None]:
        """The features of each microbatch's images on the first stage; None elsewhere.

        `images` are this rank's share, `num_images` all ranks' images, both by microbatch.
        """
        self._images_NCHW, self._longest, self._leaves = None, 0, []
        total = sum(num_images)
        if not total:
            return [self._no_features() for _ in num_images]
        self._refresh()
        device = self.groups.device
        images_NCHW = torch.cat([one.to(device, non_blocking=True) for one in images])
        self._images_NCHW = images_NCHW if self._parameters else None  # `backward` encodes them again
        self._longest = -(-total // self.groups.topology.model_size)
        own = self.towers(images_NCHW) if len(images_NCHW) else self._no_features()
        gathered = [gather_to_first_stage(_pad(one_NTC, self._longest), self.groups) for one_NTC in own]
        whole = [one for one in gathered if one is not None]
        if not whole:
            return [None for _ in num_images]
        by_tower = [one[:total].split(list(num_images)) for one in whole]
        return [self._as_leaves(features) for features in zip(*by_tower, strict=True)]

    def backward(self) -> None:
        """After the pipeline's last backward pass, before gradients are reduced over data-parallel ranks: leave the
        gradients of the encoders that train in stage zero's buffers.

        Afterwards each tensor rank holds the sum of its column's shares, times the number of tensor ranks: their
        average, which is taken at the end of every step, is the sum of all shares.
        """
        if self._images_NCHW is not None:
            sums = [parameter.main_grad for parameter in self._parameters]  # type: ignore[attr-defined]
            torch._foreach_zero_(sums)
            self._accumulate(self._images_NCHW, self._gradients_of_features(self._longest))
            sum_on_first_stage(sums, self.groups)
            torch._foreach_mul_(sums, float(self.groups.topology.tensor_size))
        self._images_NCHW, self._leaves = None, []
        chunk = self._first_chunk
        if chunk is not None and chunk.ddp_config.overlap_grad_reduce:
            for parameter in self._parameters:
                chunk.param_to_bucket_group[parameter].register_grad_ready(parameter)

    def _refresh(self) -> None:
        """Copies of encoders that train get what the last step made of them."""
        chunk = self._first_chunk
        if chunk is not None and chunk.ddp_config.overlap_param_gather:
            for parameter in self._parameters:
                chunk.param_to_bucket_group[parameter].finish_param_sync()
        send_from_first_stage([parameter.data for parameter in self._parameters], self.groups)

    def _no_features(self) -> Features:
        weight = next(self.towers.parameters())
        widths = self.towers.output_widths
        return tuple(weight.new_zeros(0, self.towers.num_tokens, width) for width in widths)

    def _as_leaves(self, features: Features) -> Features:
        """The same features; those of trained towers collect the gradients of a pass."""
        leaves = tuple(
            one_NTC.detach().requires_grad_(name in self._trained)
            for name, one_NTC in zip(self.towers, features, strict=True)
        )
        if len(leaves[0]):
            self._leaves.append(tuple(leaf for leaf in leaves if leaf.requires_grad))
        return leaves

    def _gradients_of_features(self, longest: int) -> list[Tensor]:
        """[K, T, C] for each tower that trains: those of this rank's images."""
        gradients = []
        for position, name in enumerate(self._trained):
            tower = cast(VisionEncoder, self.towers[name])
            weight = tower.patch_embed.weight
            share_KTC = weight.new_empty(longest, tower.num_tokens, tower.output_width)
            all_NTC = None
            if self._first_chunk is not None:
                collected = [cast(Tensor, leaves[position].grad) for leaves in self._leaves]
                all_NTC = _pad(torch.cat(collected), longest * self.groups.topology.model_size)
            scatter_from_first_stage(all_NTC, share_KTC, self.groups)
            gradients.append(share_KTC)
        return gradients

    def _accumulate(self, images_NCHW: Tensor, gradients: list[Tensor]) -> None:
        """Add to every parameter's `main_grad`, in fp32, what these gradients of features make of it."""
        at_once = self.towers.max_images_per_forward
        for start in range(0, len(images_NCHW), at_once):
            here = slice(start, min(start + at_once, len(images_NCHW)))
            features = self.towers(images_NCHW[here], self._trained)
            found = torch.autograd.grad(features, self._parameters, [one[here] for one in gradients])
            for parameter, gradient in zip(self._parameters, found, strict=True):
                parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]


def spread_encoders(
    chunks: Sequence[DistributedDataParallel],
    vision: VisionConfig,
    train: Sequence[str],
    groups: Groups,
    recompute: bool = False,
    compiler: str | None = None,
) -> Spread:
    """Encoders for every rank of the replica, and their gradients' way into what ends the pipeline's passes.

    `chunks` hold this rank's weights as they will train; `train` are the stage's parts, `recompute` is
    `recompute.vision`, `compiler` parallel.compile_vision. Collective over the replica.
    """
    config = chunks[0].config
    first_chunk = chunks[0] if groups.is_first_stage else None
    if first_chunk is not None:
        towers = cast(VisionTowers, first_chunk.module.stage_zero.towers)
    else:
        towers = build_towers(vision, recompute, compiler).to(device=groups.device, dtype=config.params_dtype)
        for name, parameter in towers.named_parameters():
            parameter.requires_grad_(part_of(f"towers.{name}") in train)
    spread = Spread(towers, first_chunk, groups)
    finalize = config.finalize_model_grads_func

    def after_encoders(*arguments: Any, **options: Any) -> None:
        spread.backward()
        finalize(*arguments, **options)

    config.finalize_model_grads_func = after_encoders
    return spread


def _pad(share: Tensor, length: int) -> Tensor:
    """Zeros after the last image."""
    return F.pad(share, (0, 0, 0, 0, 0, length - len(share)))
