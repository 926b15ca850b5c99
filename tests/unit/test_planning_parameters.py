"""Parameters by unit against those of the model's modules."""

from collections import Counter

import pytest

from megatron_vl.config.model import ModelConfig
from megatron_vl.model.shapes import parameter_shapes
from megatron_vl.model.vlm import model_part
from megatron_vl.planning.parameters import unit_parameters
from megatron_vl.planning.passes import PART, chunk_units
from tests.support.clusters import model_of
from tests.support.flops import small_model

MODELS = {
    **{name: model_of(name) for name in ("deepseek_vl_1b", "deepseek_vl_7b", "deepseek_vl_tiny")},
    **{
        kind: small_model(kind)
        for kind in (
            "hybrid_mlp_gelu",
            "shared_mlp_gelu",
            "separate_mlp_gelu",
            "pool_width_mlp_gelu",
            "pool_height_mlp_gelu",
        )
    },
    "only siglip": small_model("mlp_gelu", ("siglip",)),
    "only sam": small_model("mlp_gelu", ("sam",)),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_units_have_the_parameters_of_their_part(model: ModelConfig) -> None:
    whole: Counter[str] = Counter()
    for name, shape in parameter_shapes(model).items():
        whole[model_part(name)] += shape.numel()
    by_unit: Counter[str] = Counter()
    counts = unit_parameters(model)
    for unit, number in chunk_units("E" + "t" * model.language.num_layers + "L", model).items():
        if unit in PART:  # the loss has none
            by_unit[PART[unit]] += number * counts[unit]
    assert by_unit == whole


def test_tensor_parallel_ranks_divide_products_and_keep_norms_and_vision() -> None:
    model = model_of("deepseek_vl_7b")
    whole, half = unit_parameters(model), unit_parameters(model, 2)
    norms = 2 * model.language.hidden_size
    assert half["decoder_layer"] - norms == (whole["decoder_layer"] - norms) // 2
    assert {name for name in whole if half[name] != whole[name]} == {"embedding", "decoder_layer", "head"}
