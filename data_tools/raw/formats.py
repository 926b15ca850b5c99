"""The formats of raw material: `data.sources.SOURCE.raw.format`, as docs/data.md lists them."""

from data_tools.raw.containers import records_format
from data_tools.raw.conversations import read_conversation
from data_tools.raw.documents import read_caption, read_interleaved, read_text
from data_tools.raw.format import Format

FORMATS: dict[str, Format] = {
    "conversations": records_format(read_conversation),
    "captions": records_format(read_caption),
    "interleaved": records_format(read_interleaved),
    "text": records_format(read_text),
}
