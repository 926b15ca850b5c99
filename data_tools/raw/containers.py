"""What records come in, whatever they mean: .json, .jsonl, .parquet and .tar files, alone or a folder of one kind."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.joined import is_object
from data_tools.raw.parquet import locate_in_parquet
from data_tools.raw.places import Draft, Drafts, Place
from data_tools.raw.records import locate_records
from data_tools.raw.tars import locate_in_tar
from megatron_vl.config.errors import UserError
from megatron_vl.data.shard_table import file_sha256

Meaning = Callable[[Any, str], RawSample]  # a record and the source's system message -> what it says
Locate = Callable[
    [Path, str, int], Sequence[Place]
]  # a file, the configuration's field, the most bytes of a record

# In a folder, files of the first kind that it has are read: img2dataset puts .parquet and .json beside its tars.
LOCATORS: dict[str, Locate] = {
    ".tar": locate_in_tar,
    ".parquet": locate_in_parquet,
    ".jsonl": locate_records,
    ".json": locate_records,
}
BULKY = (".tar", ".parquet")  # which hold images, and are not read for a digest


def records_format(meaning: Meaning, *, locate_in_object: Locate | None = None) -> Format:
    """The format of records that `meaning` understands; `locate_in_object` finds them in a .json of one object."""

    def drafts(material: Material, field: str) -> Sequence[Draft]:
        found = Drafts(
            (name, _locator(path, field, locate_in_object)(path, field, material.max_sample_bytes))
            for name, path in record_files(material.file, field)
        )
        if not len(found):
            raise UserError(f"{field} is {material.file}, which holds no records")
        return found

    def read(material: Material, draft: Draft) -> Sequence[RawSample]:
        return read_draft(material, draft, meaning)

    return Format(drafts=drafts, read=read, digest=records_digest)


def read_draft(material: Material, draft: Draft, meaning: Meaning) -> Sequence[RawSample]:
    """What the draft's record says, named by its id, if it has one. Raises RecordError."""
    record = draft.read(material.file, material.max_sample_bytes)
    identity = record.get("id") if isinstance(record, dict) else None
    name = "" if identity is None else f"id {identity!r}"
    try:
        sample = meaning(record, material.raw.system)
    except RecordError as error:
        raise RecordError(error.cause, error.detail, name) from error
    return [RawSample(fields=sample.fields, images=sample.images, name=name)]


def names_in(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """The files of those suffixes in `folder` and below, relative to it and in order; links too, as caches have."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def record_files(file: Path, field: str) -> list[tuple[str, Path]]:
    """The files of records, with their names in the folder `file`; without one where it is a file itself.

    Raises UserError, naming `field`, where a folder has none.
    """
    names = _record_names(file)
    if not names:
        raise UserError(
            f"{field} is {file}, which holds no files of records ({', '.join(LOCATORS)}), and no images with captions"
        )
    return [(name, file / name if name else file) for name in names]


def records_digest(material: Material) -> str:
    """By what the files hold, of tars and parquet by their size and time."""
    digest = hashlib.sha256()
    for name in _record_names(material.file):
        path = material.file / name if name else material.file
        if path.is_file():  # a missing one is told when it is listed
            digest.update(f"{name} {_content(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _record_names(file: Path) -> list[str]:
    if not file.is_dir():
        return [""]
    names = names_in(file, list(LOCATORS))
    kinds = [suffix for suffix in LOCATORS if any(name.endswith(suffix) for name in names)]
    return [name for name in names if name.endswith(kinds[0])] if kinds else []


def _content(path: Path) -> str:
    state = path.stat()
    return f"{state.st_size} {state.st_mtime_ns}" if path.suffix in BULKY else file_sha256(path)


def _locator(path: Path, field: str, locate_in_object: Locate | None) -> Locate:
    if path.suffix not in LOCATORS:
        raise UserError(f"{field} is {path}; a file of {', '.join(LOCATORS)} is needed, or a folder of them")
    if locate_in_object is not None and is_object(path):
        return locate_in_object
    return LOCATORS[path.suffix]
