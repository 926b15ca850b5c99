"""The recipe of sources that name raw material (`data.sources.SOURCE.raw`): one part for each."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.raw.conversations import read_conversation
from data_tools.raw.documents import read_caption, read_interleaved, read_text
from data_tools.raw.folder import digest_of, locate_images, read_pair
from data_tools.raw.images import read_images
from data_tools.raw.records import RawSample, RecordError, Span, locate_records, read_record
from data_tools.recipe import Part, Recipe, Record, Rejection
from megatron_vl.config.data import DataConfig, RawConfig, SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.index import file_sha256
from megatron_vl.data.sample import SampleError, parse_sample

SAMPLES_PER_SHARD = 2000  # some hundred MB with images
# `data.sources.SOURCE.raw.format` -> what a record says, given the source's system message
FORMATS: dict[str, Callable[[Any, str], RawSample]] = {
    "conversations": read_conversation,
    "captions": read_caption,
    "interleaved": read_interleaved,
    "text": read_text,
}


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a source is made of, and what bounds it; known to the processes that render."""

    source: str
    raw: RawConfig
    image_folder: Path
    modality: str
    has_heldout: bool
    max_sample_bytes: int
    max_image_pixels: int


def raw_recipe(config: DataConfig) -> Recipe:
    """Build every source of `config` that has `raw`. Raises UserError where a field or file is unusable."""
    materials = {
        name: _material(name, source, config) for name, source in config.sources.items() if source.raw
    }
    return Recipe(
        name=config.name,
        version=_version(list(materials.values())),
        parts=lambda: [_part(config, material) for material in materials.values()],
        train_tokenizer=None,
    )


def render_record(material: Material, draft: Span | str) -> tuple[Record | None, ...] | Rejection:
    """The sample of one record, for the source's folder or for its held-out one.

    A draft is a record's place in a file, or the name of an image in a folder.
    """
    file, record = Path(material.raw.file), None
    try:
        if isinstance(draft, Span):
            record = read_record(file, draft, material.max_sample_bytes)
        else:
            record = read_pair(file, draft, material.max_sample_bytes)
        raw = FORMATS[material.raw.format](record, material.raw.system)
        sample = _sample(material, raw, _place(draft))
    except RecordError as error:
        identity = record.get("id") if isinstance(record, dict) else None
        name = _place(draft) if identity is None else f"{_place(draft)} (id {identity!r})"
        return Rejection(cause=error.cause, where=f"{name} of {file}", detail=error.detail)
    if not material.has_heldout:
        return (sample,)
    drawn_by = raw.images[0] if raw.images else json.dumps(raw.fields)
    held_out = _draw(drawn_by) < material.raw.heldout_fraction
    return (None, sample) if held_out else (sample, None)


def _place(draft: Span | str) -> str:
    return f"record {draft.number}" if isinstance(draft, Span) else draft


def _material(name: str, source: SourceConfig, config: DataConfig) -> Material:
    raw, field = source.raw, f"data.sources.{name}.raw"
    assert raw is not None
    if raw.format not in FORMATS:
        raise UserError(f"{field}.format is {raw.format!r}; valid: {', '.join(FORMATS)}")
    for bounded in ("heldout_fraction", "max_rejected_fraction"):
        if not 0 <= getattr(raw, bounded) < 1:
            raise UserError(f"{field}.{bounded}={getattr(raw, bounded)} must be at least 0 and below 1")
    if (raw.heldout_fraction > 0) != (source.heldout is not None):
        raise UserError(
            f"{field}.heldout_fraction={raw.heldout_fraction}, but data.sources.{name}.heldout="
            f"{source.heldout}: give a fraction above 0 and a folder, or 0 and null"
        )
    if Path(raw.file).is_dir() and (raw.format != "captions" or raw.images):
        raise UserError(
            f"{field}.file is the folder {raw.file}: that is for format captions, and its images are in it; give no "
            f"{field}.images"
        )
    if raw.images and not Path(raw.images).is_dir():
        raise UserError(f"{field}.images is {raw.images}, which is no folder")
    for folder in filter(None, (source.path, source.heldout)):
        if not Path(folder).is_relative_to(config.root):
            raise UserError(
                f"data.sources.{name} is built in {folder}, which must lie in {config.root}, data.root"
            )
    return Material(
        source=name,
        raw=raw,
        image_folder=Path(raw.file) if Path(raw.file).is_dir() else Path(raw.images),
        modality=source.modality,
        has_heldout=source.heldout is not None,
        max_sample_bytes=config.max_sample_bytes,
        max_image_pixels=config.max_image_pixels,
    )


def _part(config: DataConfig, material: Material) -> Part:
    source, field = config.sources[material.source], f"data.sources.{material.source}.raw.file"
    folders = [source.path, source.heldout] if source.heldout is not None else [source.path]
    return Part(
        folders=tuple(Path(folder).relative_to(config.root).as_posix() for folder in folders),
        drafts=_drafts(material, field),
        render=partial(render_record, material),
        max_rejected_fraction=material.raw.max_rejected_fraction,
        samples_per_shard=SAMPLES_PER_SHARD,
    )


def _drafts(material: Material, field: str) -> Sequence[Span | str]:
    file = Path(material.raw.file)
    return (
        locate_images(file, field)
        if file.is_dir()
        else locate_records(file, field, material.max_sample_bytes)
    )


def _sample(material: Material, raw: RawSample, place: str) -> Record:
    """Checked as training will check it. Raises RecordError."""
    if raw.images and material.modality == "text":
        raise RecordError(
            "image in a text source", f"data.sources.{material.source}.modality must be multimodal for it"
        )
    fields = {**raw.fields, "source": material.source}
    data = json.dumps(fields, ensure_ascii=False).encode(errors="surrogatepass")
    try:
        parse_sample(data, place, material.raw.file, material.max_sample_bytes)
    except SampleError as error:
        raise RecordError(error.cause, error.detail) from error
    images = read_images(
        material.image_folder,
        raw.images,
        max_bytes=material.max_sample_bytes - len(data),
        max_pixels=material.max_image_pixels,
    )
    return Record(fields=fields, images=images)


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _version(materials: list[Material]) -> str:
    """Differs where what is built may: this code, the values, the records. Images are not read for it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for material in materials:
        file = Path(material.raw.file)
        content = digest_of(file) if file.is_dir() else _file_digest(file)
        digest.update(json.dumps([asdict(material), content], default=str).encode())
    return digest.hexdigest()[:16]


def _file_digest(file: Path) -> str:
    """Nothing for a file that is not there: that is told when its part is decided."""
    return file_sha256(file) if file.is_file() else ""
