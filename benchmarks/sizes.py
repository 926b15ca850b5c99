"""The model that benchmarks of training steps have in common: real proportions at a size for one core."""

from megatron_vl.config.model import AdaptorConfig, LanguageConfig, ModelConfig, SiglipConfig, VisionConfig

NUM_TOKENS = 1024
# The head takes 13 % of the decoder's FLOPs, about as in the released 7B; 1024 tokens, 576 of them an image's.
LANGUAGE = LanguageConfig(
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    ffn_hidden_size=1408,
    vocab_size=8192,
    max_positions=NUM_TOKENS,
)
SIGLIP = SiglipConfig(width=256, num_layers=6, num_heads=4, ffn_hidden_size=1024)
IMAGE_TOKENS = (SIGLIP.image_size // SIGLIP.patch_size) ** 2
TRAINED = ("adaptor", "embedding", "decoder", "head")  # as in the paper's joint stage: the tower is frozen


def vision_model() -> ModelConfig:
    """With SigLIP alone, as transformers' and megatron-core's models with one tower have it."""
    vision = VisionConfig(siglip=SIGLIP, adaptor=AdaptorConfig(kind="mlp_gelu"))
    return ModelConfig(name="one_tower", language=LANGUAGE, vision=vision)
