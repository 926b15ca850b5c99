"""Runs a recipe: renders its parts in parallel, trains a tokenizer, indexes, and puts all in place at once.

root.unfinished/writing    the part being written; an interrupted build goes on in it
root.unfinished/<folder>   a part's folders appear here when all their shards are written
root                       the complete build, renamed from root.unfinished; build.json says what made it
"""

import fcntl
import json
import shutil
import tarfile
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_tools.command import source_folders, text_rule
from data_tools.part_writer import Crew, Report, write_part
from data_tools.recipe import Part, Recipe
from data_tools.reuse import (
    STAMP_NAME,
    is_indexed,
    is_reused,
    part_stamp,
    put_folders,
    read_stamp,
    write_stamp,
)
from data_tools.workers import worker_pool
from megatron_vl.config.data import DataConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import SourceIndex
from megatron_vl.data.indexing import build_index
from megatron_vl.data.sample import IMAGE_MARK

TOKENIZER_NAME = "tokenizer.json"
WRITING_NAME = "writing"
TRAINING_CHARACTERS = 100_000_000  # for a tokenizer; more takes long and changes little
HELDOUT = "heldout/"  # folders of this prefix are not trained on


def build(recipe: Recipe, config: DataConfig, *, num_processes: int, report: Report = print) -> bool:
    """Fill `config.root` by `recipe`, the same bytes for any `num_processes`; False where it was complete.

    A tokenizer.json in `config.root` is trained; one elsewhere is used. Raises UserError: no build made
    the folder, the configuration names sources that the recipe lacks, or the tokenizer is unusable.
    """
    root = Path(config.root)
    with _only_build(root, report):
        stamp = _stamp(recipe, config)
        if _is_complete(root, stamp, config, report):
            return False
        aside = _aside(root)
        _begin(aside, stamp, report)
        with _progress() as progress:
            parts = _decide(recipe, config, progress)
            with worker_pool(num_processes) as pool:
                crew = Crew(pool=pool, num_processes=num_processes, progress=progress, report=report)
                for part in parts:
                    _write(part, part_stamp(recipe, part), config, crew)
            _remove_others(aside, parts)
            if _trains_tokenizer(config):
                config = _train_tokenizer(recipe, aside, config, progress)
            _index(aside, config, progress)
        _put_in_place(aside, root)
        return True


def _trains_tokenizer(config: DataConfig) -> bool:
    return Path(config.tokenizer) == Path(config.root) / TOKENIZER_NAME


def _stamp(recipe: Recipe, config: DataConfig) -> dict[str, Any]:
    """What a build is made of; another stamp is another build."""
    stamp: dict[str, Any] = {
        "recipe": recipe.name,
        "version": recipe.version,
        "special_tokens": _special_tokens(config),
        "chat_template": config.chat_template,
    }
    if not _trains_tokenizer(config):
        stamp["tokenizer"] = text_rule(config).tokenizer_fingerprint
    return stamp


def _special_tokens(config: DataConfig) -> list[str]:
    return [config.bos_token, config.eos_token, config.image_token]


def _is_complete(root: Path, stamp: dict[str, Any], config: DataConfig, report: Report) -> bool:
    if not root.exists() or not any(root.iterdir()):
        return False
    found = read_stamp(root)
    if found is None:
        raise UserError(
            f"data.root is {root}, which no build made (no {STAMP_NAME}): move it, or build elsewhere"
        )
    if found != stamp:
        report(f"{root} is of another version of the recipe or tokenizer; building anew what differs")
        return False
    try:
        rule = text_rule(config)
        for name, folder in _expected_folders(config).items():
            SourceIndex.open(folder, rule, name=name)
    except UserError as error:
        report(f"{root} is damaged; building anew what is missing ({error})")
        return False
    report(f"{root} is complete; it is used as it is")
    return True


def _expected_folders(config: DataConfig) -> dict[str, Path]:
    """The configured folders within the data's root; other folders are none of the build's business."""
    return {name: path for name, path in source_folders(config).items() if path.is_relative_to(config.root)}


def _aside(root: Path) -> Path:
    return root.with_name(f"{root.name}.unfinished")


