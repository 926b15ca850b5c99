"""The towers together: preprocessing, chunks, recompute, parts, initial weights; all against transformers.

Shapes: N images, C channels, H W pixels, T tokens, E the decoder's hidden size.
"""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.utils import counters

from megatron_vl.config.errors import UserError
from megatron_vl.config.model import AdaptorConfig, SamConfig, SiglipConfig, VisionConfig
from megatron_vl.model.adaptor import build_adaptor
from megatron_vl.model.encoders import VisionTowers, build_encoders, build_towers, initialize_vision, part_of
from tests.support.vision_reference import (
    gradients,
    in_our_names,
    largest_error,
    randomize,
    reference_model,
    under,
)

SIGLIP = SiglipConfig(image_size=24, patch_size=8, width=16, num_layers=2, num_heads=2, ffn_hidden_size=24)
SAM = SamConfig(
    image_size=80,
    patch_size=8,
    width=16,
    num_layers=2,
    num_heads=2,
    ffn_hidden_size=24,
    window_size=4,
    global_layers=[1],
    neck_width=8,
    resized_grid=12,
    downsample_widths=[16, 32],
    hd_layer=1,
)
VISION = VisionConfig(
    siglip=SIGLIP, sam=SAM, adaptor=AdaptorConfig(kind="hybrid_mlp_gelu"), max_images_per_forward=8
)


class Vision(nn.Module):
    """The part of stage zero that these tests need."""

    def __init__(self, vision: VisionConfig = VISION, recompute: bool = False) -> None:
        super().__init__()
        encoders = build_encoders(vision)
        self.towers = VisionTowers(encoders, vision.max_images_per_forward, recompute)
        self.adaptor = build_adaptor(vision.adaptor, self.towers.output_widths, hidden_size=12)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        adapted_NTE: Tensor = self.adaptor(self.towers(images_NCHW))
        return adapted_NTE


def generator_for(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def make_vision(max_images: int = 8, recompute: bool = False) -> Vision:
    """With the same random weights, HD alpha included, at every call."""
    vision = Vision(replace(VISION, max_images_per_forward=max_images), recompute)
    randomize(vision)
    return vision


@pytest.fixture(scope="module", name="images_NCHW")
def random_images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (5, 3, 80, 80), dtype=torch.uint8, generator=generator)


def test_towers_and_adaptor_equal_transformers(images_NCHW: Tensor) -> None:
    reference = reference_model(SIGLIP, SAM, hidden_size=12)
    randomize(reference)
    vision = Vision()
    vision.load_state_dict(in_our_names(dict(reference.named_parameters())))
    high, low = vision.towers.encoders
    unit_NCHW = images_NCHW / 255
    weight_NTE = torch.randn(5, 9, 12, generator=torch.Generator().manual_seed(2))

    adapted_NTE = vision(images_NCHW)
    expected_NTE = reference.get_image_features(
        low.normalize(unit_NCHW), high.normalize(unit_NCHW), return_dict=True
    ).pooler_output
    (adapted_NTE * weight_NTE).sum().backward()
    (expected_NTE * weight_NTE).sum().backward()
    torch.testing.assert_close(adapted_NTE, expected_NTE, rtol=0, atol=1e-5)
    assert largest_error(gradients(vision), in_our_names(gradients(reference))) < 1e-4


def test_towers_come_high_first_whatever_the_config_lists_first() -> None:
    assert list(build_encoders(VISION)) == ["sam", "siglip"]
    assert list(build_encoders(replace(VISION, sam=None))) == ["siglip"]
    assert make_vision().towers.output_widths == [32, 16]


