"""The adaptors against transformers' aligners, their sizes, and which towers they take.

Shapes: N images, T tokens, C a tower's width, E the decoder's hidden size.
"""

import pytest
import torch
from torch import nn
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
