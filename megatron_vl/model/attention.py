"""Attention over packed rows and the norm for megatron-core's local layers, which has neither.

Shapes: T tokens of the row, S tokens of one segment, A heads on this tensor-parallel rank, D head size.
"""

import math
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_vl.device.fused_norm import rms_norm

SHORT_SEGMENT = 512


class PackedAttention(MegatronModule):
    """Causal attention within each segment of a packed row, by scaled_dot_product_attention.

    Fits `core_attention` in a layer spec. No scores outside a segment are computed.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_spec_arguments: Any
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        q_TAD: Tensor,
        k_TAD: Tensor,
        v_TAD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend. Returns [T, A * D]; raises ValueError without `packed_seq_params` or with a bias or mask."""
        if packed_seq_params is None or attention_bias is not None or attention_mask is not None:
            raise ValueError("PackedAttention takes packed rows (packed_seq_params) without mask or bias")
        # On CPU the backward pass over short segments takes four times as long in bf16 as in fp32.
        upcast = not q_TAD.is_cuda and packed_seq_params.max_seqlen_q <= SHORT_SEGMENT
        parts = [x_TAD.float() if upcast else x_TAD for x_TAD in (q_TAD, k_TAD, v_TAD)]
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        return self._segments(parts, lengths).flatten(1).to(q_TAD.dtype)

    def _segments(self, qkv_TAD: list[Tensor], lengths: list[int]) -> Tensor:
        if len(lengths) == 1:  # splitting and joining would copy, in the backward pass too
            return self._segment(*qkv_TAD)
        segments = zip(*(part.split(lengths) for part in qkv_TAD), strict=True)
        return torch.cat([self._segment(q, k, v) for q, k, v in segments])

    def _segment(self, q_SAD: Tensor, k_SAD: Tensor, v_SAD: Tensor) -> Tensor:
        q_1ASD, k_1ASD, v_1ASD = (x.transpose(0, 1).unsqueeze(0) for x in (q_SAD, k_SAD, v_SAD))
        out_1ASD = functional.scaled_dot_product_attention(
            q_1ASD, k_1ASD, v_1ASD, is_causal=True, scale=self.softmax_scale
        )
        return out_1ASD.squeeze(0).transpose(0, 1)


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, or on hosts a faster one, marked for megatron-core's reduction of norm gradients under sequence
    parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **_spec_arguments: Any
    ) -> None:
        device = torch.device("meta") if config.init_model_with_meta_device else None
        super().__init__(hidden_size, eps, dtype=config.params_dtype, device=device)
        self.epsilon = eps
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that ends in the hidden size, kept."""
        return super().forward(x) if x.is_cuda else rms_norm(x, self.weight, self.epsilon)
