"""Attention over a grid with decomposed relative positions (ViTDet, arXiv 2203.16527), without all scores.

The score of a query at (h, w) for a key at (h', w') is q·k/sqrt(D) + q·row[h, h'] + q·column[w, w']. On a
64x64 grid the scores of one image take 0.8 GB in fp32, and the last two terms added up as much again.

Shapes: B images or windows, A attention heads, T = H*W tokens of the grid, D head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BLOCK_SCORES = 64**4  # of one head of one image at full size
MAX_KEPT_ROWS = 8  # of a grid whose scores are kept for a backward pass


def relative_attention(
    q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, row_HHD: Tensor, column_WWD: Tensor
) -> Tensor:
    """Attention with relative positions, shape [B, A, T, D]; `row_HHD[h, h']` belongs to the offset h - h'.

    On CUDA the positions are folded into queries and keys, so that flash attention applies. On CPU a few heads at a
    time with their bias are faster; but no fused kernel takes gradients through a bias, so that all blocks would keep
    their scores for the backward pass: then the folded form serves too.
    """
    height, width = row_HHD.shape[0], column_WWD.shape[0]
    q_BAHWD = torch.unflatten(q_BATD, 2, (height, width))
    to_rows_BATH = torch.einsum("bahwd,hkd->bahwk", q_BAHWD, row_HHD).flatten(2, 3)
    to_columns_BATW = torch.einsum("bahwd,wkd->bahwk", q_BAHWD, column_WWD).flatten(2, 3)
    keeps_scores = to_rows_BATH.requires_grad and height > MAX_KEPT_ROWS
    if q_BATD.device.type == "cuda" or keeps_scores:
        return folded_attention(q_BATD, k_BATD, v_BATD, to_rows_BATH, to_columns_BATW)
    return blocked_attention(q_BATD, k_BATD, v_BATD, to_rows_BATH, to_columns_BATW)


def blocked_attention(
    q_BATD: Tensor, k_BATD: Tensor, v_BATD: Tensor, to_rows_BATH: Tensor, to_columns_BATW: Tensor
) -> Tensor:
    """A few heads at a time, with their bias; `to_rows` and `to_columns` are its two terms. N: all images' heads."""
    states = (q_BATD, k_BATD, v_BATD, to_rows_BATH, to_columns_BATW)
    q_NTD, k_NTD, v_NTD, to_rows_NTH, to_columns_NTW = (x.flatten(0, 1).contiguous() for x in states)
    at_once = max(1, MAX_BLOCK_SCORES // q_NTD.shape[1] ** 2)
    attended = []
    for start in range(0, len(q_NTD), at_once):
        heads = (None, slice(start, start + at_once))
        attended.append(
            F.scaled_dot_product_attention(
                q_NTD[heads],
                k_NTD[heads],
                v_NTD[heads],
                attn_mask=(to_rows_NTH[heads][..., None] + to_columns_NTW[heads][..., None, :]).flatten(3),
            )
        )
    return torch.cat(attended, dim=1).view(q_BATD.shape)


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
