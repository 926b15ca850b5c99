"""Attention over a grid with decomposed relative positions (ViTDet, arXiv 2203.16527), without all scores.

The score of a query at (h, w) for a key at (h', w') is q·k/sqrt(D) + q·row[h, h'] + q·column[w, w']. On a
64x64 grid the scores of one image take 0.8 GB in fp32, and the last two terms added up as much again.

Shapes: B images or windows, A attention heads, T = H*W tokens of the grid, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 8  # of queries in a block
MAX_BLOCK_SCORES = 12 * MAX_ROWS * 64 * 64**2  # what eight rows take for one image at full size


def relative_attention(
    q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, row_HHD: Tensor, column_WWD: Tensor
) -> Tensor:
    """Attention with relative positions, shape [B, A, T, D]; `row_HHD[h, h']` belongs to the offset h - h'.

    On CUDA the positions are folded into queries and keys, so that flash attention applies. On CPU blocks of
    query rows with their part of the bias are faster; but no fused kernel takes gradients through a bias, so
    several blocks would all keep their scores for the backward pass: then the folded form serves too.
    """
    q_BAHWD = torch.unflatten(q_BATD, 2, (row_HHD.shape[0], column_WWD.shape[0]))
    to_rows_BATH = torch.einsum("bahwd,hkd->bahwk", q_BAHWD, row_HHD).flatten(2, 3)
    to_columns_BATW = torch.einsum("bahwd,wkd->bahwk", q_BAHWD, column_WWD).flatten(2, 3)
    num_rows = rows_per_block(q_BATD, row_HHD.shape[0])
    keeps_scores = to_rows_BATH.requires_grad and num_rows < row_HHD.shape[0]
    if q_BATD.device.type == "cuda" or keeps_scores:
        return folded_attention(q_BATD, k_BATD, v_BATD, to_rows_BATH, to_columns_BATW)
    return row_block_attention(q_BATD, k_BATD, v_BATD, to_rows_BATH, to_columns_BATW)


def rows_per_block(q_BATD: Tensor, height: int) -> int:
    """Rows of queries whose scores fit MAX_BLOCK_SCORES: at least one, at most MAX_ROWS and `height`."""
    batch, num_heads, num_tokens, _ = q_BATD.shape
    row_scores = batch * num_heads * num_tokens * (num_tokens // height)
    return max(1, min(MAX_ROWS, height, MAX_BLOCK_SCORES // row_scores))


def row_block_attention(
    q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, to_rows_BATH: Tensor, to_columns_BATW: Tensor
) -> Tensor:
    """A few rows of queries at a time, with their bias; `to_rows` and `to_columns` are its two terms."""
    height, width = to_rows_BATH.shape[-1], to_columns_BATW.shape[-1]
    block_size = rows_per_block(q_BATD, height) * width
    blocks = []
    for start in range(0, height * width, block_size):
        block = slice(start, start + block_size)
        bias = to_rows_BATH[:, :, block, :, None] + to_columns_BATW[:, :, block, None, :]
        attended = F.scaled_dot_product_attention(
            q_BATD[:, :, block], k_BATD, v_BATD, attn_mask=bias.flatten(3)
        )
        blocks.append(attended)
    return torch.cat(blocks, dim=2)


def folded_attention(
    q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, to_rows_BATH: Tensor, to_columns_BATW: Tensor
) -> Tensor:
    """The bias as part of the dot product: [q/sqrt(D), to_rows, to_columns] · [k, onehot(h'), onehot(w')]."""
    head_size = q_BATD.shape[-1]
    height, width = to_rows_BATH.shape[-1], to_columns_BATW.shape[-1]
    rows = torch.eye(height, dtype=q_BATD.dtype, device=q_BATD.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=q_BATD.dtype, device=q_BATD.device).repeat(height, 1)
    position_BATP = torch.cat([rows, columns], dim=-1).expand(*k_BATD.shape[:2], -1, -1)

    padded_size = -8 * (-(head_size + height + width) // 8)  # fused kernels want a multiple of 8
    q = _pad(torch.cat([q_BATD * head_size**-0.5, to_rows_BATH, to_columns_BATW], dim=-1), padded_size)
    k = _pad(torch.cat([k_BATD, position_BATP], dim=-1), padded_size)
    attended = F.scaled_dot_product_attention(q, k, _pad(v_BATD, padded_size), scale=1.0)
    return attended[..., :head_size]


def _pad(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[-1]))
