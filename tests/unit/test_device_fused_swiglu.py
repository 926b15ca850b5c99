"""Our SwiGLU against its formula, differentiated by autograd, and in megatron-core's place.

Shapes: T tokens, F width of either half.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor

from megatron_vl.device.fused_swiglu import swiglu, swiglu_back


def formula(halves_T2F: Tensor) -> Tensor:
    gate_TF, linear_TF = halves_T2F.chunk(2, -1)
    return gate_TF / (1 + torch.exp(-gate_TF)) * linear_TF


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 9), width=st.integers(1, 40), seed=st.integers(0, 99))
def test_equals_the_formula(tokens: int, width: int, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    halves_T2F = (4 * torch.randn(tokens, 2 * width, generator=source)).requires_grad_()
    gradient_TF = torch.randn(tokens, width, generator=source)
    expected_TF = formula(halves_T2F)
    expected_TF.backward(gradient_TF)
    torch.testing.assert_close(swiglu(halves_T2F.detach()), expected_TF, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        swiglu_back(gradient_TF, halves_T2F.detach()), halves_T2F.grad, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatron_core_takes_it_and_keeps_the_input(dtype: torch.dtype) -> None:
    halves_T2F = torch.randn(5, 12, dtype=dtype, requires_grad=True)
    before = halves_T2F.detach().clone()
    activated_TF = bias_swiglu_impl(halves_T2F, None)
    activated_TF.backward(torch.ones_like(activated_TF))
    assert torch.equal(activated_TF, swiglu(before))
    assert torch.equal(halves_T2F.grad, swiglu_back(torch.ones_like(activated_TF), before))
    assert torch.equal(halves_T2F, before)
