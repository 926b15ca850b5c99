"""The recipes by name."""

import os

from data_tools.builder import build
from data_tools.quickstart.recipe import quickstart
from data_tools.statistics import print_statistics
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError

RECIPES = {"quickstart": quickstart}


def build_and_print(config: DataConfig) -> None:
    """Build what is missing and print what there is. Raises UserError where no recipe has `data.name`."""
    if config.name not in RECIPES:
        raise UserError(f"data.name is {config.name!r}, which no recipe has; valid: {', '.join(RECIPES)}")
    build(RECIPES[config.name](), config, num_processes=len(os.sched_getaffinity(0)))
    print_statistics(config)
