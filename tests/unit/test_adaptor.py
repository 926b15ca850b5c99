"""The adaptors against transformers' aligners or token by token, their sizes, and which towers they take.

Shapes: N images, T tokens, C a tower's width, E the decoder's hidden size.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekVLConfig, DeepseekVLHybridConfig, LlamaConfig, SamVisionConfig
from transformers import SiglipVisionConfig as ReferenceSiglipConfig
from transformers.models.deepseek_vl.modeling_deepseek_vl import DeepseekVLAligner
from transformers.models.deepseek_vl_hybrid.modeling_deepseek_vl_hybrid import DeepseekVLHybridAligner

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import AdaptorConfig
from megatron_vl.config.model_check import ADAPTOR_TOWERS
from megatron_vl.model.adaptor import ADAPTORS, build_adaptor
from tests.support.vision_reference import gradients, largest_error, randomize

MLP_NAMES = {"linear1": "layers.0", "linear2": "layers.2"}
HYBRID_NAMES = {"vision_proj": "low_up_proj", "high_res_vision_proj": "high_up_proj", "proj": "layers.1"}


def reference_mlp(width: int, hidden_size: int) -> nn.Module:
    config = DeepseekVLConfig(
        text_config=LlamaConfig(hidden_size=hidden_size, num_attention_heads=4),
        vision_config=ReferenceSiglipConfig(hidden_size=width, num_attention_heads=4),
    )
    return DeepseekVLAligner(config)


def reference_hybrid(high_width: int, low_width: int, hidden_size: int) -> nn.Module:
    config = DeepseekVLHybridConfig(
        text_config=LlamaConfig(hidden_size=hidden_size, num_attention_heads=4),
        vision_config=ReferenceSiglipConfig(hidden_size=low_width, num_attention_heads=4),
        high_res_vision_config=SamVisionConfig(output_channels=high_width // 4),
    )
    return DeepseekVLHybridAligner(config)


def check_against(reference: nn.Module, names: dict[str, str], kind: str, widths: list[int]) -> None:
    randomize(reference)
    ours = build_adaptor(AdaptorConfig(kind=kind), widths, hidden_size=12)
    renamed = {f"{names[n.split('.')[0]]}.{n.split('.')[1]}": n for n, _ in reference.named_parameters()}
    ours.load_state_dict({name: reference.get_parameter(renamed[name]) for name in renamed})
    features = [torch.randn(2, 5, width, generator=torch.Generator().manual_seed(width)) for width in widths]

    adapted_NTE = ours(features)
    expected_NTE = reference(*reversed(features))  # the reference takes low, then high
    adapted_NTE.square().sum().backward()
    expected_NTE.square().sum().backward()
    torch.testing.assert_close(adapted_NTE, expected_NTE, rtol=0, atol=1e-5)
    expected = {name: reference.get_parameter(renamed[name]).grad for name in renamed}
    assert largest_error(gradients(ours), expected) < 1e-4


def test_mlp_equals_transformers() -> None:
    check_against(reference_mlp(8, 12), MLP_NAMES, "mlp_gelu", [8])


def test_hybrid_equals_transformers_and_takes_high_before_low() -> None:
    check_against(reference_hybrid(16, 8, 12), HYBRID_NAMES, "hybrid_mlp_gelu", [16, 8])


SIDE, HIGH, LOW, HIDDEN = 4, 5, 3, 6
FULL_SIZE = [1024, 1024]


def linear(module: nn.Module, name: str, x_C: Tensor) -> Tensor:
    weight_EC, bias_E = module.get_parameter(f"{name}.weight"), module.get_parameter(f"{name}.bias")
    return torch.einsum("ec,c->e", weight_EC, x_C) + bias_E


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def shared(ours: nn.Module, high_NTC: Tensor, low_NTC: Tensor, image: int, token: int) -> Tensor:
    both_C = torch.cat([high_NTC[image, token], low_NTC[image, token]])
    return linear(ours, "layers.2", gelu(linear(ours, "layers.0", both_C)))


def separate(ours: nn.Module, high_NTC: Tensor, low_NTC: Tensor, image: int, token: int) -> Tensor:
    high_E = linear(ours, "high_layers.2", gelu(linear(ours, "high_layers.0", high_NTC[image, token])))
    low_E = linear(ours, "low_layers.2", gelu(linear(ours, "low_layers.0", low_NTC[image, token])))
    return torch.cat([high_E, low_E])


def pooled_width(ours: nn.Module, high_NTC: Tensor, low_NTC: Tensor, image: int, token: int) -> Tensor:
    row, column = divmod(token % (SIDE * SIDE // 2), SIDE // 2)
    first, second = row * SIDE + 2 * column, row * SIDE + 2 * column + 1
    return pooled(ours, high_NTC[image], low_NTC[image], token, (first, second))


def pooled_height(ours: nn.Module, high_NTC: Tensor, low_NTC: Tensor, image: int, token: int) -> Tensor:
    row, column = divmod(token % (SIDE * SIDE // 2), SIDE)
    first, second = 2 * row * SIDE + column, (2 * row + 1) * SIDE + column
    return pooled(ours, high_NTC[image], low_NTC[image], token, (first, second))


def pooled(
    ours: nn.Module, high_TC: Tensor, low_TC: Tensor, token: int, neighbours: tuple[int, int]
) -> Tensor:
    """The first half of an image's tokens are the high-resolution tower's."""
    is_high = token < SIDE * SIDE // 2
    features_TC, name = (high_TC, "high_up_proj") if is_high else (low_TC, "low_up_proj")
    pair_C = torch.cat([features_TC[neighbour] for neighbour in neighbours])
    return linear(ours, "layers.1", gelu(linear(ours, name, pair_C)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("shared_mlp_gelu", shared),
        ("separate_mlp_gelu", separate),
        ("pool_width_mlp_gelu", pooled_width),
        ("pool_height_mlp_gelu", pooled_height),
    ],
)
def test_every_token_of_table_10(kind: str, expected: Callable[..., Tensor]) -> None:
    """As many tokens as one tower gives, each computed from its own neighbours alone."""
    ours = build_adaptor(AdaptorConfig(kind=kind), [HIGH, LOW], HIDDEN).double()
    randomize(ours)
    source = torch.Generator().manual_seed(5)
    high_NTC, low_NTC = (
        torch.randn(2, SIDE * SIDE, width, generator=source, dtype=torch.float64) for width in (HIGH, LOW)
    )
    adapted_NTE = ours([high_NTC, low_NTC])
    assert adapted_NTE.shape == (2, SIDE * SIDE, HIDDEN)
    for image in range(2):
        for token in range(SIDE * SIDE):
            expected_E = expected(ours, high_NTC, low_NTC, image, token)
            torch.testing.assert_close(adapted_NTE[image, token], expected_E, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind, towers in ADAPTOR_TOWERS.items() if towers == 2])
@pytest.mark.parametrize("depth", [1, 3])
def test_depth_of_two_tower_adaptors(kind: str, depth: int) -> None:
    """An input passes `depth` linear layers; what it gives keeps its shape."""
    ours = build_adaptor(AdaptorConfig(kind=kind, depth=depth), [HIGH, LOW], HIDDEN)
    num_linear = sum(isinstance(module, nn.Linear) for module in ours.modules())
    per_input = {"shared_mlp_gelu": depth, "separate_mlp_gelu": 2 * depth}.get(kind, depth + 1)
    assert num_linear == per_input
    features = [torch.ones(1, SIDE * SIDE, width) for width in (HIGH, LOW)]
    assert ours(features).shape == (1, SIDE * SIDE, HIDDEN)


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("shared_mlp_gelu", 2048 * 4096 + 4096 * 4096),
        ("separate_mlp_gelu", 2 * (1024 * 2048 + 2048 * 2048)),
        ("pool_width_mlp_gelu", 2 * 2048 * 4096 + 4096 * 4096),
        ("pool_height_mlp_gelu", 2 * 2048 * 4096 + 4096 * 4096),
    ],
)
def test_weights_at_the_7b_models_widths(kind: str, weights: int) -> None:
    with torch.device("meta"):
        ours = build_adaptor(AdaptorConfig(kind=kind), FULL_SIZE, 4096)
    assert sum(p.numel() for p in ours.parameters() if p.dim() == 2) == weights


@pytest.mark.parametrize(
    ("kind", "widths", "hidden_size", "millions"),
    [("mlp_gelu", [1024], 2048, 6.30), ("hybrid_mlp_gelu", [1024, 1024], 4096, 20.98)],
)
def test_full_size_parameter_counts(kind: str, widths: list[int], hidden_size: int, millions: float) -> None:
    with torch.device("meta"):
        ours = build_adaptor(AdaptorConfig(kind=kind), widths, hidden_size)
        single = kind == "mlp_gelu"
        reference = reference_mlp(1024, 2048) if single else reference_hybrid(1024, 1024, 4096)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_counts_linear_layers(depth: int) -> None:
    ours = build_adaptor(AdaptorConfig(kind="mlp_gelu", depth=depth), [8], hidden_size=12)
    layers = list(ours.layers)
    assert [type(layer) for layer in layers] == [nn.Linear, *[nn.GELU, nn.Linear] * (depth - 1)]


@pytest.mark.parametrize(
    ("kind", "widths"), [("mlp_gelu", [8, 8]), ("hybrid_mlp_gelu", [8]), ("pooled", [8]), ("mlp_gelu", [])]
)
def test_an_adaptor_that_does_not_fit_is_named_with_the_valid_ones(kind: str, widths: list[int]) -> None:
    with pytest.raises(UserError, match=rf"model\.vision\.adaptor\.kind={kind} .* {len(widths)} ") as error:
        build_adaptor(AdaptorConfig(kind=kind), widths, hidden_size=12)
    assert all(known in str(error.value) for known in ADAPTORS)


def test_every_adaptor_says_how_many_towers_it_takes() -> None:
    assert ADAPTORS.keys() == ADAPTOR_TOWERS.keys()
