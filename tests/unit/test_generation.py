"""The key-value cache against attention over whole sequences.

Shapes: B sequences, S tokens, A heads, D head size.
"""

import torch
from torch import Tensor

from megatron_vl.model.generation import KeyValueCache

CPU = torch.device("cpu")
LENGTHS = (5, 1, 3)
NUM_NEW = 4
SCALE = 0.3


def last_attention(q_SAD: Tensor, k_SAD: Tensor, v_SAD: Tensor) -> Tensor:
    """Of the last position, [A, D]."""
    weights_AS = (torch.einsum("ad,sad->as", q_SAD[-1], k_SAD) * SCALE).softmax(-1)
    return torch.einsum("as,sad->ad", weights_AS, v_SAD)


def test_cached_attention_is_attention_over_the_whole_sequence() -> None:
    """Sequences of different lengths; the second one leaves after two tokens; the prompts' padding is not stored."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(3, length + NUM_NEW, 2, 8, generator=generator) for length in LENGTHS]
    cache = KeyValueCache(LENGTHS, max(LENGTHS) + NUM_NEW, CPU)
    padding = torch.full((2, 2, 8), torch.nan)
    for layer in (1, 2):  # the second layer holds the first one's values doubled
        parts = [layer * qkv[:, :length] for qkv, length in zip(whole, LENGTHS, strict=True)]
        _, keys, values = (torch.cat([part[i] for part in parts] + [padding]) for i in range(3))
        cache.store_prompts(layer, keys, values)
    active = [0, 1, 2]
    for step in range(NUM_NEW):
        if step == 2:
            cache.keep([0, 2])
            active = [0, 2]
        ends = [LENGTHS[number] + step for number in active]
        for layer in (1, 2):
            q_BAD, k_BAD, v_BAD = (
                torch.stack([layer * whole[n][i, end] for n, end in zip(active, ends, strict=True)])
                for i in range(3)
            )
            out_BAD = cache.attend(layer, q_BAD, k_BAD, v_BAD, SCALE)
            for row, (number, end) in enumerate(zip(active, ends, strict=True)):
                expected_AD = last_attention(*(layer * whole[number][:, : end + 1]))
                torch.testing.assert_close(out_BAD[row], expected_AD)
        cache.advance()
        assert cache.lengths == [end + 1 for end in ends]
