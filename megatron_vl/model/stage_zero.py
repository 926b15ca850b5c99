"""Stage zero: vision towers, adaptor and text embedding as one module, the first layer of the pipeline.

Paper, section 3.3: the vision encoders and the text embedding are one module whose forward is recomputed on all
tensor-parallel ranks. Vision parameters are whole on each of them; since the splice comes before the scatter of
sequence parallelism, their gradients arrive complete and equal on every rank. Ranks may instead share the images, or
get features that were made before (`parallel.vision_placement`).

Shapes: B = 1, S tokens, H hidden size, N images, K images of the longest share, T tokens per image.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.model.decoder import set_requires_input_gradient
from megatron_vl.model.encoders import VisionTowers
from megatron_vl.parallel.vision import SharedImages, TowerFeatures, VisionInput


class StageZero(MegatronModule):
    """Turns tokens and images into the decoder's input."""

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        image_token: int,
        towers: VisionTowers,
        adaptor: nn.Module,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        # Vision first: with overlapped parameter gathers its parameters are needed first.
        self.towers = towers
        self.adaptor = adaptor
        self.embedding = tensor_parallel.VocabParallelEmbedding(
            vocab_size, config.hidden_size, init_method=config.init_method, config=config, tp_group=groups.tp
        )
        self.image_token = image_token
        self.tensor_group = groups.tp
        for parameter in self.vision_parameters():
            # Replicas stay equal where a backward pass is not deterministic; equal values are unchanged. Where ranks
            # share the images, this is what makes their gradients whole (`_encode_share`).
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def vision_parameters(self) -> list[nn.Parameter]:
        return [*self.towers.parameters(), *self.adaptor.parameters()]

    def forward(self, tokens_BS: Tensor, images: VisionInput) -> Tensor:
        """Embed.

        Returns:
            hidden_SBH, this rank's part of the sequence under sequence parallelism.

        Raises:
            ValueError: the image tokens in the row are not as many as the towers produce.
        """
        hidden_BSH = self.embedding(tokens_BS)
        features_NTH = self._encode(images)
        if features_NTH is not None:
            hidden_BSH = self._splice(hidden_BSH, tokens_BS, features_NTH.to(hidden_BSH.dtype))
        elif torch.is_grad_enabled():
            # Every parameter must get a gradient, or data-parallel ranks wait for each other forever.
            hidden_BSH = touch(hidden_BSH, self._trained(images))
        hidden_SBH = set_requires_input_gradient(hidden_BSH.transpose(0, 1).contiguous())
        if self.config.sequence_parallel:
            hidden_SBH = tensor_parallel.scatter_to_sequence_parallel_region(
                hidden_SBH, group=self.tensor_group
            )
        return hidden_SBH

    def _trained(self, images: VisionInput) -> list[nn.Parameter]:
        """The vision parameters whose gradients come from this forward; features come from elsewhere, and so do their
        encoders' gradients."""
        modules = [self.adaptor] if isinstance(images, TowerFeatures) else [self.towers, self.adaptor]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def _encode(self, images: VisionInput) -> Tensor | None:
        """Adapted features_NTH of all images; None where there are none."""
        match images:
            case TowerFeatures(features_NTC) if len(features_NTC[0]):
                adapted_NTH: Tensor = self.adaptor(features_NTC)
                return adapted_NTH
            case SharedImages(images_NCHW, num_images) if num_images:
                return self._encode_share(images_NCHW, num_images)
            case Tensor() if len(images):
                return self._adapt(images)
        return None

    def _encode_share(self, images_NCHW: Tensor, num_images: int) -> Tensor:
        """All ranks' features: each encodes its share (`data.sharing`), padded to the longest.

        All ranks hold the same gradient of what is gathered. The backward pass sums them, so that the gradients of a
        share are as many times too large as there are ranks, and the average over the ranks that ends a step
        (`average_gradients_across_tp_domain`) is the sum of all shares' gradients.
        """
        longest = -(-num_images // self.tensor_group.size())
        if len(images_NCHW):
            share_NTH = self._adapt(images_NCHW)
        else:
            weight = self.embedding.weight
            share_NTH = weight.new_zeros(0, self.towers.num_tokens, self.config.hidden_size)
        share_KTH = F.pad(share_NTH, (0, 0, 0, 0, 0, longest - len(images_NCHW)))
        if not len(images_NCHW) and torch.is_grad_enabled():
            share_KTH = touch(share_KTH, self._trained(images_NCHW))
        gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(
            share_KTH, tensor_parallel_output_grad=True, group=self.tensor_group
        )
        return gathered[:num_images]

    def _adapt(self, images_NCHW: Tensor) -> Tensor:
        adapted_NTH: Tensor = self.adaptor(self.towers(images_NCHW))
        return adapted_NTH

    def _splice(self, hidden_BSH: Tensor, tokens_BS: Tensor, features_NTH: Tensor) -> Tensor:
        is_image_BS = tokens_BS == self.image_token
        num_features = features_NTH.shape[0] * features_NTH.shape[1]
        if not is_image_BS.is_cuda and int(is_image_BS.sum()) != num_features:  # a sync on CUDA
            raise ValueError(
                f"the row holds {int(is_image_BS.sum())} image tokens but its {features_NTH.shape[0]} images give "
                f"{num_features}"
            )
        return hidden_BSH.masked_scatter(is_image_BS.unsqueeze(-1), features_NTH)


class _Touch(torch.autograd.Function):
    """Identity on the first argument; zero gradients for all others."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=t, device=d).expand(shape) for shape, t, d in ctx.like)
        return gradient, *zeros


def touch(hidden: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """`hidden`, with every one of `parameters` in its graph at a gradient of zero."""
    if not parameters:
        return hidden
    out: Tensor = _Touch.apply(hidden, *parameters)  # type: ignore[no-untyped-call]
    return out
