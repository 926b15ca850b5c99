"""What a run trains, for how long, where it writes and what it reports."""

from dataclasses import dataclass, field
from typing import Any

from megatron_vl.config.faults import FaultsConfig

# What a stage can train: the towers, the high tower's own neck and downsampling, and the rest of the model.
PARTS = ("siglip", "sam", "sam_downsample", "adaptor", "embedding", "decoder", "head")
SCHEDULES = ("cosine", "multi_step", "constant")
PRECISIONS = ("fp32", "bf16")
OPTIMIZER_SHARDINGS = ("auto", "fully_reshardable", "dp_reshardable")
TRACKING_MODES = ("disabled", "offline", "online")


@dataclass(kw_only=True)
class ExpectedRowConfig:
    """What a row holds on average, for planning of time: nothing that trains reads it.

    `images` is of multimodal rows. null: as many tokens as fit (`tokens`), of one sample (`segment_tokens`).
    """

    images: float = 1.0
    tokens: float | None = None
    segment_tokens: float | None = None  # of each of the samples that share a row


@dataclass(kw_only=True)
class StageConfig:
    """One training stage (paper, Table 4).

    `train` lists the parts (PARTS) that learn. `sources` weighs the sources within their modality, by samples.
    Fractions are of the stage's steps. `parallel` overrides fields of the run's parallel settings.
    """

    train: list[str] = field(default_factory=list)
    steps: int = 0
    global_batch_size: int = 0  # packed rows where the stage packs, samples elsewhere
    micro_batch_size: int = 1
    sequence_length: int = 0  # tokens in a row
    packing: bool = False
    sources: dict[str, float] = field(default_factory=dict)
    text_ratio: float = 0.0  # share of text-only global batches
    text_warmup_fraction: float = 0.0  # over which that share falls from 1
    grouping: str = "step"  # a step is of one modality; phase: each step is mixed, first images, then text
    max_epochs: dict[str, int] = field(default_factory=dict)  # by source; without an entry it repeats
    expected: ExpectedRowConfig = field(default_factory=ExpectedRowConfig)

    learning_rate: float = 0.0
    vision_learning_rate_scale: float = 1.0
    schedule: str = "cosine"  # cosine, multi_step or constant
    warmup_fraction: float = 0.0
    decay_boundaries: list[float] = field(default_factory=lambda: [0.8, 0.9])  # multi_step
    decay_factors: list[float] = field(default_factory=lambda: [0.31622777, 0.1])  # multi_step
    min_learning_rate_ratio: float = 0.0  # cosine
    parallel: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class TrainConfig:
    """Values for every stage; `steps`, `global_batch_size` and `micro_batch_size` replace the stage's own."""

    steps: int | None = None
    stop_at: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = None
    precision: str = "bf16"  # fp32 or bf16
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    faults: FaultsConfig = field(default_factory=FaultsConfig)


@dataclass(kw_only=True)
class CheckpointConfig:
    """`optimizer_sharding`: fully_reshardable resumes at any parallel sizes, and gathers the optimizer's fp32 state
    over data-parallel ranks; dp_reshardable gathers nothing, and other tensor or pipeline sizes take launch.convert
    direction=reshard; auto takes the latter for large models (docs/checkpoints.md)."""

    every: int = 1000  # steps; the end of a stage is always saved
    asynchronous: bool = True  # training goes on while a checkpoint is written
    keep: int = 2  # the newest ones
    keep_every: int | None = None  # steps: checkpoints at their multiples stay forever
    optimizer_sharding: str = "auto"  # of OPTIMIZER_SHARDINGS
    initial: str | None = None  # a checkpoint whose model weights the first stage starts from
    random: bool = True  # where `initial` is null, weights may be drawn at random; false refuses that


@dataclass(kw_only=True)
class HeldoutConfig:
    """Held-out loss per source: at the start and end of each stage and every `every` steps (0: ends only)."""

    every: int = 0
    max_samples: int = 100  # per source


@dataclass(kw_only=True)
class RunConfig:
    """`num_processes`: local ranks that `python -m launch.pretrain` starts; null takes TP x PP."""

    dir: str = ""
    seed: int = 1234
    num_processes: int | None = None
    threads_per_process: int | None = None  # CPU threads of each rank; null shares the cores
    start_timeout_seconds: int = 1800  # that ranks wait for each other until a stage's first step is done
    timeout_seconds: int = 600  # of a collective from then on
    hang_seconds: float = 300.0  # without a sign of life, or of progress, from some rank; 0: nobody watches
    max_restarts: int = 3  # of a SLURM job in a row that bring no newer checkpoint


@dataclass(kw_only=True)
class ProfileConfig:
    """A window of steps under torch's profiler, into profile/ of the run directory (docs/tracking.md)."""

    steps: list[int] = field(default_factory=list)  # global: first and last; none: no profile
    ranks: list[int] = field(default_factory=lambda: [0])


@dataclass(kw_only=True)
class TrackingConfig:
    """Rows go to *.jsonl in the run directory always, and to the trackers that are on; both may be."""

    wandb: str = "disabled"  # of TRACKING_MODES
    project: str = "megatron-vl"  # of wandb
    tensorboard: bool = False
    progress: bool = True
    timeline_every: int = 100  # steps between recordings of the pipeline's timeline
    profile: ProfileConfig = field(default_factory=ProfileConfig)
