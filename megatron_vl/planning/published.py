"""Runs of Megatron-LM on A100 whose iteration times were published.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198): models and
parallel sizes of Table 3; iteration times and utilisation of Table 5, which has one replica of each; and the 530B model
on eight times as many devices, whose utilisation is in the abstract. A test holds seconds and utilisation together.
"""

from dataclasses import dataclass, replace

from megatron_vl.config.model import LanguageConfig, ModelConfig

SEQUENCE_LENGTH = 2048
VOCABULARY = 51200


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A model, its division, and the seconds of an iteration by recompute: `full`, or `selective` with sequence
    parallelism (the paper's "present work"), whose model FLOPs utilisation is `mfu`."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    pipeline_size: int
    virtual_size: int
    global_batch_size: int
    micro_batch_size: int
    seconds: dict[str, float]
    mfu: float
    tensor_size: int = 8
    data_size: int = 1

    @property
    def num_devices(self) -> int:
        return self.tensor_size * self.pipeline_size * self.data_size

    @property
    def num_microbatches(self) -> int:
        """Of each replica."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    @property
    def model(self) -> ModelConfig:
        language = LanguageConfig(
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            ffn_hidden_size=4 * self.hidden_size,
            vocab_size=VOCABULARY,
            max_positions=SEQUENCE_LENGTH,
        )
        return ModelConfig(name=self.name, language=language)


RUN_22B = PublishedRun(
    name="22B",
    hidden_size=6144,
    num_layers=48,
    num_heads=64,
    pipeline_size=1,
    virtual_size=1,
    global_batch_size=4,
    micro_batch_size=4,
    seconds={"full": 1.42, "selective": 1.10},
    mfu=0.415,
)
RUN_175B = PublishedRun(
    name="175B",
    hidden_size=12288,
    num_layers=96,
    num_heads=96,
    pipeline_size=8,
    virtual_size=3,
    global_batch_size=64,
    micro_batch_size=1,
    seconds={"full": 18.13, "selective": 13.75},
    mfu=0.514,
)
RUN_530B = PublishedRun(
    name="530B",
    hidden_size=20480,
    num_layers=105,
    num_heads=128,
    pipeline_size=35,
    virtual_size=3,
    global_batch_size=280,
    micro_batch_size=1,
    seconds={"full": 49.05, "selective": 37.83},
    mfu=0.560,
)
RUN_1T = PublishedRun(
    name="1T",
    hidden_size=25600,
    num_layers=128,
    num_heads=160,
    pipeline_size=64,
    virtual_size=1,
    global_batch_size=512,
    micro_batch_size=1,
    seconds={"full": 94.42, "selective": 71.49},
    mfu=0.563,
)
RUN_530B_WIDE = replace(
    RUN_530B, data_size=8, global_batch_size=8 * 280, seconds={"selective": 39.15}, mfu=0.542
)
RUNS = (RUN_22B, RUN_175B, RUN_530B, RUN_530B_WIDE, RUN_1T)
