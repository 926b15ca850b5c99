"""The files beside the weights that let transformers load a folder unchanged: model, generation, tokenizer, images.

Field names and class names are those that transformers 5.23 writes itself.
"""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_vl.checkpoint.convert import config_map
from megatron_vl.checkpoint.convert.config_map import in_their_names
from megatron_vl.checkpoint.convert.tokenizer_files import TOKENIZER_CONFIG_FILE
from megatron_vl.checkpoint.convert.weight_files import read_json_if_there
from megatron_vl.checkpoint.description import (
    TOKENIZER_FILE,
    TOKENIZER_FOLDER,
    Description,
    Tokens,
    carry_tokenizer,
)
from megatron_vl.config.errors import UserError
from megatron_vl.config.model import LanguageConfig, ModelConfig, SamConfig, SiglipConfig
from megatron_vl.config.model_check import tokens_per_image
from megatron_vl.data.images import MIN_SIDE
from megatron_vl.data.text import TextRule

GENERATION_CONFIG_FILE = "generation_config.json"
# What a carried tokenizer_config.json says of classes and chats; files of their own say it here.
NOT_CARRIED = ("auto_map", "chat_template", "processor_class")
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
HYBRID = "hybrid_mlp_gelu"
# The chat format of `data.text`, for transformers' apply_chat_template.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content | trim }}
{%- else -%}
{%- set pieces = namespace(text='') -%}
{%- for piece in content -%}
{%- set pieces.text = pieces.text + (image_token if piece['type'] == 'image' else piece['text']) -%}
{%- endfor -%}{{ pieces.text | trim }}
{%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ render(message['content']) + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}{{ 'User: ' + render(message['content']) + '\\n\\n' }}
{%- else -%}{{ 'Assistant: ' + render(message['content']) + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""


def check_exportable(model: ModelConfig) -> None:
    """Raise UserError, naming the field, where transformers has no such model."""
    vision, sam = model.vision, model.vision.sam
    wanted: list[tuple[str, Any, Any]] = [
        ("adaptor.kind", vision.adaptor.kind, HYBRID if sam else "mlp_gelu"),
        ("adaptor.depth", vision.adaptor.depth, 2),
    ]
    if vision.siglip is None:
        raise UserError("model.vision.siglip=null: transformers' DeepSeek-VL always has a SigLIP")
    if sam is not None:
        grid = vision.siglip.image_size // vision.siglip.patch_size
        wanted += [
            ("sam.downsample_widths", sam.downsample_widths, [2 * sam.neck_width, 4 * sam.neck_width]),
            ("sam.resized_grid", sam.resized_grid, 4 * grid),
            ("sam.hd_layer", sam.hd_layer, sam.global_layers[0] if sam.global_layers else None),
        ]
    for field, value, valid in wanted:
        if value != valid:
            raise UserError(
                f"model.vision.{field}={value}: transformers' DeepSeek-VL has {valid}; such a model cannot be exported"
            )


def model_config(description: Description, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    model = description.model
    siglip, sam = model.vision.siglip, model.vision.sam
    if siglip is None:
        raise ValueError("call check_exportable first")
    name = "DeepseekVLHybrid" if sam else "DeepseekVL"
    config: dict[str, Any] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "deepseek_vl_hybrid" if sam else "deepseek_vl",
        "dtype": str(dtype).removeprefix("torch."),
        "image_token_id": description.image_token_id,
        "tie_word_embeddings": False,
        "text_config": _language(model.language),
        "vision_config": _siglip(siglip),
    }
    return config | ({"high_res_vision_config": _sam(sam)} if sam else {})


def write_companions(checkpoint: Path, target: Path, description: Description) -> bool:
    """Write generation, tokenizer and processor files: what the checkpoint carries, with its own special tokens.

    Returns:
        Whether the checkpoint has a tokenizer; without one there is nothing to make the other files of.
    """
    source = checkpoint / TOKENIZER_FOLDER
    carried = carry_tokenizer(source, target)
    if TOKENIZER_FILE not in carried or description.tokens is None:
        if GENERATION_CONFIG_FILE not in carried:
            _write(target / GENERATION_CONFIG_FILE, {})
        return False
    tokens = description.tokens
    text = TextRule(
        source / TOKENIZER_FILE,
        bos_token=tokens.bos_token,
        eos_token=tokens.eos_token,
        image_token=tokens.image_token,
        chat_template=tokens.chat_template,
    )
    _write(target / GENERATION_CONFIG_FILE, _generation(target, text))
    _write(target / TOKENIZER_CONFIG_FILE, _tokenizer(target, description.model.language, tokens))
    _write(target / "processor_config.json", _processor(description.model))
    if not {"chat_template.jinja", "chat_template.json"} & set(carried):
        (target / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return True


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation(target: Path, text: TextRule) -> dict[str, Any]:
    """The carried settings. Ids are the tokenizer's: a source may have left those of a class's defaults."""
    values = {"do_sample": False} | read_json_if_there(target / GENERATION_CONFIG_FILE)
    ends = values.get("eos_token_id")
    several = isinstance(ends, list) and text.eos_id in ends
    return values | {
        "bos_token_id": text.bos_id,
        "eos_token_id": ends if several else text.eos_id,
        "pad_token_id": text.eos_id,
    }


def _tokenizer(target: Path, language: LanguageConfig, tokens: Tokens) -> dict[str, Any]:
    """The carried settings, with what transformers' processor needs and a text-only tokenizer has not."""
    carried = read_json_if_there(target / TOKENIZER_CONFIG_FILE)
    values = {"model_max_length": language.max_positions} | {
        name: value for name, value in carried.items() if name not in NOT_CARRIED
    }
    return values | {
        "backend": "tokenizers",
        "bos_token": tokens.bos_token,
        "eos_token": tokens.eos_token,
        "pad_token": carried.get("pad_token") or tokens.eos_token,
        "image_token": tokens.image_token,
        "tokenizer_class": "TokenizersBackend",
    }


def _language(language: LanguageConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        **in_their_names(config_map.LANGUAGE, language),
        "num_key_value_heads": language.num_heads,
        "head_dim": language.hidden_size // language.num_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def _siglip(siglip: SiglipConfig) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        **in_their_names(config_map.SIGLIP, siglip),
        "hidden_act": "gelu",  # the exact one; the class's default is an approximation
        "vision_use_head": False,
    }


def _sam(sam: SamConfig) -> dict[str, Any]:
    return {
        "model_type": "sam_vision_model",
        **in_their_names(config_map.SAM, sam),
        "mlp_dim": sam.ffn_hidden_size,
        "mlp_ratio": sam.ffn_hidden_size / sam.width,
        "hidden_act": "gelu",
        "use_rel_pos": True,
        "use_abs_pos": True,
        "qkv_bias": True,
    }


def _processor(model: ModelConfig) -> dict[str, Any]:
    """Sizes, means and padding as `data.images` has them. The small image is made of the large one, bilinear."""
    siglip, sam = model.vision.siglip, model.vision.sam
    if siglip is None:
        raise ValueError("call check_exportable first")
    name = "DeepseekVLHybrid" if sam else "DeepseekVL"
    images: dict[str, Any] = {
        "image_processor_type": f"{name}ImageProcessor",
        "do_resize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "min_size": MIN_SIDE,
        "resample": BILINEAR if sam else BICUBIC,
        "size": {"height": siglip.image_size, "width": siglip.image_size},
        "image_mean": siglip.mean,
        "image_std": siglip.std,
    }
    if sam is not None:
        images |= {
            "high_res_resample": BICUBIC,
            "high_res_size": {"height": sam.image_size, "width": sam.image_size},
            "high_res_image_mean": sam.mean,
            "high_res_image_std": sam.std,
        }
    return {
        "processor_class": f"{name}Processor",
        "image_processor": images,
        "num_image_tokens": tokens_per_image(model),
    }
