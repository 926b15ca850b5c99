"""The shape of a model: language model, vision encoders, adaptor.

Numbers for the full-size models are in `hydra_conf/model/`; their source is DeepSeek-VL (arXiv 2403.05525,
section 3.1) and the configuration of its released weights.
"""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class LanguageConfig:
    """A LLaMA-style decoder: RMSNorm before each block, SwiGLU, RoPE, untied head, no biases."""

    hidden_size: int = 0
    num_layers: int = 0
    num_heads: int = 0
    ffn_hidden_size: int = 0
    vocab_size: int = 0
    max_positions: int = 0
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02


@dataclass(kw_only=True)
class SiglipConfig:
    """The low-resolution tower: a plain vision transformer without class token (SigLIP-L/16)."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_hidden_size: int = 4096
    norm_epsilon: float = 1e-6
    mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])


@dataclass(kw_only=True)
class SamConfig:
    """The high-resolution tower: ViTDet with windowed and global attention, a neck, and downsampling (SAM-B).

    `hd_layer` is the block whose output also goes through a neck of its own and is added after downsampling,
    scaled by a learned alpha (the released weights have it, the paper does not mention it); null leaves it out.
    """

    image_size: int = 1024
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_hidden_size: int = 3072
    window_size: int = 14
    global_layers: list[int] = field(default_factory=lambda: [2, 5, 8, 11])
    neck_width: int = 256
    resized_grid: int = 96
    downsample_widths: list[int] = field(default_factory=lambda: [512, 1024])
    hd_layer: int | None = 2
    norm_epsilon: float = 1e-6
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])


@dataclass(kw_only=True)
class AdaptorConfig:
    """From vision features to the decoder's width (paper, Table 10).

    `kind`: mlp_gelu for one tower; for two hybrid_mlp_gelu, shared_mlp_gelu or separate_mlp_gelu (joined along
    the embedding), pool_width_mlp_gelu or pool_height_mlp_gelu (joined along the sequence, each tower's tokens
    paired along that side). `depth` counts linear layers in a row.
    """

    kind: str = "mlp_gelu"
    depth: int = 2


@dataclass(kw_only=True)
class VisionConfig:
    """The towers present (null leaves one out; paper, Figure 10), and how many images one encoder forward may
    take, which bounds activation memory.
    """

    siglip: SiglipConfig | None = None
    sam: SamConfig | None = None
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    max_images_per_forward: int = 8


@dataclass(kw_only=True)
class ModelConfig:
    name: str = ""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
