"""What `python -m launch.preview` reads."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from megatron_vl.config.root import PretrainConfig


@dataclass(kw_only=True)
class PreviewConfig(PretrainConfig):
    """What a run reads, one stage of it, and a step to look at."""

    step: int = 1  # of the stage, from 1
    keys: int = 3  # of samples to name for each data-parallel rank


def register_preview_schema() -> None:
    """Put the schema where `hydra_conf/preview.yaml` names it in its defaults (`preview_schema`)."""
    ConfigStore.instance().store(name="preview_schema", node=PreviewConfig)
