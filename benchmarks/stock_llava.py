"""megatron-core's LLaVAModel with its SigLIP tower at the sizes of our benchmarks, behind the face that our step calls.

megatron_vl must be imported before this.

Shapes: S tokens of the row, W of them from the image's mark on, B = 1, A heads, D head size.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal import llava_model
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import all_gather_into_tensor, reduce_scatter_tensor
from torch.nn import functional

from benchmarks.one_process import IMAGE_TOKEN
from benchmarks.sizes import IMAGE_TOKENS, LANGUAGE, NUM_TOKENS, SIGLIP
from megatron_vl.config.parallel import RecomputeConfig
from megatron_vl.model.transformer_config import Division, transformer_config
from megatron_vl.parallel.groups import Groups


class SdpaAttention(MegatronModule):
    """Core attention by scaled_dot_product_attention, [S, B, A, D] -> [S, B, A * D], causal or over everything."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(self, *qkv_SBAD: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in qkv_SBAD[:3])
        attended_BASD = functional.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return attended_BASD.permute(2, 0, 1, 3).flatten(2)


class LlavaChunk(MegatronModule):
    """LLaVAModel behind the face that our step calls: one image stands before the words of a row."""

    pre_process = post_process = True
    vp_stage = None
    share_embeddings_and_output_weights = False

    def __init__(self, llava: LLaVAModel, groups: Groups) -> None:
        super().__init__(config=llava.config)
        self.llava, self.pg_collection = llava, groups.collection
        self.model_type = llava.language_model.model_type

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """There is one pipeline stage."""

    def shared_embedding_or_output_weight(self) -> None:
        """The head is not tied to the embedding."""

    def forward(self, tokens_1S: Tensor, images_NCHW: Tensor, labels_1S: Tensor, *_: Any) -> Tensor:
        first_word = IMAGE_TOKENS - 1  # of its 576 places LLaVAModel wants the last one alone, as a mark
        inputs_1W = tokens_1S[:, first_word:].clone()
        inputs_1W[tokens_1S[:, first_word:] == IMAGE_TOKEN] = self.llava.image_token_index
        losses_1S, _ = self.llava(
            images=(images_NCHW / 255 - 0.5) / 0.5,
            input_ids=inputs_1W,
            position_ids=None,
            attention_mask=None,
            labels=labels_1S[:, first_word:],
            loss_mask=torch.ones_like(inputs_1W, dtype=torch.float32),
        )
        return losses_1S


def stock_collectives() -> AbstractContextManager[object]:
    """Steps within it reduce and gather as megatron-core does, even among one rank, where ours leave that out."""
    return patch.multiple(
        param_and_grad_buffer,
        dist_all_gather_func=all_gather_into_tensor,
        dist_reduce_scatter_func=reduce_scatter_tensor,
    )


def vision_config(language: TransformerConfig) -> TransformerConfig:
    config = replace(
        language,
        num_layers=SIGLIP.num_layers,
        hidden_size=SIGLIP.width,
        num_attention_heads=SIGLIP.num_heads,
        kv_channels=SIGLIP.width // SIGLIP.num_heads,
        num_query_groups=SIGLIP.num_heads,
        ffn_hidden_size=SIGLIP.ffn_hidden_size,
        normalization="LayerNorm",
        gated_linear_unit=False,
        add_bias_linear=True,
        activation_func=functional.gelu,
        softmax_scale=1.0 / math.sqrt(SIGLIP.width // SIGLIP.num_heads),
    )
    config.vision_model_type = "siglip"
    return config


def llava(groups: Groups, sdpa: bool) -> LLaVAModel:
    division = Division(topology=groups.topology, layout="E" + "t" * LANGUAGE.num_layers + "L")
    ours = transformer_config(LANGUAGE, division, RecomputeConfig(), "fp32")
    # Without TransformerEngine both fusions are ours.
    language = replace(ours, apply_rope_fusion=False, bias_activation_fusion=False)
    tower = vision_config(language)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    tower_layer = get_vit_layer_with_local_spec()
    tower_layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    if sdpa:
        for spec in (layer, tower_layer):
            spec.submodules.self_attention.submodules.core_attention = SdpaAttention
    # Its default norm, without TransformerEngine, does not take the arguments that it is given.
    norm = {"ln_pre_impl": WrappedTorchNorm, "ln_post_impl": WrappedTorchNorm}
    with patch.object(llava_model, "CLIPViTModel", partial(llava_model.CLIPViTModel, **norm)):
        return _build(language, layer, tower, tower_layer, groups)


def _build(
    language: TransformerConfig,
    layer: ModuleSpec,
    tower: TransformerConfig,
    tower_layer: ModuleSpec,
    groups: Groups,
) -> LLaVAModel:
    projection = replace(
        tower, hidden_size=LANGUAGE.hidden_size, ffn_hidden_size=LANGUAGE.hidden_size, num_layers=1
    )
    return LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=layer,
        language_vocab_size=LANGUAGE.vocab_size,
        language_max_sequence_length=NUM_TOKENS,
        vision_transformer_config=tower,
        vision_transformer_layer_spec=tower_layer,
        drop_vision_class_token=False,
        vision_projection_config=projection,
        vision_projection_layer_spec=tower_layer.submodules.mlp.submodules,
        language_position_embedding_type="rope",
        img_h=SIGLIP.image_size,
        img_w=SIGLIP.image_size,
        patch_dim=SIGLIP.patch_size,
        pg_collection=groups.collection,
    )
