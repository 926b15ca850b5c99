"""SigLIP against transformers' implementation, at tiny widths and in its full-size parameter count."""

import torch

from megatron_vl.config.model import SamConfig, SiglipConfig
from megatron_vl.model.siglip import SiglipEncoder
from tests.support.vision_reference import (
    gradients,
    in_our_names,
    largest_error,
    randomize,
    reference_model,
    under,
)

TINY = SiglipConfig(image_size=48, patch_size=8, width=32, num_layers=3, num_heads=4, ffn_hidden_size=80)
UNUSED_SAM = SamConfig(image_size=32, width=8, num_layers=1, num_heads=1, ffn_hidden_size=8, neck_width=4)


def test_features_and_gradients_equal_transformers() -> None:
    reference = reference_model(TINY, UNUSED_SAM, hidden_size=8)
    randomize(reference)
    encoder = SiglipEncoder(TINY)
    encoder.load_state_dict(under("towers.siglip.", in_our_names(dict(reference.named_parameters()))))
    image_NCHW = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    weight_NTC = torch.randn(3, 36, 32, generator=torch.Generator().manual_seed(2))

    features_NTC = encoder(image_NCHW)
    expected_NTC = reference.vision_model(image_NCHW).last_hidden_state
    (features_NTC * weight_NTC).sum().backward()
    (expected_NTC * weight_NTC).sum().backward()

    assert features_NTC.shape == (3, encoder.num_tokens, encoder.output_width)
    torch.testing.assert_close(features_NTC, expected_NTC, rtol=0, atol=1e-5)
    expected_gradients = under("towers.siglip.", in_our_names(gradients(reference)))
    assert len(expected_gradients) == len(list(encoder.parameters()))
    assert largest_error(gradients(encoder), expected_gradients) < 1e-4


def test_full_size_parameter_count() -> None:
    with torch.device("meta"):
        ours = SiglipEncoder(SiglipConfig())
        reference = reference_model(SiglipConfig(), UNUSED_SAM, hidden_size=8).vision_model
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert round(count / 1e6, 2) == 303.69
