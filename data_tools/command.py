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
    """Call `task` with the `data` group of `hydra_conf/pretrain.yaml`, as the command line overrides it.

    A UserError is printed alone, and the exit status is 1; it is 130 after Ctrl-C.
    """
    register_schemas()

    @hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name="pretrain")
    def compose(tree: DictConfig) -> None:
        config = OmegaConf.to_object(tree)
        assert isinstance(config, PretrainConfig)
        try:
            task(config.data)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(130)

    compose()


def source_folders(config: DataConfig) -> dict[str, Path]:
    """The folders of shards that the configuration names: by source, and `heldout/<source>`."""
    folders = {name: Path(source.path) for name, source in config.sources.items()}
    heldout = {f"heldout/{name}": source.heldout for name, source in config.sources.items()}
    return folders | {name: Path(folder) for name, folder in heldout.items() if folder is not None}


def text_rule(config: DataConfig) -> TextRule:
    """The configured tokenizer and chat template."""
    return TextRule(
        config.tokenizer,
        bos_token=config.bos_token,
        eos_token=config.eos_token,
        image_token=config.image_token,
        chat_template=config.chat_template,
    )
