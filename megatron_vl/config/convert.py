"""What `python -m launch.convert` reads."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from megatron_vl.config.parallel import ParallelConfig

DIRECTIONS = ("import", "export", "reshard")


@dataclass(kw_only=True)
class PartsConfig:
    """Sources of their own for a model's parts: folders, or for the towers single files."""

    language: str | None = None  # a text-only model in the LLaMA layout
    siglip: str | None = None
    sam: str | None = None


@dataclass(kw_only=True)
class ConvertConfig:
    """`import` takes `source` or `parts`; `export` and `reshard` take `checkpoint`. All write `output`.

    `adaptor` and `seed` are for `parts`, whose adaptor is fresh; `parallel` is what `reshard` writes for.
    """

    direction: str = ""  # import, export or reshard
    source: str | None = None
    parts: PartsConfig = field(default_factory=PartsConfig)
    checkpoint: str | None = None
    output: str = ""
    vocab_size: int | None = None  # pads the vocabulary to so many entries
    adaptor: str | None = None  # a kind of model.vision.adaptor; null takes the paper's
    seed: int = 1234
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def register_convert_schema() -> None:
    """Put the schema where `hydra_conf/convert.yaml` names it in its defaults (`convert_schema`)."""
    ConfigStore.instance().store(name="convert_schema", node=ConvertConfig)
