"""What images take in stage zero: kept for the backward pass, for a moment of encoding, and ahead of the pipeline.

Counted are storages, as autograd holds them for our modules. C width of a tower, F of its MLP, T its patches.
"""

from dataclasses import dataclass

from megatron_vl.config.model import ModelConfig, SamConfig, SiglipConfig
from megatron_vl.config.model_check import image_size, tokens_per_image, towers
from megatron_vl.planning.activations import FP32
from megatron_vl.planning.parameters import tower_widths, unit_parameters
from megatron_vl.planning.passes import PART, adaptor_units, encoder_units

SAM_PARTS = frozenset({"sam", "sam_downsample"})
ENCODER_PARTS = SAM_PARTS | {"siglip"}
# Of model.relative_attention: the most scores whose bias is made at once, unless one head has more.
BIAS_SCORES = 64**4


@dataclass(frozen=True, kw_only=True)
class VisionActivations:
    """Of the images of one microbatch and of one step of a replica, on one rank, in bytes."""

    model: ModelConfig
    trained: frozenset[str]  # of config.train.PARTS
    num_images: int  # of a microbatch
    num_step_images: int  # of all microbatches of a replica
    placement: str  # of config.parallel.VISION_PLACEMENTS
    tensor_size: int
    model_size: int  # ranks of a replica
    element_bytes: int
    fused: bool
    recompute: bool

    @property
    def kept(self) -> int:
        """By one microbatch, from stage zero's forward to its backward pass."""
        if self.placement == "spread":
            return self.num_images * self._adaptor  # features are held for the whole step
        inputs = self._features if self._adaptor else 0
        return self._num_encoded * (self._trained_towers + inputs + self._adaptor)

    @property
    def forward(self) -> int:
        """What encoding a microbatch takes at most beside what it keeps."""
        return self._encoding(self._num_encoded)

    @property
    def backward(self) -> int:
        """What a microbatch's backward pass takes at most beside what is kept."""
        return self._num_encoded * self._trained_backward

    @property
    def step_images(self) -> int:
        """With `spread`, this rank's share of a step's images, held to be encoded again where encoders train."""
        return self._share_pixels if self.placement == "spread" and self.trained & ENCODER_PARTS else 0

    @property
    def step_features(self) -> int:
        """With `spread`, all images' features on the first stage, every share padded to the longest, and their
        gradients where their encoder trains."""
        if self.placement != "spread":
            return 0
        width = sum(
            width * (2 if self.trained & (SAM_PARTS if name == "sam" else {name}) else 1)
            for name, width in tower_widths(self.model).items()
        )
        return self._step_share * self.model_size * tokens_per_image(self.model) * width * self.element_bytes

    @property
    def around_pipeline(self) -> int:
        """With `spread`, what encoding takes for a moment before the pipeline begins, or, where encoders train, when
        they encode again after it has ended."""
        if self.placement != "spread":
            return 0
        again = min(self._step_share, self.model.vision.max_images_per_forward)
        pixels = self._share_pixels - self.step_images
        return self._step_share * self._features + max(
            pixels + self._encoding(self._step_share), again * (self._trained_towers + self._trained_backward)
        )

    def copied_encoders(self) -> tuple[int, int]:
        """With `spread`, parameters and fp32 gradients of the encoders on ranks that do not hold stage zero."""
        if self.placement != "spread":
            return 0, 0
        each = unit_parameters(self.model)
        counts = [
            (PART[unit] in self.trained, number * each[unit])
            for unit, number in encoder_units(self.model).items()
        ]
        num_trained = sum(count for trains, count in counts if trains)
        return sum(count for _, count in counts) * self.element_bytes, num_trained * FP32

    @property
    def averaged_gradients(self) -> int:
        """At the end of a step tensor-parallel ranks average the gradients of vision in one fp32 copy."""
        each = unit_parameters(self.model)
        units = encoder_units(self.model) | adaptor_units(self.model)
        num_trained = sum(number * each[unit] for unit, number in units.items() if PART[unit] in self.trained)
        return num_trained * FP32 if self.tensor_size > 1 else 0

    @property
    def _num_encoded(self) -> int:
        """Images of a microbatch that one rank of the first stage encodes within the pipeline."""
        sharers = {"replicated": 1, "split": self.tensor_size}
        return -(-self.num_images // sharers[self.placement]) if self.placement in sharers else 0

    @property
    def _step_share(self) -> int:
        return -(-self.num_step_images // self.model_size)

    @property
    def _share_pixels(self) -> int:
        return self._step_share * 3 * image_size(self.model) ** 2

    @property
    def _features(self) -> int:
        """One image's, of all towers: the adaptor's input."""
        return tokens_per_image(self.model) * sum(tower_widths(self.model).values()) * self.element_bytes

    @property
    def _adaptor(self) -> int:
        """One image, where the adaptor or what is below it trains: before and after each GELU."""
        if not self.trained & (ENCODER_PARTS | {"adaptor"}):
            return 0
        gelus = 2 * (self.model.vision.adaptor.depth - 1)
        return gelus * tokens_per_image(self.model) * self.model.language.hidden_size * self.element_bytes

    @property
    def _trained_towers(self) -> int:
        """One image, in the towers that train."""
        siglip, sam = self.model.vision.siglip, self.model.vision.sam
        kept = 0
        if siglip is not None and "siglip" in self.trained:
            kept += self._input(siglip) + siglip.num_layers * self._block(siglip)
            kept += _num_patches(siglip) * siglip.width * self.element_bytes  # the final norm's input
        if sam is not None and "sam" in self.trained:
            kept += self._input(sam) + sam.num_layers * self._block(sam)
        if sam is not None and self.trained & SAM_PARTS:
            kept += self._downsampling(sam)
        return kept

    @property
    def _trained_backward(self) -> int:
        """One image: a block's gradients of the stream and of the MLP's inside, or all of a recomputed one."""
        trained = [tower for name, tower in towers(self.model.vision).items() if name in self.trained]
        gradients = [_num_patches(tower) * (tower.width + tower.ffn_hidden_size) for tower in trained]
        again = [self._whole_block(tower) if self.recompute else 0 for tower in trained]
        return max(gradients, default=0) * self.element_bytes + max(again, default=0)

    def _input(self, tower: SiglipConfig | SamConfig) -> int:
        """Pixels as the patch embedding takes them."""
        return 3 * tower.image_size**2 * self.element_bytes

    def _block(self, tower: SiglipConfig | SamConfig) -> int:
        if self.recompute:
            return _num_patches(tower) * tower.width * self.element_bytes
        return self._whole_block(tower)

    def _whole_block(self, tower: SiglipConfig | SamConfig) -> int:
        """Both norms' inputs, the second one's output, the MLP before and after GELU; attention's input, queries, keys
        and values, its outcome. SAM's attention keeps them once more, lengthened by relative positions."""
        num_patches = _num_patches(tower)
        values = num_patches * (3 * tower.width + 2 * tower.ffn_hidden_size)
        if isinstance(tower, SiglipConfig):
            attention, statistics = 5 * tower.width * num_patches, tower.num_heads
        else:
            grid = tower.image_size // tower.patch_size
            windows = -(-grid // tower.window_size)
            lengthened = tower.num_heads * (tower.width // tower.num_heads + 2 * tower.window_size)
            attention = (windows * tower.window_size) ** 2 * (7 * tower.width + 4 * lengthened)
            statistics = tower.num_heads
        return (values + attention) * self.element_bytes + FP32 * (4 + statistics) * num_patches

    def _downsampling(self, sam: SamConfig) -> int:
        """Necks (each norm's and convolution's input), the resized grid, and what further convolutions take."""
        num_necks = 1 if sam.hd_layer is None else 2
        necks = num_necks * _num_patches(sam) * (sam.width + 4 * sam.neck_width) * self.element_bytes
        resized = sam.resized_grid**2
        strided: int = sum(
            resized // 4 ** (index + 1) * width for index, width in enumerate(sam.downsample_widths[:-1])
        )
        return necks + (resized * sam.neck_width + strided) * self.element_bytes

    def _encoding(self, num_images: int) -> int:
        """Of the images that are encoded at once: pixels in fp32, and what the worst tower takes."""
        if not num_images:
            return 0
        at_once = min(num_images, self.model.vision.max_images_per_forward)
        pixels = at_once * 3 * image_size(self.model) ** 2 * FP32
        passes = [
            at_once * self._input(tower) + self._pass(tower, at_once) * self.element_bytes
            for tower in towers(self.model.vision).values()
        ]
        return pixels + max(passes)

    def _pass(self, tower: SiglipConfig | SamConfig, num_images: int) -> int:
        """Values inside a block that keeps nothing: the stream twice, a norm's output, the MLP before and after GELU;
        in SAM also the stream that the HD branch waits for, and windows; or, where that is more, its attention."""
        num_patches = num_images * _num_patches(tower)
        if isinstance(tower, SiglipConfig):
            return num_patches * (3 * tower.width + 2 * tower.ffn_hidden_size)
        held = num_patches * (2 if tower.hd_layer is not None else 1) * tower.width
        mlp = num_patches * (3 * tower.width + 2 * tower.ffn_hidden_size)
        return held + max(mlp, self._sam_attention(tower, num_images))

    def _sam_attention(self, sam: SamConfig, num_images: int) -> int:
        """Values of a global block's attention: queries, keys, values and two tables of relative positions. Folded, as
        on CUDA, all but the tables once more, threefold, and so the outcome; else queries, keys and values once more,
        the input, the outcome, and the bias of some heads."""
        grid = sam.image_size // sam.patch_size
        num_patches = num_images * _num_patches(sam)
        tables = 2 * grid * sam.num_heads
        if self.fused:
            return num_patches * (3 * sam.width + 4 * 3 * sam.width + tables)
        head_scores = _num_patches(sam) ** 2
        num_heads = min(num_images * sam.num_heads, max(1, BIAS_SCORES // head_scores))
        return num_patches * (8 * sam.width + tables) + num_heads * head_scores


def _num_patches(tower: SiglipConfig | SamConfig) -> int:
    return int((tower.image_size // tower.patch_size) ** 2)
