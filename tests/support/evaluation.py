"""An evaluator over a model with given weights, at any parallel setting."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.data.images import ImageRule, ImageTokens
from megatron_vl.data.loader import ContentRule
from megatron_vl.evaluate.evaluator import Evaluator
from megatron_vl.model.initialize import global_names
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, build_chunks
from megatron_vl.parallel.groups import Groups, build_groups
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.topology import Topology
from tests.support.tiny_data import text_rule

ROW = 96


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model's weights by our names, whole; its tokenizer; the parallel setting to run it at."""

    model: ModelConfig
    weights: Mapping[str, Tensor]
    tokenizer: Path
    image_size: int
    tokens_per_image: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    max_cached_positions: int = 16384


def content_rule(tokenizer: Path, image_size: int, tokens_per_image: int) -> ContentRule:
    return ContentRule(
        text=text_rule(tokenizer),
        image=ImageRule(size=image_size, mean=(0.48145466, 0.4578275, 0.40821073), max_pixels=100_000),
        image_tokens=ImageTokens(tokens_per_image=tokens_per_image),
        max_sample_bytes=100_000,
    )


def build_evaluator(setup: Setup) -> Evaluator:
    """This rank's evaluator; its chunks are not wrapped. To be called on ranks of `run_ranks`."""
    parallel = setup.parallel
    topology = Topology(
        world_size=dist.get_world_size(),
        tensor_size=parallel.tensor_size,
        pipeline_size=parallel.pipeline_size,
        virtual_size=parallel.virtual_size,
    )
    groups = build_groups(topology, seed=1, device=torch.device("cpu"))
    layout = resolve_layout(parallel.layout, setup.model.language.num_layers, topology)
    division = Division(topology=topology, layout=layout, sequence_parallel=parallel.sequence_parallel)
    config = transformer_config(setup.model.language, division, RecomputeConfig(), "fp32")
    content = content_rule(setup.tokenizer, setup.image_size, setup.tokens_per_image)
    options = BuildOptions(image_token=content.text.image_id)
    chunks = build_chunks(config, setup.model, options, groups.collection, groups.device)
    fill(chunks, setup.weights, groups)
    return Evaluator(
        chunks=chunks,
        groups=groups,
        content=content,
        sequence_length=ROW,
        max_cached_positions=setup.max_cached_positions,
    )


@torch.no_grad()
def fill(chunks: list[Any], weights: Mapping[str, Tensor], groups: Groups) -> None:
    """Give this rank's chunks their part of whole weights."""
    rank, size = groups.tensor_rank, groups.topology.tensor_size
    for chunk in chunks:
        names = global_names(chunk)
        for name, parameter in chunk.named_parameters():
            whole = weights[names[name]]
            if size > 1 and getattr(parameter, "tensor_model_parallel", False):
                dim, stride = parameter.partition_dim, parameter.partition_stride
                whole = torch.cat(whole.chunk(size * stride, dim)[rank::size], dim)
            parameter.copy_(whole)
