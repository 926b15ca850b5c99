"""What one microbatch's images keep for the backward pass in stage zero, and what encoding them takes for a moment.

Counted are storages, as autograd holds them for our modules.
"""

from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig, SamConfig, SiglipConfig
from megatron_vl.config.model_check import tokens_per_image, towers
from megatron_vl.planning.activations import FP32
from megatron_vl.planning.parameters import tower_widths


@dataclass(frozen=True, kw_only=True)
class VisionActivations:
    """Of `num_images` images on one rank, in bytes."""

    model: ModelConfig
    trained: frozenset[str]
    num_images: int
    element_bytes: int
    recompute: bool

    @property
    def kept(self) -> int:
        """By trained towers, and by the adaptor where it or a tower trains."""
        kept = (
            self.num_images * self._adaptor
            if self.trained & {"siglip", "sam", "sam_downsample", "adaptor"}
            else 0
        )
        siglip, sam = self.model.vision.siglip, self.model.vision.sam
        if siglip is not None and "siglip" in self.trained:
            tokens = (siglip.image_size // siglip.patch_size) ** 2
            kept += self.num_images * siglip.num_layers * self._block(siglip, tokens)
        if sam is not None and "sam" in self.trained:
            tokens = (sam.image_size // sam.patch_size) ** 2
            kept += self.num_images * sam.num_layers * self._block(sam, tokens)
        return kept

    @property
    def forward(self) -> int:
        """The most that encoding takes beside what it keeps."""
        at_once = min(self.num_images, self.model.vision.max_images_per_forward)
        return at_once * max(self._encoding(tower) for tower in towers(self.model.vision).values())

    @property
    def backward(self) -> int:
        """The most that the backward pass takes beside what is kept."""
        return 0

    @property
    def _adaptor(self) -> int:
        """The towers' features, the joined ones, and what follows each of the adaptor's GELUs."""
        width = sum(tower_widths(self.model).values())
        depth = self.model.vision.adaptor.depth
        values = width + 2 * (depth - 1) * self.model.language.hidden_size
        return tokens_per_image(self.model) * values * self.element_bytes

    def _block(self, tower: SiglipConfig | SamConfig, num_tokens: int) -> int:
        """Both norms' inputs and outputs, queries, keys and values, their outcome; the MLP before and after GELU."""
        if self.recompute:
            return num_tokens * tower.width * self.element_bytes
        values = 8 * tower.width + 2 * tower.ffn_hidden_size
        statistics = FP32 * (4 + tower.num_heads)
        return num_tokens * (values * self.element_bytes + statistics)

    def _encoding(self, tower: SiglipConfig | SamConfig) -> int:
        """One image's pixels in fp32 and as the tower takes them, the stream, and the MLP's two widths."""
        num_tokens = (tower.image_size // tower.patch_size) ** 2
        pixels = 3 * tower.image_size**2 * (FP32 + self.element_bytes)
        return pixels + num_tokens * (2 * tower.width + 2 * tower.ffn_hidden_size) * self.element_bytes
