"""Rotary positions as megatron-core's layers expect them of TransformerEngine, for hosts without it.

megatron-core's own reads the lengths of segments back from the device, and makes ten passes over queries and keys where
this makes two. Frequencies are as its RotaryEmbedding gives them: both halves alike, so one is read.

Shapes: T tokens of a packed row, S tokens, B batch, A heads, D head size, F = D / 2, P positions.
"""

from typing import Any

import torch
from torch import Tensor


def fused_rope(t_SBAD: Tensor, freqs_S11D: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate every token by its own row of `freqs`. Raises ValueError for `interleaved` pairs."""
    if interleaved:
        raise ValueError("rotary positions of interleaved pairs need TransformerEngine")
    angles_S11F = freqs_S11D.chunk(2, -1)[0]
    rotated_SBAD: Tensor = _Rotation.apply(  # type: ignore[no-untyped-call]
        t_SBAD, angles_S11F.cos().to(t_SBAD.dtype), angles_S11F.sin().to(t_SBAD.dtype)
    )
    return rotated_SBAD


def fused_rope_packed(
    t_TAD: Tensor, cu_seqlens: Tensor, freqs_P11D: Tensor, cp_size: int = 1, cp_rank: int = 0
) -> Tensor:
    """Rotate every token by the row of `freqs` at its place in its segment. Raises ValueError under context
    parallelism."""
    if cp_size > 1:
        raise ValueError("rotary positions under context parallelism need TransformerEngine")
    tokens_T = torch.arange(len(t_TAD), dtype=cu_seqlens.dtype, device=t_TAD.device)
    segments_T = torch.searchsorted(cu_seqlens[1:], tokens_T, right=True)
    places_T = tokens_T - cu_seqlens[segments_T]
    return fused_rope(t_TAD.unsqueeze(1), freqs_P11D[places_T]).squeeze(1)


class _Rotation(torch.autograd.Function):
    """Of the pairs (i, i + F) of a head by an angle; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, t_SBAD: Tensor, cos_S11F: Tensor, sin_S11F: Tensor) -> Tensor:
        ctx.save_for_backward(cos_S11F, sin_S11F)
        return _rotated(t_SBAD, cos_S11F, sin_S11F)

    @staticmethod
    def backward(ctx: Any, gradient_SBAD: Tensor) -> tuple[Tensor, None, None]:
        cos_S11F, sin_S11F = ctx.saved_tensors
        return _rotated(gradient_SBAD, cos_S11F, -sin_S11F), None, None


def _rotated(t_SBAD: Tensor, cos_S11F: Tensor, sin_S11F: Tensor) -> Tensor:
    out_SBAD = torch.empty_like(t_SBAD, memory_format=torch.contiguous_format)
    first, second = t_SBAD.chunk(2, -1)
    out_first, out_second = out_SBAD.chunk(2, -1)
    torch.mul(first, cos_S11F, out=out_first).addcmul_(second, sin_S11F, value=-1)
    torch.mul(second, cos_S11F, out=out_second).addcmul_(first, sin_S11F)
    return out_SBAD
