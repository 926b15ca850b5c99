"""The formats of raw material: `data.sources.SOURCE.raw.format`, as docs/data.md lists them."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from data_tools.raw import captions, named_images, scene_text, text_files
from data_tools.raw.containers import records_format
from data_tools.raw.conversations import read_conversation
from data_tools.raw.documents import read_interleaved, read_text
from data_tools.raw.format import Format, Material, RawSample, RecordError
from data_tools.raw.tables import read_table
from data_tools.raw.web_code import notebooks, screenshots, scripts
from megatron_vl.config.errors import UserError


def _of_extra(module: str) -> Format:
    """The FORMAT, of folders, of a module that needs libraries of the extra `build`; imported where it is used."""

    def load() -> Format:
        try:
            found: Format = import_module(module).FORMAT
        except ModuleNotFoundError as error:
            raise UserError(f"this format needs {error.name}: pip install 'megatron-vl[build]'") from error
        return found

    def drafts(material: Material, field: str) -> Sequence[Any]:
        return load().drafts(material, field)

    def read(material: Material, draft: Any) -> Sequence[RawSample | RecordError]:
        return load().read(material, draft)

    return Format(drafts=drafts, read=read, digest=lambda material: load().digest(material), of_folder=True)


FORMATS: dict[str, Format] = {
    "conversations": records_format(read_conversation),
    "captions": captions.FORMAT,
    "interleaved": records_format(read_interleaved),
    "text": records_format(read_text),
    "tables": records_format(read_table),
    "scene_text": scene_text.FORMAT,
    "web_pages": _of_extra("data_tools.raw.web_pages"),
    "text_files": text_files.FORMAT,
    "man_pages": _of_extra("data_tools.raw.man_pages"),
    "stamps": named_images.STAMPS,
    "named_images": named_images.NAMED_IMAGES,
    "document_pages": _of_extra("data_tools.raw.render.document"),
    "scripts": scripts.FORMAT,
    "notebooks": notebooks.FORMAT,
    "screenshots": screenshots.FORMAT,
}
