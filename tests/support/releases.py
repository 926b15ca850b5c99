"""Small DeepSeek-VL models as transformers makes and saves them: what the importer reads, what parity is against.

Shapes: S tokens, V vocabulary, N images, C channels, H W pixels.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    LlamaConfig,
    SamVisionConfig,
    SiglipVisionConfig,
)

from tests.support.tiny_data import BOS, EOS, IMAGE, write_tokenizer
from tests.support.vision_reference import randomize

KINDS = ("deepseek_vl", "deepseek_vl_hybrid")
IMAGE_TOKEN_ID = 2  # of tiny_data's tokenizer
VOCAB_SIZE = 336
TOKENS_PER_IMAGE = 9
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LOW_SIZE, HIGH_SIZE = 48, 128


def image_size(kind: str) -> int:
    """Side of the squares that the model takes."""
    return HIGH_SIZE if kind == "deepseek_vl_hybrid" else LOW_SIZE


def transformers_model(kind: str) -> Any:
    """Random weights at which every part shows, the HD branch included."""
    text = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=96,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=512,
    )
    low = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=LOW_SIZE,
        patch_size=16,
        hidden_act="gelu",  # its default is the tanh approximation
        vision_use_head=False,
    )
    shared = {
        "text_config": text,
        "vision_config": low,
        "image_token_id": IMAGE_TOKEN_ID,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    if kind == "deepseek_vl":
        model: Any = DeepseekVLForConditionalGeneration(DeepseekVLConfig(**shared))
    else:
        high = SamVisionConfig(
            hidden_size=32,
            mlp_dim=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=HIGH_SIZE,
            patch_size=16,
            window_size=3,
            global_attn_indexes=[1],
            output_channels=16,
        )
        model = DeepseekVLHybridForConditionalGeneration(
            DeepseekVLHybridConfig(**shared, high_res_vision_config=high)
        )
    randomize(model)
    return model.eval()


def release(folder: Path, kind: str) -> Any:
    """Save such a model and a tokenizer as transformers does; returns the model. What it says is ASCII."""
    model = transformers_model(kind)
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(write_tokenizer(folder / "tokenizer.json")))
    silent = [number for number in range(VOCAB_SIZE) if not tokenizer.decode([number]).isascii()]
    with torch.no_grad():
        model.lm_head.weight[silent] *= 0.1
    model.save_pretrained(folder)
    tokens = {"bos_token": BOS, "eos_token": EOS, "image_token": IMAGE}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**tokens, "tokenizer_class": "TokenizersBackend"})
    )
    return model


def stored_name(name: str) -> str:
    """A parameter's name in checkpoints, where norms belong to the linear layer that follows."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def pixel_inputs(kind: str, images_NCHW: Tensor) -> dict[str, Tensor]:
    """What the model takes for uint8 squares: normalised, and for the hybrid model in both sizes (official code:
    the small image is the large one resized, with antialiasing, before either is normalised)."""
    unit_NCHW = images_NCHW / 255
    if kind == "deepseek_vl":
        return {"pixel_values": (unit_NCHW - 0.5) / 0.5}
    low_NCHW = F.interpolate(unit_NCHW, (LOW_SIZE, LOW_SIZE), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return {"pixel_values": (low_NCHW - 0.5) / 0.5, "high_res_pixel_values": (unit_NCHW - mean) / std}
