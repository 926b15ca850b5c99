"""The recipe of sources that name raw material (`data.sources.SOURCE.raw`): one part for each."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import Any

from data_tools.quickstart.tokenizer import train_tokenizer
from data_tools.raw.duplicates import DuplicateSieve, finds_duplicates, traits_of
from data_tools.raw.filters import check_filters, unwanted_cause
from data_tools.raw.format import Material, RawSample, RecordError
from data_tools.raw.formats import FORMATS
from data_tools.raw.images import read_images
from data_tools.recipe import Part, Recipe, Record, Rejection, Rendered
from megatron_vl.config.data import DataConfig, SourceConfig
from megatron_vl.config.errors import UserError
from megatron_vl.data.sample import SampleError, parse_sample

SAMPLES_PER_SHARD = 2000  # some hundred MB with images
VOCAB_SIZE = 8192  # of a tokenizer that is trained


def raw_recipe(config: DataConfig) -> Recipe:
    """Build every source of `config` that has `raw`. Raises UserError where a field or file is unusable."""
    materials = [_material(name, source, config) for name, source in config.sources.items() if source.raw]
    versions = {material.source: _version(material) for material in materials}
    return Recipe(
        name=config.name,
        version=hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16],
        parts=lambda: [_part(config, material, versions[material.source]) for material in materials],
        train_tokenizer=partial(train_tokenizer, vocab_size=VOCAB_SIZE),
    )


def render_draft(material: Material, draft: Any) -> Rendered:
    """The samples of one draft, all for the source's folder or all for its held-out one."""
    records: list[Record] = []
    rejections: list[Rejection] = []
    filtered: list[str] = []
    filters = material.raw.filters
    try:
        samples = FORMATS[material.raw.format].read(material, draft)
    except RecordError as error:
        samples = [error]
    for index, raw in enumerate(samples):
        try:
            if isinstance(raw, RecordError):
                raise raw
            record = _record(material, raw, index, str(draft))
            if cause := unwanted_cause(record.fields, record.images, filters):
                filtered.append(cause)
            else:
                records.append(replace(record, traits=traits_of(record.fields, record.images, filters)))
        except RecordError as error:
            rejections.append(_rejection(material, draft, error, error.name or getattr(raw, "name", "")))
    folders: tuple[tuple[Record, ...], ...] = (tuple(records),)
    if material.has_heldout:
        held_out = _draw(_identity(samples[0])) < material.raw.heldout_fraction
        folders = ((), *folders) if held_out else (*folders, ())
    return Rendered(records=folders, rejections=tuple(rejections), filtered=tuple(filtered))


def _rejection(material: Material, draft: Any, error: RecordError, name: str) -> Rejection:
    where = f"{draft} ({name})" if name else str(draft)
    return Rejection(cause=error.cause, where=f"{where} of {material.raw.file}", detail=error.detail)


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
    if Path(raw.file).is_dir() and FORMATS[raw.format].of_folder and raw.images:
        raise UserError(
            f"{field}.file is the folder {raw.file}, which holds the images of format {raw.format} too; give no "
            f"{field}.images"
        )
    if raw.limit is not None and raw.limit < 1:
        raise UserError(f"{field}.limit={raw.limit} must be at least 1, or null for all records")
    check_filters(raw.filters, f"{field}.filters")
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
        image_folder=Path(raw.file) if Path(raw.file).is_dir() and not raw.images else Path(raw.images),
        modality=source.modality,
        has_heldout=source.heldout is not None,
        max_sample_bytes=config.max_sample_bytes,
        max_image_pixels=config.max_image_pixels,
    )


def _part(config: DataConfig, material: Material, version: str) -> Part:
    source, field = config.sources[material.source], f"data.sources.{material.source}.raw.file"
    folders = [source.path, source.heldout] if source.heldout is not None else [source.path]
    filters = material.raw.filters
    return Part(
        folders=tuple(Path(folder).relative_to(config.root).as_posix() for folder in folders),
        drafts=_limited(FORMATS[material.raw.format].drafts(material, field), material.raw.limit),
        render=partial(render_draft, material),
        max_rejected_fraction=material.raw.max_rejected_fraction,
        samples_per_shard=SAMPLES_PER_SHARD,
        sieve=partial(DuplicateSieve, filters) if finds_duplicates(filters) else None,
        version=version,
    )


def _limited(drafts: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` drafts, drawn by their places, in order."""
    if limit is None or len(drafts) <= limit:
        return drafts
    drawn = nsmallest(limit, range(len(drafts)), key=lambda number: _draw(str(drafts[number])))
    return [drafts[number] for number in sorted(drawn)]


def _record(material: Material, raw: RawSample, index: int, place: str) -> Record:
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
    return Record(fields=fields, images=images, index=index)


def _identity(sample: RawSample | RecordError) -> str | bytes:
    """What decides where a sample belongs: its first image alone, without images its text."""
    if isinstance(sample, RecordError):
        return sample.detail
    return sample.images[0] if sample.images else json.dumps(sample.fields)


def _draw(drawn_by: str | bytes) -> float:
    """A number in [0, 1)."""
    data = drawn_by if isinstance(drawn_by, bytes) else drawn_by.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


def _version(material: Material) -> str:
    """Differs where what is built may: this code, the values, the material. Images are not read for it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    values = asdict(material)
    del values["raw"]["max_rejected_fraction"]  # decides whether it is built, not what
    content = FORMATS[material.raw.format].digest(material)
    digest.update(json.dumps([values, content], default=str).encode())
    return digest.hexdigest()[:16]
