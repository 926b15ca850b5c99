"""What rows cost the slowest pipeline stage, in FLOPs of one rank: enough to deal rows evenly.

A matrix product of m x k and k x n counts 2mkn. Forward and backward are three forwards where weights train, two
where gradients only pass through, one where nothing below trains (frozen vision towers).
"""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_vl.config.model import LanguageConfig, ModelConfig, SamConfig, SiglipConfig
from megatron_vl.planning.layout import parse_layout
from megatron_vl.planning.topology import Topology

TRAINED, PASSED, FROZEN = 3, 2, 1


@dataclass(frozen=True, kw_only=True)
class RowFlops:
    """FLOPs of one rank, forward and backward, per token, image, and pair of tokens that see each other."""

    per_token: int
    per_image: int
    per_pair: int

    def of(self, num_tokens: float, num_images: float, num_pairs: float) -> float:
        return num_tokens * self.per_token + num_images * self.per_image + num_pairs * self.per_pair


@dataclass(frozen=True, kw_only=True)
class MeanRow:
    """What a row holds on average, for telling which stage is the slowest."""

    num_tokens: float
    num_images: float
    num_pairs: float


def slowest_stage(
    model: ModelConfig, layout: str, topology: Topology, trained: Collection[str], row: MeanRow
) -> RowFlops:
    """The costs of the pipeline rank with most to do for `row`; the first of equals.

    `layout` as `resolve_layout` gives it; `trained` are parts of config.train.PARTS.
    """
    chunks = parse_layout(layout)
    stages = [
        _stage_flops(model, "".join(chunks[rank :: topology.pipeline_size]), topology.tensor_size, trained)
        for rank in range(topology.pipeline_size)
    ]
    return max(stages, key=lambda stage: stage.of(row.num_tokens, row.num_images, row.num_pairs))


def _stage_flops(model: ModelConfig, layers: str, tensor_size: int, trained: Collection[str]) -> RowFlops:
    """`layers`: the E, t and L of one pipeline rank. Vision is whole on every tensor-parallel rank."""
    language = model.language
    decoder = TRAINED if "decoder" in trained else PASSED
    per_token = layers.count("t") * decoder * decoder_token_flops(language)
    per_token += layers.count("L") * (TRAINED if "head" in trained else PASSED) * head_token_flops(language)
    return RowFlops(
        per_token=per_token // tensor_size,
        per_image=_vision_flops(model, trained) if "E" in layers else 0,
        per_pair=layers.count("t") * decoder * decoder_pair_flops(language) // tensor_size,
    )


def decoder_token_flops(language: LanguageConfig) -> int:
    """One layer's forward per token: four projections of attention, three of SwiGLU."""
    hidden = language.hidden_size
    return 2 * (4 * hidden * hidden + 3 * hidden * language.ffn_hidden_size)


def decoder_pair_flops(language: LanguageConfig) -> int:
    """One layer's forward per pair: the score and its share of the sum of values."""
    return 4 * language.hidden_size


def head_token_flops(language: LanguageConfig) -> int:
    return 2 * language.hidden_size * language.vocab_size


def siglip_flops(tower: SiglipConfig) -> int:
    """Forward per image; every patch sees every other."""
    num_patches = (tower.image_size // tower.patch_size) ** 2
    layer = _block_flops(num_patches, tower.width, tower.ffn_hidden_size, num_patches)
    return tower.num_layers * layer


def sam_flops(tower: SamConfig) -> int:
    """Forward per image: windowed and global blocks, and the neck's two convolutions."""
    num_patches = (tower.image_size // tower.patch_size) ** 2
    num_global = len(tower.global_layers)
    windowed = _block_flops(num_patches, tower.width, tower.ffn_hidden_size, tower.window_size**2)
    whole = _block_flops(num_patches, tower.width, tower.ffn_hidden_size, num_patches)
    neck = 2 * num_patches * (tower.width * tower.neck_width + 9 * tower.neck_width**2)
    return (tower.num_layers - num_global) * windowed + num_global * whole + neck


def _block_flops(num_patches: int, width: int, ffn: int, num_seen: int) -> int:
    return num_patches * (2 * (4 * width * width + 2 * width * ffn) + 4 * width * num_seen)


def _vision_flops(model: ModelConfig, trained: Collection[str]) -> int:
    vision = model.vision
    siglip = 0 if vision.siglip is None else siglip_flops(vision.siglip)
    sam = 0 if vision.sam is None else sam_flops(vision.sam)
    return siglip * (TRAINED if "siglip" in trained else FROZEN) + sam * (
        TRAINED if "sam" in trained else FROZEN
    )
