"""What rows are dealt by: the pipeline stage that really has most to do."""

from pathlib import Path

from omegaconf import OmegaConf

from megatron_vl.config.model import ModelConfig
from megatron_vl.config.train import PARTS
from megatron_vl.planning.dealing import slowest_stage
from megatron_vl.planning.layout import even_layout
from megatron_vl.planning.topology import Topology
from megatron_vl.planning.workload import Load

MODELS = Path(__file__).parents[2] / "hydra_conf" / "model"
ADAPTOR_ONLY = ("adaptor",)
TEXT_ROW = Load(num_tokens=4096, num_images=0, num_pairs=4096 * 1000 / 2)
IMAGE_ROW = Load(num_tokens=4096, num_images=6, num_pairs=4096 * 600 / 2)


def model(name: str = "deepseek_vl_7b") -> ModelConfig:
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(MODELS / f"{name}.yaml"))
    found: ModelConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]  # OmegaConf gives Any
    return found


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
    assert everything.per_image > 2.9 * frozen.per_image
    assert 2 * everything.per_token == 3 * frozen.per_token  # no gradients of the decoder's weights
    assert everything.per_pair == frozen.per_pair  # attention has no weights
    halved = slowest_stage(model(), layout, Topology(world_size=2, tensor_size=2), PARTS, IMAGE_ROW)
    assert halved.per_token == everything.per_token // 2
    assert halved.per_image == everything.per_image  # the towers are whole on every tensor-parallel rank
