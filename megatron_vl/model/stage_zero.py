"""Stage zero: vision towers, adaptor and text embedding as one module, the first layer of the pipeline.

Paper, section 3.3: the vision encoders and the text embedding are one module whose forward is recomputed on all
tensor-parallel ranks. Vision parameters are whole on each of them; since the splice comes before the scatter of
sequence parallelism, their gradients arrive complete and equal on every rank.

Shapes: B = 1, S tokens, H hidden size, N images, T tokens per image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.model.decoder import set_requires_input_gradient


class StageZero(MegatronModule):
    """Turns tokens and images into the decoder's input."""

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        image_token: int,
        towers: nn.Module,
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
            # Replicas stay equal where a backward pass is not deterministic; equal values are unchanged.
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]

    def vision_parameters(self) -> list[nn.Parameter]:
        return [*self.towers.parameters(), *self.adaptor.parameters()]

    def forward(self, tokens_BS: Tensor, images_NCHW: Tensor | None) -> Tensor:
        """Embed.

        Returns:
            hidden_SBH, this rank's part of the sequence under sequence parallelism.

        Raises:
            ValueError: the image tokens in the row are not as many as the towers produce.
        """
        hidden_BSH = self.embedding(tokens_BS)
        if images_NCHW is not None and len(images_NCHW):
            hidden_BSH = self._splice(hidden_BSH, tokens_BS, images_NCHW)
        elif torch.is_grad_enabled():
            # Every parameter must get a gradient, or data-parallel ranks wait for each other forever.
            hidden_BSH = touch(hidden_BSH, [p for p in self.vision_parameters() if p.requires_grad])
        hidden_SBH = set_requires_input_gradient(hidden_BSH.transpose(0, 1).contiguous())
        if self.config.sequence_parallel:
            hidden_SBH = tensor_parallel.scatter_to_sequence_parallel_region(
                hidden_SBH, group=self.tensor_group
            )
        return hidden_SBH

    def _splice(self, hidden_BSH: Tensor, tokens_BS: Tensor, images_NCHW: Tensor) -> Tensor:
        features_NTH = self.adaptor(self.towers(images_NCHW)).to(hidden_BSH.dtype)
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
