"""Initial weights as a function of (seed, parameter name) alone: equal at every parallel size and layout.

megatron-core draws from one stream per rank, so its weights change with the layout; here each parameter has a
generator of its own, the whole tensor is drawn, and a tensor-parallel rank keeps its slice.
"""

import hashlib
import math
import re

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_vl.model.encoders import initialize_vision
from megatron_vl.model.vlm import VisionLanguageModel


def initialize(
    chunks: list[VisionLanguageModel], seed: int, init_std: float, groups: ProcessGroupCollection
) -> None:
    """Fill every parameter of this rank's chunks.

    Decoder matrices are normal with `init_std`, those that write to the residual stream divided by
    sqrt(2 * num_layers) (Megatron-LM); norms are one; vision follows `initialize_vision`.
    """
    for chunk in chunks:
        names = global_names(chunk)
        if chunk.pre_process:
            initialize_vision(chunk.stage_zero, lambda name: generator(seed, f"stage_zero.{name}"))
        for local_name, parameter in chunk.named_parameters():
            name = names[local_name]
            if name.startswith(("stage_zero.towers.", "stage_zero.adaptor.")):
                continue
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
                continue
            writes_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = init_std / math.sqrt(2 * chunk.config.num_layers) if writes_residual else init_std
            _fill(parameter, std, generator(seed, name), groups.tp.rank(), groups.tp.size())


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each parameter name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def global_names(chunk: VisionLanguageModel) -> dict[str, str]:
    """Parameter names in this chunk -> names with the layer's number in the whole model (from 0)."""
    numbers = {
        str(index): str(layer.layer_number - 1) for index, layer in enumerate(chunk.language.block.layers)
    }
    return {
        name: re.sub(r"(?<=block\.layers\.)\d+", lambda match: numbers[match[0]], name)
        for name, _ in chunk.named_parameters()
    }


@torch.no_grad()
def _fill(parameter: Tensor, std: float, source: torch.Generator, tensor_rank: int, tensor_size: int) -> None:
    """Draw the whole tensor and copy this rank's slice (gate and up halves apart where they are fused)."""
    if not getattr(parameter, "tensor_model_parallel", False) or tensor_size == 1:
        parameter.copy_(torch.randn(parameter.shape, generator=source) * std)
        return
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    shape = list(parameter.shape)
    shape[dim] *= tensor_size
    whole = torch.randn(shape, generator=source) * std
    parts = whole.chunk(tensor_size * stride, dim)[tensor_rank::tensor_size]
    parameter.copy_(torch.cat(parts, dim))
