"""What rows are dealt by: FLOPs as torch counts them, and the pipeline stage that really has most to do."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_vl.config.model import LanguageConfig, ModelConfig
from megatron_vl.config.train import PARTS
from megatron_vl.model.encoders import build_encoders
from megatron_vl.planning import cost
from megatron_vl.planning.cost import MeanRow, slowest_stage
from megatron_vl.planning.layout import even_layout
from megatron_vl.planning.topology import Topology

MODELS = Path(__file__).parents[2] / "hydra_conf" / "model"
ADAPTOR_ONLY = ("adaptor",)
TEXT_ROW = MeanRow(num_tokens=4096, num_images=0, num_pairs=4096 * 1000 / 2)
IMAGE_ROW = MeanRow(num_tokens=4096, num_images=6, num_pairs=4096 * 600 / 2)


def model(name: str = "deepseek_vl_7b") -> ModelConfig:
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(MODELS / f"{name}.yaml"))
    found: ModelConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]  # OmegaConf gives Any
    return found


def test_towers_cost_what_torch_counts() -> None:
    """SAM's padding of its windows (70 x 70 patches of 64 x 64) and its downsampling are left out: 6 %."""
    vision = model().vision
    with torch.device("meta"):
        towers = build_encoders(vision)
    counted = {}
    for name, tower in towers.items():
        side = getattr(vision, name).image_size
        images = torch.empty((1, 3, side, side), device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            tower(images)
        counted[name] = counter.get_total_flops()
    assert vision.siglip is not None and vision.sam is not None
    assert cost.siglip_flops(vision.siglip) == pytest.approx(counted["siglip"], rel=0.01)
    assert cost.sam_flops(vision.sam) == pytest.approx(counted["sam"], rel=0.08)


def test_the_decoder_costs_what_torch_counts_of_llama() -> None:
    """transformers' LLaMA of the same sizes; it multiplies all pairs, half of which see nothing."""
    language = LanguageConfig(
        hidden_size=256, num_layers=2, num_heads=4, ffn_hidden_size=688, vocab_size=1000, max_positions=512
    )
    num_tokens = 384
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=688,
                vocab_size=1000,
                attn_implementation="eager",
            )
        )
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            llama(torch.zeros((1, num_tokens), dtype=torch.int64))
    per_token = 2 * cost.decoder_token_flops(language) + cost.head_token_flops(language)
    pairs = 2 * cost.decoder_pair_flops(language) * num_tokens * num_tokens
    assert per_token * num_tokens + pairs == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_slowest_stage_holds_the_towers_where_rows_have_images() -> None:
    topology = Topology(world_size=2, pipeline_size=2)
    layout = even_layout(30, topology)
    with_images = slowest_stage(model(), layout, topology, PARTS, IMAGE_ROW)
    of_text = slowest_stage(model(), layout, topology, PARTS, TEXT_ROW)
    assert with_images.per_image > 0 == of_text.per_image  # the head makes the last stage the slower one
    assert of_text.per_token > with_images.per_token


def test_what_trains_costs_its_backward() -> None:
    topology = Topology(world_size=1)
    layout = even_layout(30, topology)
    everything = slowest_stage(model(), layout, topology, PARTS, IMAGE_ROW)
    frozen = slowest_stage(model(), layout, topology, ADAPTOR_ONLY, IMAGE_ROW)
    assert everything.per_image == 3 * frozen.per_image
    assert 2 * everything.per_token == 3 * frozen.per_token
    halved = slowest_stage(model(), layout, Topology(world_size=2, tensor_size=2), PARTS, IMAGE_ROW)
    assert halved.per_token == everything.per_token // 2
    assert halved.per_image == everything.per_image  # the towers are whole on every tensor-parallel rank
