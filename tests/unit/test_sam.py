"""SAM's encoder, neck, downsampling and HD branch against transformers' DeepSeek-VL hybrid model.

Shapes: N images, C channels, H W pixels, T tokens.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.config.model import SamConfig, SiglipConfig
from megatron_vl.model.encoders import SAM_DOWNSAMPLE
from megatron_vl.model.sam import SamEncoder, partition, unpartition
from tests.support.vision_reference import (
    gradients,
    in_our_names,
    largest_error,
    randomize,
    reference_model,
    under,
)

SIGLIP = SiglipConfig(image_size=12, patch_size=4, width=8, num_layers=1, num_heads=2, ffn_hidden_size=8)
# The 10 x 10 grid does not divide into windows of 4, and has more rows than a block; 12 / 4 is SIGLIP's grid.
TINY = SamConfig(
    image_size=40,
    patch_size=4,
    width=24,
    num_layers=4,
    num_heads=3,
    ffn_hidden_size=40,
    window_size=4,
    global_layers=[1, 3],
    neck_width=12,
    resized_grid=12,
    downsample_widths=[24, 48],
    hd_layer=1,
)


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    model = reference_model(SIGLIP, TINY, hidden_size=8)
    randomize(model)
    return model


@pytest.fixture
def encoder(reference: nn.Module) -> SamEncoder:
    encoder = SamEncoder(TINY)
    encoder.load_state_dict(under("towers.sam.", in_our_names(dict(reference.named_parameters()))))
    return encoder


@pytest.fixture(name="image_NCHW")
def random_images() -> torch.Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def test_features_and_gradients_equal_transformers(
    reference: nn.Module, encoder: SamEncoder, image_NCHW: torch.Tensor
) -> None:
    assert encoder.hd_alpha.detach().abs() > 0.1  # at 0 the HD branch would not show
    weight_NTC = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    features_NTC = encoder(image_NCHW)
    expected_NTC = reference.get_high_res_image_features(image_NCHW).last_hidden_state
    (features_NTC * weight_NTC).sum().backward()
    reference.zero_grad()
    (expected_NTC * weight_NTC).sum().backward()

    assert features_NTC.shape == (2, encoder.num_tokens, encoder.output_width)
    torch.testing.assert_close(features_NTC, expected_NTC, rtol=0, atol=1e-5)
    expected_gradients = under("towers.sam.", in_our_names(gradients(reference)))
    assert len(expected_gradients) == len(list(encoder.parameters()))
    assert largest_error(gradients(encoder), expected_gradients) < 1e-4


def test_frozen_features_equal_trainable_ones(encoder: SamEncoder, image_NCHW: torch.Tensor) -> None:
    trainable_NTC = encoder(image_NCHW)
    frozen_NTC = encoder.requires_grad_(False)(image_NCHW)
    assert trainable_NTC.requires_grad
    assert not frozen_NTC.requires_grad
    torch.testing.assert_close(frozen_NTC, trainable_NTC, rtol=0, atol=1e-5)


def test_without_hd_layer_the_rest_is_unchanged(encoder: SamEncoder, image_NCHW: torch.Tensor) -> None:
    plain = SamEncoder(replace(TINY, hd_layer=None))
    plain.load_state_dict({n: p for n, p in encoder.state_dict().items() if n in plain.state_dict()})
    assert not torch.allclose(plain(image_NCHW), encoder(image_NCHW))
    nn.init.zeros_(encoder.hd_alpha)
    torch.testing.assert_close(plain(image_NCHW), encoder(image_NCHW), rtol=0, atol=0)


def test_the_resize_is_computed_in_fp32(encoder: SamEncoder, image_NCHW: torch.Tensor) -> None:
    seen = []

    class Resizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "upsample" in str(func):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Resizes():
        features_NTC = encoder.bfloat16()(image_NCHW.bfloat16())
    assert seen == [torch.float32]
    assert features_NTC.dtype == torch.bfloat16


@given(height=st.integers(1, 9), width=st.integers(1, 9), side=st.integers(1, 5))
def test_windows_tile_the_grid(height: int, width: int, side: int) -> None:
    grid_NHWC = torch.arange(2 * height * width * 3.0).reshape(2, height, width, 3) + 1
    windows_BSSC = partition(grid_NHWC, side)
    assert windows_BSSC.shape == (2 * -(-height // side) * -(-width // side), side, side, 3)
    first_NHWC = grid_NHWC[:1, :side, :side]
    assert torch.equal(windows_BSSC[:1, : first_NHWC.shape[1], : first_NHWC.shape[2]], first_NHWC)
    assert windows_BSSC.sum() == grid_NHWC.sum()  # what fills is zero
    assert torch.equal(unpartition(windows_BSSC, height, width), grid_NHWC)


def test_full_size_parameter_counts() -> None:
    with torch.device("meta"):
        ours = SamEncoder(SamConfig())
        reference = reference_model(SiglipConfig(num_layers=1), SamConfig(), hidden_size=8)
    expected = under("towers.sam.", in_our_names(dict(reference.named_parameters())))
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in expected.items()}

    children = {name: sum(p.numel() for p in child.parameters()) for name, child in ours.named_children()}
    total = sum(p.numel() for p in ours.parameters())
    trunk = total - sum(children[name] for name in ("neck", "neck_hd", "downsamples")) - 1
    assert round((trunk + children["neck"]) / 1e6, 2) == 89.67
    assert round(children["neck_hd"] / 1e6, 2) == 0.79
    assert round(children["downsamples"] / 1e6, 2) == 5.90
    assert set(SAM_DOWNSAMPLE) - {"hd_alpha"} <= children.keys()
