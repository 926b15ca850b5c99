"""Folders that need not be built again: build.json in each says what made it.

A folder of an interrupted build is taken as it is, since folders appear there whole. One of the build in place is
taken where its shards are what its index says; its files become those of the new build without being copied.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.command import text_rule
from data_tools.recipe import Part, Recipe
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.text import TextRule

STAMP_NAME = "build.json"


def part_stamp(recipe: Recipe, part: Part) -> dict[str, Any]:
    """What a part's folders are made of; another stamp is other samples."""
    return {"recipe": recipe.name, "version": part.version or recipe.version}


def read_stamp(folder: Path) -> Any:
    """None where there is none, or no readable one."""
    try:
        return json.loads((folder / STAMP_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def write_stamp(folder: Path, stamp: Mapping[str, Any]) -> None:
    """Say in build.json what `folder` is made of."""
    (folder / STAMP_NAME).write_text(json.dumps(stamp, indent=1, ensure_ascii=False))


def is_reused(part: Part, stamp: Mapping[str, Any], aside: Path, root: Path, config: DataConfig) -> bool:
    """Whether the part's folders are below `aside` now: they were, or are taken from `root`."""
    if all(read_stamp(aside / folder) == stamp for folder in part.folders):
        return True
    if not all(read_stamp(root / name) == stamp and _is_whole(root / name, config) for name in part.folders):
        return False
    for folder in part.folders:
        shutil.rmtree(aside / folder, ignore_errors=True)
        shutil.copytree(root / folder, aside / folder, copy_function=_link)
    return True


def is_indexed(folder: Path, rule: TextRule) -> bool:
    """Whether the folder has its shards, and an index of them by this rule."""
    try:
        SourceIndex.open(folder, rule, name=folder.name)
    except UserError:
        return False
    return True


def put_folders(part: Part, stamp: Mapping[str, Any], staging: Path, aside: Path) -> None:
    """Move the part's folders from `staging`, each with its stamp."""
    for folder in part.folders:
        write_stamp(staging / folder, stamp)
        shutil.rmtree(aside / folder, ignore_errors=True)
        (aside / folder).parent.mkdir(exist_ok=True)
        (staging / folder).rename(aside / folder)
    shutil.rmtree(staging)


def _is_whole(folder: Path, config: DataConfig) -> bool:
    try:
        return is_indexed(folder, text_rule(config))
    except UserError:  # the tokenizer that the build trained is gone
        return False


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copy2(source, target)