def test_the_low_tower_sees_what_pillow_resizes() -> None:
    ramp = np.add.outer(np.arange(80), np.arange(80)) * 255 // 158  # smooth, so that 8-bit rounding is all
    pixels = np.stack([ramp, 255 - ramp, ramp.T // 2], axis=-1).astype(np.uint8)
    resized = Image.fromarray(pixels).resize((24, 24), Image.Resampling.BILINEAR)
    expected_CHW = (torch.tensor(np.asarray(resized)).permute(2, 0, 1) / 255 - 0.5) / 0.5

    low = make_vision().towers.encoders[1]
    normalized_NCHW = low.normalize(torch.tensor(pixels).permute(2, 0, 1)[None] / 255)
    assert (normalized_NCHW[0] - expected_CHW).abs().max() < 2.0 / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation_is_exact_whatever_the_weights_dtype(dtype: torch.dtype) -> None:
    high = make_vision().to(dtype).towers.encoders[0]
    unit_NCHW = torch.full((1, 3, 80, 80), 100 / 255)
    colours = [(100 / 255 - mean) / std for mean, std in zip(SAM.mean, SAM.std, strict=True)]
    normalized_C = high.normalize(unit_NCHW)[0, :, 0, 0]
    assert normalized_C.dtype == dtype
    # Half a unit in the last place: bf16 means would be off by several.
    torch.testing.assert_close(
        normalized_C.double(), torch.tensor(colours).double(), rtol=torch.finfo(dtype).eps, atol=1e-7
    )


def test_chunks_change_nothing(images_NCHW: Tensor) -> None:
    whole, chunked = make_vision(max_images=8), make_vision(max_images=2)
    seen: list[int] = []
    for encoder in chunked.towers.encoders:
        encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(chunked(images_NCHW), whole(images_NCHW), rtol=0, atol=1e-5)
    assert seen == [2, 2, 2, 2, 1, 1]
    for vision in (whole, chunked):
        vision(images_NCHW).square().sum().backward()
    assert largest_error(gradients(chunked), gradients(whole)) < 1e-4


def test_recompute_changes_no_gradient_and_runs_each_block_again(images_NCHW: Tensor) -> None:
    plain, recomputed = make_vision(), make_vision(recompute=True)
    runs = []
    for encoder in recomputed.towers.encoders:
        for block in encoder.blocks:
            block.register_forward_pre_hook(lambda *_: runs.append(1))
    for vision in (plain, recomputed):
        vision(images_NCHW).square().sum().backward()
    expected = gradients(plain)
    assert gradients(recomputed).keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(recomputed).items())
    assert len(runs) == 2 * (SAM.num_layers + SIGLIP.num_layers)


def test_compiled_and_recomputed_blocks_change_nothing(images_NCHW: Tensor) -> None:
    """Through the tracer, whose graphs run as they are; SigLIP's patch embedding is frozen."""
    vision = replace(VISION, sam=None)
    plain, compiled = build_towers(vision), build_towers(vision, recompute=True, compiler="eager")
    with torch.no_grad():
        randomize(plain)
    compiled.load_state_dict(plain.state_dict())
    counters.clear()
    for towers in (plain, compiled):
        towers["siglip"].patch_embed.requires_grad_(False)
        towers(images_NCHW)[0].square().sum().backward()
    assert counters["stats"]["unique_graphs"] > 0
    expected = gradients(plain)
    assert gradients(compiled).keys() == expected.keys() != set()
    assert largest_error(gradients(compiled), expected) < 1e-5


def test_an_unknown_compiler_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.compile_vision=gcc: not one of .*inductor"):
        build_towers(VISION, compiler="gcc")


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_towers_build_no_graph_and_the_adaptor_still_learns(
    images_NCHW: Tensor, recompute: bool
) -> None:
    vision = make_vision(recompute=recompute)
    vision.towers.requires_grad_(False)
    assert not any(features.requires_grad for features in vision.towers(images_NCHW))
    vision(images_NCHW).sum().backward()
    assert {part_of(name) for name in gradients(vision)} == {"adaptor"}


def test_every_parameter_has_a_part() -> None:
    parts = {name: part_of(name) for name, _ in Vision().named_parameters()}
    assert set(parts.values()) == {"siglip", "sam", "sam_downsample", "adaptor"}
    downsample = {name.split(".")[2] for name, part in parts.items() if part == "sam_downsample"}
    assert downsample == {"neck", "neck_hd", "downsamples", "hd_alpha"}
    trunk = {name.split(".")[2] for name, part in parts.items() if part == "sam"}
    assert trunk == {"patch_embed", "pos_embed", "blocks"}
    for unknown in ("embedding.weight", "towers.clip.norm.weight", "towers"):
        with pytest.raises(ValueError, match=unknown):
            part_of(unknown)


def test_initial_values_follow_names_alone() -> None:
    first, second = Vision(), Vision()
    initialize_vision(first, generator_for)
    asked: list[str] = []
    initialize_vision(second, lambda name: asked.append(name) or generator_for(name))
    assert set(asked) < {name for name, _ in second.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    alone = nn.Module()
    alone.adaptor = build_adaptor(VISION.adaptor, [32, 16], hidden_size=12)  # no towers drawn before it
    initialize_vision(alone, generator_for)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, first.get_parameter(name))


def test_initial_values_keep_the_rule_and_touch_vision_alone() -> None:
    vision = Vision(replace(VISION, siglip=replace(SIGLIP, width=256)))
    vision.embedding = nn.Embedding(3, 4)  # stage zero has one beside the towers
    before = vision.embedding.weight.clone()
    randomize(vision.towers)
    initialize_vision(vision, generator_for)
    assert torch.equal(vision.embedding.weight, before)
    siglip, sam = vision.towers.requires_grad_(False)["siglip"], vision.towers["sam"]
    assert float(siglip.blocks[0].attn.qkv.weight.std()) == pytest.approx(256**-0.5, rel=0.02)
    assert float(sam.downsamples[1].weight.std()) == pytest.approx((16 * 9) ** -0.5, rel=0.05)
    assert float(siglip.pos_embed.std()) == pytest.approx(0.02, rel=0.1)
    for name, parameter in vision.towers.named_parameters():
        if name.endswith("bias") or name == "sam.hd_alpha":
            assert not parameter.any(), name
    norms = [m for m in vision.towers.modules() if isinstance(m, nn.LayerNorm)]
    assert norms
    assert all((norm.weight == 1).all() for norm in norms)


def test_gradients_reach_every_initial_parameter_but_those_behind_a_zero_alpha(images_NCHW: Tensor) -> None:
    vision = Vision()
    initialize_vision(vision, generator_for)
    vision(images_NCHW).square().sum().backward()
    silent = {name for name, gradient in gradients(vision).items() if not gradient.any()}
    assert len(gradients(vision)) == len(list(vision.parameters()))
    assert all(name.startswith("towers.sam.neck_hd.") for name in silent)
    assert under("towers.sam.", gradients(vision))["hd_alpha"].any()
