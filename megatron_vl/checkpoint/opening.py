"""A checkpoint as a model on this rank, ready for forward passes: for evaluating, where nothing trains."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.checkpoint.description import read_description
from megatron_vl.checkpoint.loading import load_weights
from megatron_vl.config.parallel import ParallelConfig, RecomputeConfig
from megatron_vl.device.machine import Device
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, VisionLanguageModel, build_chunks
from megatron_vl.parallel.groups import Groups, build_groups
from megatron_vl.planning.layout import divide


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """This rank's chunks with their weights, not wrapped for training."""

    chunks: list[VisionLanguageModel]
    config: TransformerConfig
    groups: Groups


def open_model(checkpoint: Path, parallel: ParallelConfig, precision: str, device: Device) -> OpenModel:
    """Build groups and this rank's part of the checkpoint's model. Collective over the world.

    Raises:
        UserError: no checkpoint, or its model cannot be divided so.
    """
    description = read_description(checkpoint)
    language = description.model.language
    topology, layout = divide(language, parallel, dist.get_world_size())
    division = Division(topology=topology, layout=layout, sequence_parallel=parallel.sequence_parallel)
    on_cuda = device.kind == "cuda"
    use_transformer_engine = on_cuda and parallel.transformer_engine
    config = transformer_config(
        language,
        division,
        RecomputeConfig(),
        precision,
        on_cuda=on_cuda,
        use_transformer_engine=use_transformer_engine,
    )
    groups = build_groups(topology, seed=0, device=device.torch_device)
    options = BuildOptions(
        image_token=description.image_token_id, use_transformer_engine=use_transformer_engine
    )
    chunks = build_chunks(config, description.model, options, groups.collection, device.torch_device)
    load_weights(checkpoint, chunks, description.model)
    for chunk in chunks:
        chunk.eval()
    return OpenModel(chunks=chunks, config=config, groups=groups)
