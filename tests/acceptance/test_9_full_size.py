"""The 1.3B model at its full size: written by transformers, imported, run at TP2 on one image, and compared.

It takes 9 GB of disk and 10 GB of memory. Shapes: S tokens, V vocabulary.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    LlamaConfig,
    SiglipVisionConfig,
)

from megatron_vl.checkpoint.convert.importing import import_model
from megatron_vl.checkpoint.opening import open_model
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.data.microbatch import Microbatch
from megatron_vl.device.machine import pick_device
from megatron_vl.parallel.pipeline import run_forward
from tests.support.ranks import run_ranks
from tests.support.vision_reference import randomize

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_PARAMETERS = 1_962_640_384
IMAGE_TOKEN_ID, TOKENS_PER_IMAGE = 100015, 576
COMPARED = 40  # last positions: the text after the image, and the image's end
TIMEOUT = 900.0


def write_release(folder: Path) -> None:
    """Random weights in bf16, as the released ones are stored."""
    text = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        intermediate_size=5632,
        vocab_size=102400,
        max_position_embeddings=16384,
    )
    vision = SiglipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=384,
        hidden_act="gelu",
        vision_use_head=False,
    )
    config = DeepseekVLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN_ID, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = DeepseekVLForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS
    randomize(model)
    model.save_pretrained(folder)


def inputs() -> tuple[Tensor, Tensor]:
    """Tokens [S] with one image among text, and the image as uint8 [1, 3, 384, 384]."""
    source = torch.Generator().manual_seed(0)
    words = torch.randint(0, 100000, (36,), generator=source)
    tokens = torch.cat([words[:4], torch.full((TOKENS_PER_IMAGE,), IMAGE_TOKEN_ID), words[4:]])
    return tokens, torch.randint(0, 256, (1, 3, 384, 384), generator=source, dtype=torch.uint8)


def peak_of_import(folder: Path) -> int:
    """In bytes: this process's, libraries and mapped files included."""
    imported = import_model(folder / "source", folder / "checkpoint")
    assert imported.num_parameters == NUM_PARAMETERS
    return pick_device(0).peak_memory_bytes()


@torch.no_grad()
def reference(folder: Path) -> Tensor:
    """Transformers' logits of the last positions, in fp32."""
    model = DeepseekVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokens, image = inputs()
    return model(input_ids=tokens[None], pixel_values=(image / 255 - 0.5) / 0.5).logits[0, -COMPARED:].clone()


def ours(checkpoint: Path) -> Tensor:
    """Of this tensor-parallel rank, which has the whole vocabulary's logits."""
    opened = open_model(checkpoint, ParallelConfig(tensor_size=2), "fp32", pick_device(0))
    tokens, image = inputs()
    row = Microbatch(
        cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
        max_seqlen=len(tokens),
        num_images=1,
        units=(),
        segment_units=(),
        tokens_1S=tokens[None],
        images_NCHW=image,
        labels_1S=None,
        loss_mask_1S=None,
    )
    (logits_S1V,) = run_forward(opened.chunks, [row], opened.groups)
    return logits_S1V[-COMPARED:, 0].clone()


def test_imported_at_tp2_it_computes_what_transformers_does(tmp_path: Path) -> None:
    run_ranks(1, write_release, tmp_path / "source", timeout_seconds=TIMEOUT)
    (peak_bytes,) = run_ranks(1, peak_of_import, tmp_path, timeout_seconds=TIMEOUT)
    print(f"peak memory of the import: {peak_bytes / 1e9:.2f} GB")
    assert peak_bytes <= 1.2 * 2 * NUM_PARAMETERS + 1e9
    (expected,) = run_ranks(1, reference, tmp_path / "source", timeout_seconds=TIMEOUT)
    for rank in run_ranks(2, ours, tmp_path / "checkpoint", timeout_seconds=TIMEOUT):
        error = (rank - expected).abs().max() / expected.abs().max()
        print(f"largest difference of a logit, relative to the largest logit: {error:.1e}")
        assert error <= 1e-4
