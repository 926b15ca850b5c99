"""How many parameters each unit of the model has on one rank."""

from itertools import pairwise

from megatron_vl.config.model import ModelConfig, SamConfig, SiglipConfig
from megatron_vl.config.model_check import POOLING_ADAPTORS, siglip_tokens, towers
from megatron_vl.planning.passes import JOINED_ADAPTORS

COLOURS = 3


def unit_parameters(model: ModelConfig, tensor_size: int = 1) -> dict[str, int]:
    """By name of the unit (`planning.passes.chunk_units`), one of each. Vision and norms are whole on every
    tensor-parallel rank; the rest is divided."""
    return _language(model, tensor_size) | _siglip(model) | _sam(model) | _adaptor(model)


def _language(model: ModelConfig, tensor_size: int) -> dict[str, int]:
    language = model.language
    hidden, vocabulary = language.hidden_size, language.vocab_size * language.hidden_size // tensor_size
    products = 4 * hidden**2 + 3 * hidden * language.ffn_hidden_size
    return {
        "embedding": vocabulary,
        "decoder_layer": products // tensor_size + 2 * hidden,
        "final_norm": hidden,
        "head": vocabulary,
    }


def _siglip(model: ModelConfig) -> dict[str, int]:
    tower = model.vision.siglip
    if tower is None:
        return {}
    positions_and_norm = (siglip_tokens(tower) + 2) * tower.width
    return {"siglip_patch": _patch(tower) + positions_and_norm, "siglip_block": _block(tower)}


def _sam(model: ModelConfig) -> dict[str, int]:
    tower = model.vision.sam
    if tower is None:
        return {}
    grid, neck = tower.image_size // tower.patch_size, tower.neck_width
    head_size = tower.width // tower.num_heads
    num_necks = 1 if tower.hd_layer is None else 2
    alpha = num_necks - 1
    return {
        "sam_patch": _patch(tower) + grid**2 * tower.width,
        "sam_window_block": _block(tower) + 2 * (2 * tower.window_size - 1) * head_size,
        "sam_global_block": _block(tower) + 2 * (2 * grid - 1) * head_size,
        "sam_neck_input": num_necks * (tower.width + 2) * neck,
        "sam_neck_output": num_necks * (9 * neck + 2) * neck + alpha,
        "sam_downsample": sum(9 * a * b for a, b in pairwise([neck, *tower.downsample_widths])),
    }


def _adaptor(model: ModelConfig) -> dict[str, int]:
    adaptor, hidden = model.vision.adaptor, model.language.hidden_size
    widths = tower_widths(model)
    output = (adaptor.depth - 1) * (hidden + 1) * hidden
    if adaptor.kind in JOINED_ADAPTORS:
        return {"adaptor_joined": (sum(widths.values()) + 1) * hidden, "adaptor_output": output}
    pools = adaptor.kind in POOLING_ADAPTORS
    tokens, outputs = (2, hidden) if pools else (1, hidden // 2)
    if adaptor.kind == "separate_mlp_gelu":
        output = 2 * (adaptor.depth - 1) * (hidden // 2 + 1) * (hidden // 2)
    inputs = {f"adaptor_{name}": (tokens * width + 1) * outputs for name, width in widths.items()}
    return inputs | {"adaptor_output": output}


def tower_widths(model: ModelConfig) -> dict[str, int]:
    """The width of each tower's features, high resolution first."""
    return {
        name: [tower.neck_width, *tower.downsample_widths][-1]
        if isinstance(tower, SamConfig)
        else tower.width
        for name, tower in towers(model.vision).items()
    }


def _patch(tower: SiglipConfig | SamConfig) -> int:
    return (COLOURS * tower.patch_size**2 + 1) * tower.width


def _block(tower: SiglipConfig | SamConfig) -> int:
    """Two norms, and the four products with their biases."""
    width, ffn = tower.width, tower.ffn_hidden_size
    return 4 * width + 4 * width * (width + 1) + (width + 1) * ffn + (ffn + 1) * width
