"""The full-size models on the meta device: as many parameters as DeepSeek-VL's released weights."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.parallel import RecomputeConfig
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.model.vlm import BuildOptions, build_chunks, model_part
from megatron_vl.parallel.groups import build_groups
from megatron_vl.planning.layout import resolve_layout
from megatron_vl.planning.topology import Topology
from tests.support.ranks import run_ranks

MODEL_CONFIGS = Path(__file__).parents[2] / "hydra_conf" / "model"
PARAMETERS = {"deepseek_vl_1b": 1_962_640_384, "deepseek_vl_7b": 7_331_390_721}
# Millions, from the released weights; sam has its neck, HD neck and downsampling here.
PARTS = {
    "deepseek_vl_1b": {"siglip": 303.69, "adaptor": 6.30, "embedding": 209.7, "head": 209.7},
    "deepseek_vl_7b": {"siglip": 303.69, "sam": 96.36, "adaptor": 20.98, "embedding": 419.4, "head": 419.4},
}


def count_parts(name: str, tensor_size: int) -> dict[str, int]:
    """Parameters of this rank by part, without allocating any."""
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(MODEL_CONFIGS / f"{name}.yaml")
    )
    model: ModelConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    topology = Topology(world_size=tensor_size, tensor_size=tensor_size)
    groups = build_groups(topology, 1, torch.device("cpu"))
    division = Division(topology=topology, layout=resolve_layout(None, model.language.num_layers, topology))
    config = transformer_config(model.language, division, RecomputeConfig(), "bf16")
    config.use_cpu_initialization = True  # parameters then follow the default device
    with torch.device("meta"):
        (chunk,) = build_chunks(
            config, model, BuildOptions(image_token=100015), groups.collection, torch.device("meta")
        )
    counts: dict[str, int] = {}
    for parameter_name, parameter in chunk.named_parameters():
        assert parameter.is_meta
        part = model_part(parameter_name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    counts = run_ranks(1, count_parts, name, 1)[0]
    assert sum(counts.values()) == PARAMETERS[name]
    counts["sam"] = counts.get("sam", 0) + counts.get("sam_downsample", 0)
    for part, millions in PARTS[name].items():
        assert counts[part] / 1e6 == pytest.approx(millions, abs=0.06), part


def test_tensor_parallel_ranks_share_the_decoder_and_replicate_vision() -> None:
    whole = run_ranks(1, count_parts, "deepseek_vl_7b", 1)[0]
    halves = run_ranks(2, count_parts, "deepseek_vl_7b", 2)
    norms = (2 * 30 + 1) * 4096  # replicated
    for half in halves:
        assert half["head"] * 2 == whole["head"]
        assert (half["decoder"] - norms) * 2 == whole["decoder"] - norms
        for part in ("siglip", "sam", "sam_downsample", "adaptor"):
            assert half[part] == whole[part]
