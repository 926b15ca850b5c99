"""What the commands of this folder share: the configuration that training reads, errors told in one line."""

import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.config.root import PretrainConfig, register_schemas
from megatron_vl.data.text import TextRule

CONFIG_FOLDER = Path(__file__).parent.parent / "hydra_conf"


def run_command(task: Callable[[DataConfig], None]) -> None:
    """As `run_configured`, with the `data` group alone."""
    run_configured(lambda config: task(config.data))


def run_configured(task: Callable[[PretrainConfig], None]) -> None:
    """Call `task` with `hydra_conf/pretrain.yaml` as the command line overrides it.

    A UserError is printed alone, and the exit status is 1; it is 130 after Ctrl-C.
    """
    register_schemas()

    @hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="pretrain")
    def compose(tree: DictConfig) -> None:
        config = OmegaConf.to_object(tree)
        assert isinstance(config, PretrainConfig)
        try:
            task(config)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; start the same command again", file=sys.stderr)
            sys.exit(130)

    compose()


def source_urls(config: DataConfig) -> dict[str, str]:
    """Where the shards lie that the configuration names, path or url: by source, and `heldout/<source>`."""
    urls = {name: source.path for name, source in config.sources.items()}
    heldout = {f"heldout/{name}": source.heldout for name, source in config.sources.items()}
    return urls | {name: url for name, url in heldout.items() if url is not None}


def source_folders(config: DataConfig) -> dict[str, Path]:
    """As `source_urls`, for those who write there."""
    return {name: Path(url) for name, url in source_urls(config).items()}


def text_rule(config: DataConfig) -> TextRule:
    """The configured tokenizer and chat template."""
    return TextRule(
        config.tokenizer,
        bos_token=config.bos_token,
        eos_token=config.eos_token,
        image_token=config.image_token,
        chat_template=config.chat_template,
    )
