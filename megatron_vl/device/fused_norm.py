"""RMSNorm in few passes, for hosts: torch's operators take four times as long backward there, and keep fp32 copies.

Shapes: T tokens, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight, of `x`'s shape (any number of leading dimensions) and type; in fp32."""
    normed_TH: Tensor = _RMSNorm.apply(x_TH, weight_H, epsilon)  # type: ignore[no-untyped-call]
    return normed_TH


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
        fp32_TH = x_TH.float()
        scale_T1 = fp32_TH.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_TH, weight_H, scale_T1)
        return (fp32_TH * scale_T1).mul_(weight_H).to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TH: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With n = x * scale: dx = scale * (g * weight - n * mean(g * n * weight)), dweight = sum of g * n."""
        x_TH, weight_H, scale_T1 = ctx.saved_tensors
        fp32_TH = gradient_TH.float()
        normed_TH = x_TH.float() * scale_T1
        products_TH = fp32_TH * normed_TH
        to_weight_H = (
            products_TH.flatten(0, -2).sum(0).to(weight_H.dtype) if ctx.needs_input_grad[1] else None
        )
        if not ctx.needs_input_grad[0]:
            return None, to_weight_H, None
        mean_T1 = products_TH.mul_(weight_H).mean(-1, keepdim=True)
        to_x_TH = (fp32_TH * weight_H).sub_(normed_TH.mul_(mean_T1)).mul_(scale_T1)
        return to_x_TH.to(x_TH.dtype), to_weight_H, None
