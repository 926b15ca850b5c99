"""The forward passes of greedy generation, with a key-value cache in place of every layer's core attention.

Prompts run as a packed row through the layers' own attention, whose keys and values the cache keeps; after that a
row holds the latest token of each sequence, at its own position.

Shapes: B sequences, S positions of the row (S >= B; S/TP of hidden states under sequence parallelism), C positions
of the cache, L of them in use, A heads on this tensor-parallel rank, D head size, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from torch import Tensor, nn
from torch.nn import functional

from megatron_vl.model.decoder import pack_parameters
from megatron_vl.model.vlm import VisionLanguageModel


class KeyValueCache:
    """Keys and values of a batch of sequences in all layers of this rank, and how many positions each has stored."""

    def __init__(self, prompt_lengths: Sequence[int], capacity: int, device: torch.device) -> None:
        """`capacity` is the most positions that a sequence will have."""
        self.lengths = list(prompt_lengths)
        self.capacity = capacity
        self._lengths_B = torch.tensor(self.lengths, device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # by the layer's number: [B, C, A, D] each

    def store_prompts(self, layer: int, k_SAD: Tensor, v_SAD: Tensor) -> None:
        """Of the packed prompts, whose padding comes last."""
        # Zeros: what is masked is multiplied by a weight of zero, and must be finite for that.
        shape = (len(self.lengths), self.capacity, *k_SAD.shape[1:])
        keys_BCAD, values_BCAD = k_SAD.new_zeros(shape), v_SAD.new_zeros(shape)
        for row, (end, length) in enumerate(zip(accumulate(self.lengths), self.lengths, strict=True)):
            keys_BCAD[row, :length] = k_SAD[end - length : end]
            values_BCAD[row, :length] = v_SAD[end - length : end]
        self._layers[layer] = keys_BCAD, values_BCAD

    def attend(self, layer: int, q_BAD: Tensor, k_BAD: Tensor, v_BAD: Tensor, scale: float) -> Tensor:
        """Store each sequence's next position, and attend from it to all that the sequence has. Returns [B, A, D]."""
        keys_BCAD, values_BCAD = self._layers[layer]
        rows_B = torch.arange(len(self.lengths), device=q_BAD.device)
        keys_BCAD[rows_B, self._lengths_B], values_BCAD[rows_B, self._lengths_B] = k_BAD, v_BAD
        used = max(self.lengths) + 1
        seen_BL = torch.arange(used, device=q_BAD.device) <= self._lengths_B[:, None]
        out_BA1D = functional.scaled_dot_product_attention(
            q_BAD[:, :, None],
            keys_BCAD[:, :used].transpose(1, 2),
            values_BCAD[:, :used].transpose(1, 2),
            attn_mask=seen_BL[:, None, None],
            scale=scale,
        )
        return out_BA1D[:, :, 0]

    def advance(self) -> None:
        """A pass of single tokens has gone through all layers."""
        self.lengths = [length + 1 for length in self.lengths]
        self._lengths_B += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other sequences go."""
        kept_B = torch.tensor(rows, device=self._lengths_B.device)
        self.lengths = [self.lengths[row] for row in rows]
        self._lengths_B = self._lengths_B[kept_B]
        for layer, (keys_BCAD, values_BCAD) in self._layers.items():
            self._layers[layer] = keys_BCAD[kept_B], values_BCAD[kept_B]


class CachedAttention(nn.Module):
    """A core attention that stores what a packed row of prompts attends to, and serves single tokens from it."""

    def __init__(self, owner: Attention, cache: KeyValueCache) -> None:
        super().__init__()
        self.inner, self.layer, self.scale = (
            owner.core_attention,
            owner.layer_number,
            owner.config.softmax_scale,
        )
        self.cache = cache

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> Tensor:
        """Queries, keys and values are [S, A, D] of packed prompts, [S, 1, A, D] of single tokens."""
        if packed_seq_params is not None:
            self.cache.store_prompts(self.layer, key, value)
            out: Tensor = self.inner(
                query, key, value, attention_mask, packed_seq_params=packed_seq_params, **options
            )
            return out
        num = len(self.cache.lengths)
        q_BAD, k_BAD, v_BAD = (x_S1AD[:num, 0] for x_S1AD in (query, key, value))
        out_BAD = self.cache.attend(self.layer, q_BAD, k_BAD, v_BAD, self.scale)
        return functional.pad(out_BAD.flatten(1)[:, None], (0, 0, 0, 0, 0, len(query) - num))


@contextmanager
def cached_attention(chunks: Sequence[VisionLanguageModel], cache: KeyValueCache) -> Iterator[None]:
    """Put `cache` into every layer of these chunks; afterwards they have their own core attention again."""
    owners = [layer.self_attention for chunk in chunks for layer in chunk.language.block.layers]
    originals = [owner.core_attention for owner in owners]
    try:
        for owner in owners:
            owner.core_attention = CachedAttention(owner, cache)
        yield
    finally:
        for owner, original in zip(owners, originals, strict=True):
            owner.core_attention = original


@dataclass(frozen=True, kw_only=True)
class Row:
    """The input of one pass: packed prompts with their images, or one token of each sequence at its position.

    `ends` are the positions of the row that the sequences' next tokens follow.
    """

    tokens_1S: Tensor
    ends: list[int]
    packed: PackedSeqParams | None = None
    images_NCHW: Tensor | None = None
    positions_S: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.tokens_1S.shape[1]


def prompt_row(
    prompts: Sequence[Sequence[int]],
    images_NCHW: Tensor | None,
    multiple: int,
    filler: int,
    device: torch.device,
) -> Row:
    """Prompts one after the other, and a segment of `filler` up to a multiple of `multiple` positions."""
    lengths = [len(prompt) for prompt in prompts]
    padding = -sum(lengths) % multiple
    segments = [*lengths, padding] if padding else lengths
    tokens = [token for prompt in prompts for token in prompt]
    bounds = torch.tensor([0, *accumulate(segments)], dtype=torch.int32, device=device)
    return Row(
        tokens_1S=torch.tensor([tokens + [filler] * padding], device=device),
        ends=[end - 1 for end in accumulate(lengths)],
        packed=pack_parameters(bounds, max_seqlen=max(segments)),
        images_NCHW=None if images_NCHW is None else images_NCHW.to(device),
    )


def token_row(
    tokens: Sequence[int], cache: KeyValueCache, multiple: int, filler: int, device: torch.device
) -> Row:
    """The latest token of each sequence in the cache, and `filler` up to a multiple of `multiple` positions."""
    padding = -len(tokens) % multiple
    return Row(
        tokens_1S=torch.tensor([[*tokens, *[filler] * padding]], device=device),
        ends=list(range(len(tokens))),
        positions_S=torch.tensor(cache.lengths + [0] * padding, device=device),
    )


def run_chunk(
    chunk: VisionLanguageModel, received_SBH: Tensor | None, row: Row, max_positions: int
) -> Tensor:
    """This chunk's part of a pass (B = 1), within `cached_attention`. Returns hidden_SBH.

    `received_SBH` comes from the chunk before it; `max_positions` is the cache's capacity.
    """
    chunk.set_input_tensor([received_SBH])
    embedded_SBH = chunk.stage_zero(row.tokens_1S, row.images_NCHW) if chunk.pre_process else None
    language = chunk.language
    out_SBH: Tensor
    if row.packed is not None:
        out_SBH = language(embedded_SBH, row.packed)
    else:
        rotary = language.rotary(max_positions, packed_seq=True)
        out_SBH = language.block(
            hidden_states=embedded_SBH, attention_mask=None, rotary_pos_emb=rotary[row.positions_S]
        )
    chunk.set_input_tensor([None])
    return out_SBH


def next_tokens(chunk: VisionLanguageModel, hidden_SBH: Tensor, ends: list[int]) -> Tensor:
    """The likeliest token after each of the row's positions `ends`, int64 [len(ends)]. Only on the last chunk.

    Only these positions go through the head.
    """
    language, group = chunk.language, chunk.pg_collection.tp
    if chunk.config.sequence_parallel:
        hidden_SBH = tensor_parallel.gather_from_sequence_parallel_region(hidden_SBH, group=group)
    logits_BV = functional.linear(hidden_SBH[ends, 0], language.head.weight)
    whole_BV = tensor_parallel.gather_from_tensor_model_parallel_region(logits_BV, group=group)
    tokens_B: Tensor = whole_BV.argmax(dim=-1)
    return tokens_B
