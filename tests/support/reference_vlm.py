"""The whole model of transformers (DeepSeek-VL, hybrid) as the independent reference of ours, with the same weights.

Shapes: T tokens, V vocabulary, N images, C channels, H W pixels.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekVLHybridForConditionalGeneration, LlamaConfig

from megatron_vl.config.model import (
    AdaptorConfig,
    LanguageConfig,
    ModelConfig,
    SamConfig,
    SiglipConfig,
    VisionConfig,
)
from megatron_vl.model.encoders import build_encoders
from tests.support.vision_reference import in_our_names, randomize, reference_config

NUM_IMAGE_TOKENS = 9
IMAGE_SIZE = 80
# Transformers' name -> ours, for what is not joined of several.
LANGUAGE_NAMES = {
    "embed_tokens.weight": "stage_zero.embedding.weight",
    "norm.weight": "language.block.final_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}


def small_model(vocab_size: int) -> ModelConfig:
    """The hybrid model at widths that run in milliseconds; an image becomes 3 x 3 tokens."""
    siglip = SiglipConfig(
        image_size=24, patch_size=8, width=16, num_layers=2, num_heads=2, ffn_hidden_size=24
    )
    sam = SamConfig(
        image_size=IMAGE_SIZE,
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
    language = LanguageConfig(
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        ffn_hidden_size=96,
        vocab_size=vocab_size,
        max_positions=512,
    )
    adaptor = AdaptorConfig(kind="hybrid_mlp_gelu")
    return ModelConfig(
        name="small", language=language, vision=VisionConfig(siglip=siglip, sam=sam, adaptor=adaptor)
    )


class Reference:
    """Transformers' model with random weights that make every part visible, fed token ids and our pixels."""

    def __init__(self, model: ModelConfig, image_id: int, eos_id: int, eos_scale: float) -> None:
        """`eos_scale` multiplies the head's row of the end of sentence, so that some answers end early."""
        language, vision = model.language, model.vision
        assert vision.siglip is not None and vision.sam is not None
        text = LlamaConfig(
            hidden_size=language.hidden_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_heads,
            num_key_value_heads=language.num_heads,
            intermediate_size=language.ffn_hidden_size,
            vocab_size=language.vocab_size,
            max_position_embeddings=language.max_positions,
            rms_norm_eps=language.norm_epsilon,
        )
        config = reference_config(vision.siglip, vision.sam, text)
        config.image_token_id = image_id
        self.model: Any = DeepseekVLHybridForConditionalGeneration(config).eval()
        randomize(self.model)
        with torch.no_grad():
            self.model.lm_head.weight[eos_id] *= eos_scale
        self.eos_id = eos_id
        self._high, self._low = build_encoders(vision).values()

    def weights(self) -> dict[str, Tensor]:
        """In our names, whole."""
        return in_whole_names(self.model.state_dict(), self.model.config.text_config.num_attention_heads)

    @torch.no_grad()
    def logits(self, tokens: list[int], images_NCHW: Tensor) -> Tensor:
        """[T, V]."""
        out: Tensor = self.model(**self._inputs(tokens, images_NCHW)).logits[0]
        return out

    @torch.no_grad()
    def answer(self, tokens: list[int], images_NCHW: Tensor, max_new_tokens: int) -> list[int]:
        """Greedy, without the end of sentence."""
        inputs = self._inputs(tokens, images_NCHW)
        out = self.model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_id,
            pad_token_id=self.eos_id,
        )
        return [token for token in out[0, len(tokens) :].tolist() if token != self.eos_id]

    def _inputs(self, tokens: list[int], images_NCHW: Tensor) -> dict[str, Tensor]:
        inputs = {"input_ids": torch.tensor([tokens])}
        if len(images_NCHW):
            unit_NCHW = images_NCHW / 255
            inputs["pixel_values"] = self._low.normalize(unit_NCHW)
            inputs["high_res_pixel_values"] = self._high.normalize(unit_NCHW)
        return inputs


def in_whole_names(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Transformers' weights in our names: q, k, v interleaved by head, gate above up."""
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    ours = {"language.head.weight": inner.pop("lm_head.weight")}
    ours |= {f"stage_zero.{name}": tensor for name, tensor in in_our_names(inner).items()}
    language = {
        name.removeprefix("language_model."): t
        for name, t in inner.items()
        if name.startswith("language_model.")
    }
    for name, tensor in language.items():
        layer, rest = _split_layer(name)
        prefix = "" if layer is None else f"language.block.layers.{layer}."
        if rest.endswith("q_proj.weight"):
            by_head = [
                language[name.replace("q_proj", f"{part}_proj")].unflatten(0, (num_heads, -1))
                for part in "qkv"
            ]
            ours[f"{prefix}self_attention.linear_qkv.weight"] = torch.cat(by_head, 1).flatten(0, 1)
        elif rest.endswith("gate_proj.weight"):
            up = language[name.replace("gate_proj", "up_proj")]
            ours[f"{prefix}mlp.linear_fc1.weight"] = torch.cat([tensor, up])
        elif not re.search(r"(k|v|up)_proj\.weight$", rest):
            ours[prefix + LANGUAGE_NAMES[rest]] = tensor
    return ours


def _split_layer(name: str) -> tuple[str | None, str]:
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    return (None, name) if match is None else (match[1], match[2])
