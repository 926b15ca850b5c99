"""Our rotary positions against megatron-core's unfused ones and against complex numbers.

Shapes: T tokens, A heads, D head size.
"""

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_vl.device.fused_rope import fused_rope, fused_rope_packed

HEADS, HEAD_SIZE = 3, 8
ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def frequencies(num_positions: int) -> Tensor:
    """[P, 1, 1, D], both halves alike."""
    angles = torch.arange(num_positions)[:, None] * 100.0 ** -torch.linspace(0, 1, HEAD_SIZE // 2)
    return torch.cat([angles, angles], -1)[:, None, None]


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), more=st.integers(0, 3))
def test_packed_equals_unfused(lengths: list[int], more: int) -> None:
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    # More positions than the longest segment has may be known, but for as many as the row has, which unfused reads
    # along the row.
    num_positions = max(lengths) + more
    mine = torch.randn(sum(lengths), HEADS, HEAD_SIZE, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    turned = fused_rope_packed(mine, bounds, frequencies(num_positions))
    expected = torch.cat(
        [
            rope_utils._apply_rotary_pos_emb_bshd(segment.unsqueeze(1), frequencies(length)).squeeze(1)
            for segment, length in zip(theirs.split(lengths), lengths, strict=True)
        ]
    )
    torch.testing.assert_close(turned, expected)
    weight = torch.randn_like(turned)
    turned.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_is_a_product_of_complex_numbers() -> None:
    t, freqs = torch.randn(5, 2, HEADS, HEAD_SIZE, dtype=torch.float64), frequencies(5).double()
    turned = fused_rope(t, freqs)
    first, second = t.chunk(2, -1)
    product = torch.complex(first, second) * torch.polar(torch.ones(()).double(), freqs.chunk(2, -1)[0])
    torch.testing.assert_close(turned, torch.cat([product.real, product.imag], -1))


def test_megatron_core_has_it() -> None:
    config = SimpleNamespace(apply_rope_fusion=True, rotary_interleaved=False, mrope_section=None)
    t, bounds = torch.randn(6, HEADS, HEAD_SIZE), torch.tensor([0, 4, 6], dtype=torch.int32)
    turned = rope_utils.apply_rotary_pos_emb(t, frequencies(4), config, bounds, cp_group=ONE_RANK)
    assert torch.equal(turned, fused_rope_packed(t, bounds, frequencies(4)))
    assert torch.equal(turned[4:], fused_rope_packed(t[4:], torch.tensor([0, 2]), frequencies(4)))


def test_refuses_what_only_transformer_engine_can() -> None:
    t = torch.randn(6, HEADS, HEAD_SIZE)
    with pytest.raises(ValueError, match="context parallelism"):
        fused_rope_packed(t, torch.tensor([0, 6]), frequencies(6), cp_size=2)
    with pytest.raises(ValueError, match="interleaved"):
        fused_rope(t.unsqueeze(1), frequencies(6), interleaved=True)
