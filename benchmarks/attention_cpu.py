"""Attention over packed rows on CPU: our core attention against plain bf16 scaled_dot_product_attention.

Prints the ratio of CPU times (theirs / ours, medians of interleaved repeats, one thread), forward and backward, for
short segments, where ours computes in fp32, and long ones, where both are the same.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vl.config.model import LanguageConfig
from megatron_vl.config.parallel import RecomputeConfig
from megatron_vl.model.attention import PackedAttention
from megatron_vl.model.decoder import pack_parameters
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.planning.topology import Topology

HEADS, HEAD_SIZE, REPEATS = 4, 32, 15


def plain(lengths: list[int]) -> Callable[..., Tensor]:
    def attend(*qkv_TAD: Tensor) -> Tensor:
        segments = zip(*(x.split(lengths) for x in qkv_TAD), strict=True)
        batched = ([x.transpose(0, 1)[None] for x in segment] for segment in segments)
        outputs = [functional.scaled_dot_product_attention(*qkv, is_causal=True) for qkv in batched]
        return torch.cat([output[0].transpose(0, 1) for output in outputs]).flatten(1)

    return attend


def ours(lengths: list[int]) -> Callable[..., Tensor]:
    language = LanguageConfig(
        hidden_size=HEADS * HEAD_SIZE, num_layers=1, num_heads=HEADS, ffn_hidden_size=256
    )
    division = Division(topology=Topology(world_size=1), layout="EtL")
    config = transformer_config(language, division, RecomputeConfig(), "bf16")
    attention = PackedAttention(config)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = pack_parameters(bounds, max(lengths))
    return lambda *qkv_TAD: attention(*qkv_TAD, None, packed_seq_params=packed)


def seconds(attend: Callable[..., Tensor], num_tokens: int) -> float:
    shape = (num_tokens, HEADS, HEAD_SIZE)
    qkv_TAD = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    begun = time.process_time()
    attend(*qkv_TAD).float().sum().backward()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    for name, lengths in (("short segments", [70, 74, 60, 80, 66, 72, 74, 16]), ("one long segment", [2048])):
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(REPEATS):
            for label, attend in (("plain", plain(lengths)), ("ours", ours(lengths))):
                times[label].append(seconds(attend, sum(lengths)))
        medians = {label: median(values[2:]) for label, values in times.items()}
        print(f"{name}: plain / ours = {medians['plain'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main()