def _begin(aside: Path, stamp: dict[str, Any], report: Report) -> None:
    """Make the folder. What an interrupted build left there is kept: each of its folders has a stamp of its own."""
    if aside.exists():
        report(f"going on with the interrupted build in {aside}")
    aside.mkdir(parents=True, exist_ok=True)
    write_stamp(aside, stamp)


def _write(part: Part, stamp: dict[str, Any], config: DataConfig, crew: Crew) -> None:
    """The part's folders, whole, below the folder that becomes the data's root."""
    root = Path(config.root)
    aside = _aside(root)
    if is_reused(part, stamp, aside, root, config):
        num_drafts = len(part.drafts)
        crew.progress.add_task(f"{', '.join(part.folders)} (reused)", total=num_drafts, completed=num_drafts)
        return
    staging = aside / WRITING_NAME / part.folders[0].replace("/", "-")
    write_part(part, staging, stamp, crew)
    put_folders(part, stamp, staging, aside)


def _remove_others(aside: Path, parts: list[Part]) -> None:
    """What builds of other parts left."""
    shutil.rmtree(aside / WRITING_NAME, ignore_errors=True)
    built = {folder for part in parts for folder in part.folders}
    for folder in set(_folders(aside)) - built:
        shutil.rmtree(aside / folder)


def _decide(recipe: Recipe, config: DataConfig, progress: Progress) -> list[Part]:
    """The recipe's parts. Raises UserError where a configured source is none of them."""
    task = progress.add_task("reading the raw material", total=1)
    parts = recipe.parts()
    built = [folder for part in parts for folder in part.folders]
    for name, path in _expected_folders(config).items():
        if path.relative_to(config.root).as_posix() not in built:
            raise UserError(
                f"data.sources has {path} for {name}, which the recipe {recipe.name} does not build; "
                f"below {config.root} it builds {', '.join(built)}"
            )
    progress.advance(task)
    return parts


def _folders(aside: Path) -> list[str]:
    """The finished folders, in the order of their names."""
    return sorted({shard.parent.relative_to(aside).as_posix() for shard in aside.rglob("*.tar")})


def _train_tokenizer(recipe: Recipe, aside: Path, config: DataConfig, progress: Progress) -> DataConfig:
    """Train on what is not held out; the configuration with the tokenizer where it lies for now."""
    task = progress.add_task("training the tokenizer", total=1)
    folders = [aside / folder for folder in _folders(aside) if not folder.startswith(HELDOUT)]
    path = aside / TOKENIZER_NAME
    recipe.train_tokenizer(_texts_in_turn(folders), path, _special_tokens(config))
    progress.advance(task)
    return replace(config, tokenizer=str(path))


def _texts_in_turn(folders: list[Path]) -> Iterator[str]:
    """One text of each folder in turn, until they are TRAINING_CHARACTERS long together."""
    readers, num_characters = deque(map(_texts, folders)), 0
    while readers and num_characters < TRAINING_CHARACTERS:
        text = next(readers[0], None)
        if text is None:
            readers.popleft()
        else:
            num_characters += len(text)
            readers.rotate(-1)
            yield text


def _texts(folder: Path) -> Iterator[str]:
    """The texts of a folder's samples without image marks, message by message."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".json") else None
                if file is not None:
                    fields = json.load(file)
                    contents = [message["content"] for message in fields.get("messages", [])]
                    yield from (text.replace(IMAGE_MARK, "") for text in contents or [fields["text"]])


def _index(aside: Path, config: DataConfig, progress: Progress) -> None:
    """Index the folders that have no index by this tokenizer."""
    rule = text_rule(config)
    folders = _folders(aside)
    task = progress.add_task("indexing", total=len(folders))
    for folder in folders:
        if not is_indexed(aside / folder, rule):
            build_index(aside / folder, rule, max_sample_bytes=config.max_sample_bytes)
        progress.advance(task)


def _put_in_place(aside: Path, root: Path) -> None:
    outdated = root.with_name(f"{root.name}.outdated")
    shutil.rmtree(outdated, ignore_errors=True)
    if root.exists():
        root.rename(outdated)
    aside.rename(root)
    shutil.rmtree(outdated, ignore_errors=True)


@contextmanager
def _only_build(root: Path, report: Report) -> Iterator[None]:
    """Waits while another process builds the same folder."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_name(f".{root.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process is building {root}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn())
