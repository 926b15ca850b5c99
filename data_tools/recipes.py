"""The recipe of a data set: that of its raw material, or one by name."""

import os

from data_tools.builder import build
from data_tools.quickstart.recipe import quickstart
from data_tools.raw.debian import fetch_packages
from data_tools.raw.recipe import raw_recipe
from data_tools.recipe import Recipe
from data_tools.statistics import print_statistics
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError

RECIPES = {"quickstart": quickstart}


def build_and_print(config: DataConfig) -> None:
    """Build what is missing and print what there is. Raises UserError where there is no recipe."""
    build(_recipe(config), config, num_processes=len(os.sched_getaffinity(0)))
    print_statistics(config)


def _recipe(config: DataConfig) -> Recipe:
    if any(source.raw is not None for source in config.sources.values()):
        fetch_packages(config, print)
        return raw_recipe(config)
    if config.name not in RECIPES:
        raise UserError(
            f"data.name is {config.name!r}, which no recipe has; valid: {', '.join(RECIPES)}, or sources "
            "with raw material (data.sources.SOURCE.raw)"
        )
    return RECIPES[config.name]()
