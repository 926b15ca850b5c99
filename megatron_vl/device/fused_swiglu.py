"""SwiGLU in as few passes as torch has kernels, for hosts where megatron-core's own is not compiled.

megatron-core makes nine passes backward and joins two gradients at the end; this writes each half in its place.

Shapes: T tokens, F width of either half; the gate comes first.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu


def swiglu(halves_T2F: Tensor) -> Tensor:
    """silu(gate) * linear, [T, F]."""
    gate_TF, linear_TF = halves_T2F.chunk(2, -1)
    return silu(gate_TF).mul_(linear_TF)


def swiglu_back(gradient_TF: Tensor, halves_T2F: Tensor) -> Tensor:
    """The gradient of both halves, [T, 2F], from that of `swiglu`'s result."""
    gate_TF, linear_TF = halves_T2F.chunk(2, -1)
    out_T2F = torch.empty_like(halves_T2F)
    gate_out_TF, linear_out_TF = out_T2F.chunk(2, -1)
    torch.ops.aten.silu_backward.grad_input(gradient_TF * linear_TF, gate_TF, grad_input=gate_out_TF)
    torch.mul(gradient_TF, silu(gate_TF), out=linear_out_TF)
    return out_T2F
