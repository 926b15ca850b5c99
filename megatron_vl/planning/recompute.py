"""What a backward pass computes again, because its activations were not kept."""

from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig
from megatron_vl.planning.cost import CostModel
from megatron_vl.planning.setting import Setting
from megatron_vl.planning.workload import Load

ONE_IMAGE = Load(num_tokens=0, num_images=1, num_pairs=0)


@dataclass(frozen=True, kw_only=True)
class Again:
    """`share` of the forward pass over the unit `name`."""

    name: str
    share: float


def computed_again(name: str, model: ModelConfig, setting: Setting) -> Again | None:
    """What the backward pass over unit `name` computes again, where one runs.

    Full recompute repeats a decoder layer, selective its core attention. A vision block stops at its last product,
    whose output no gradient needs.
    """
    if name == "decoder_layer" and setting.recompute != "none":
        return Again(name=name if setting.recompute == "full" else "core_attention", share=1.0)
    if name in ("siglip_block", "sam_window_block", "sam_global_block") and setting.recompute_vision:
        return Again(name=name, share=1.0 - _last_product_share(name, model))
    return None


def _last_product_share(name: str, model: ModelConfig) -> float:
    """Of a vision block's forward FLOPs."""
    tower = model.vision.siglip if name == "siglip_block" else model.vision.sam
    if tower is None:
        raise ValueError(f"{name}: this model has no such tower")
    patches = (tower.image_size // tower.patch_size) ** 2
    last_product = 2 * patches * tower.width * tower.ffn_hidden_size
    return last_product / CostModel(model=model).unit(name, ONE_IMAGE).forward.flops
