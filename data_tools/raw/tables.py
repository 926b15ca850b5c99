"""Tables and charts: an image, and what it holds as text; ChartQA's, UniChart's and PubTabNet's records among them."""

from typing import Any

from data_tools.raw.fields import one_image, record_fields, unmarked
from data_tools.raw.format import RawSample, RecordError
from megatron_vl.data.sample import IMAGE_MARK

QUESTIONS, CONTENTS = ("question", "query"), ("table", "html", "text", "answer", "label")


def read_table(record: Any, system: str) -> RawSample:
    """The image, the question if there is one, on a line of its own, then the content, which alone carries loss then.

    Raises RecordError where image or content is missing, or a table is neither a text, nor rows of cells, nor
    PubTabNet's structure and cells.
    """
    del system
    fields = record_fields(record)
    questions = [fields[name] for name in QUESTIONS if fields.get(name)]
    contents = [(name, fields[name]) for name in CONTENTS if fields.get(name)]
    if len(questions) > 1 or len(contents) != 1:
        found = ", ".join(name for name in (*QUESTIONS, *CONTENTS) if fields.get(name))
        raise RecordError(
            "no text",
            f"it must have one of {', '.join(CONTENTS)}, and may have one of {', '.join(QUESTIONS)}; it has "
            f"{found or 'none'}",
        )
    content = unmarked(_content(*contents[0])).strip()
    if not content:
        raise RecordError("no text", f'its "{contents[0][0]}" is blank')
    if not questions:
        return RawSample(fields={"text": IMAGE_MARK + content}, images=[one_image(fields)])
    begin = f"{IMAGE_MARK}{unmarked(_text(questions[0], 'its question'))}\n"
    text = begin + content
    return RawSample(
        fields={"text": text, "supervised": [[len(begin), len(text)]]}, images=[one_image(fields)]
    )


def _content(name: str, value: Any) -> str:
    if name == "html" and isinstance(value, dict):
        return _pubtabnet(value)
    if name == "table" and isinstance(value, list):
        return "\n".join(" | ".join(_cells(row)) for row in value)
    return _text(value, f'its "{name}"')


def _cells(row: Any) -> list[str]:
    if not isinstance(row, list) or not all(
        cell is None or isinstance(cell, str | int | float) for cell in row
    ):
        raise RecordError(
            "no text", f'a row of its "table" is {row!r}; a list of texts and numbers is needed'
        )
    return ["" if cell is None else " ".join(str(cell).split()) for cell in row]


def _pubtabnet(value: dict[str, Any]) -> str:
    """HTML from `structure`, whose tokens lack what is in the cells, and `cells`, in the order of their ends."""
    try:
        structure, cells = value["structure"]["tokens"], [cell["tokens"] for cell in value["cells"]]
        contents = iter(["".join(tokens) for tokens in cells])
        table = "".join(next(contents) + token if token.endswith("</td>") else token for token in structure)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError("no text", f'its "html" is not as PubTabNet has it: {error!r}') from error
    except (StopIteration, RuntimeError) as error:
        raise RecordError("no text", 'its "html" has fewer cells than its structure') from error
    if next(contents, None) is not None:
        raise RecordError("no text", 'its "html" has more cells than its structure')
    return f"<table>{table}</table>"


def _text(value: Any, what: str) -> str:
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise RecordError("no text", f"{what} is {type(value).__name__}; a text is needed")
    return value.strip()
