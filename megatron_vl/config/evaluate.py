"""What a model is measured by, during training and by `python -m launch.evaluate`."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from megatron_vl.config.data import DataConfig
from megatron_vl.config.parallel import ParallelConfig
from megatron_vl.config.train import RunConfig, TrackingConfig

MODES = ("benchmarks", "chat", "check")
METHODS = ("choice", "generate")
# What an option's negative log-likelihood is divided by: nothing, its scored tokens (perplexity, as in the paper),
# or its UTF-8 bytes.
NORMALIZATIONS = ("none", "tokens", "bytes")


@dataclass(kw_only=True)
class BenchmarkConfig:
    """One benchmark's file. `format` is a name in `megatron_vl.evaluate.benchmarks`, or empty: the entry's own name.

    `method` (METHODS) and `max_new_tokens` are the benchmark's own where they are null. `normalization`, of
    NORMALIZATIONS, is for the choice method.
    """

    format: str = ""
    path: str = ""
    images: str | None = None  # the folder of its images, where they are files
    method: str | None = None  # choice or generate
    normalization: str = "tokens"
    max_new_tokens: int | None = None
    max_items: int | None = None  # the first so many; null: all


@dataclass(kw_only=True)
class EvaluationConfig:
    """`every`: steps between evaluations in training (0: at the end of each stage only).

    `benchmarks` holds the fields of a BenchmarkConfig by name; `evaluate.suite_check` makes it one. (Hydra cannot add
    to a dictionary of dataclasses on the command line.)
    """

    every: int = 0
    root: str = "data/evaluation"  # a folder that paths may begin with
    benchmarks: dict[str, Any] = field(default_factory=dict)
    sequence_length: int = 4096  # that every item must fit; at most model.language.max_positions
    max_cached_positions: int = 16384  # of the sequences that one replica answers at once
    execute_code: bool = False  # run the programs that the model writes (MBPP): only in a sandbox of your own


@dataclass(kw_only=True)
class ChatConfig:
    """A conversation in the terminal; with `prompt`, one answer."""

    prompt: str | None = None
    images: list[str] = field(default_factory=list)
    system: str = ""
    max_new_tokens: int = 256


@dataclass(kw_only=True)
class EvaluateConfig:
    """Everything that `python -m launch.evaluate` reads.

    The model's shape, its tokenizer and tokens are the checkpoint's; `data.tokenizer` and the tokens of `data` serve
    a checkpoint that came without.
    """

    checkpoint: str = ""
    mode: str = "benchmarks"  # of MODES
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: str = "bf16"
    data: DataConfig = field(default_factory=DataConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)


def register_evaluate_schema() -> None:
    """Put the schema where `hydra_conf/evaluate.yaml` names it in its defaults (`evaluate_schema`)."""
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
