"""Records are found where they lie in .json and .jsonl files, whatever their layout; broken files are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.raw import json_text
from data_tools.raw.format import RecordError
from data_tools.raw.records import Span, locate_records
from megatron_vl.config.errors import UserError

LIMIT = 10_000
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
RECORDS = st.lists(
    st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.lists(TEXT, max_size=2)), max_size=3)
)
ANY_CHUNK = [1, 3, 1 << 22]


def all_records(path: Path) -> list[Any]:
    spans = locate_records(path, "data.sources.x.raw.file", LIMIT)
    assert [span.number for span in spans] == list(range(len(spans)))
    return [span.read(path, LIMIT) for span in spans]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    content=RECORDS.filter(len),
    chunk=st.sampled_from(ANY_CHUNK),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    frame=st.sampled_from([("", ""), ("\ufeff", ""), (" \n", "\r\n ")]),
)
def test_a_list_is_read_as_json_reads_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: list[Any],
    chunk: int,
    indent: int | None,
    ascii_only: bool,
    frame: tuple[str, str],
) -> None:
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    path = tmp_path / "records.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(f"{frame[0]}{text}{frame[1]}".encode())
    assert all_records(path) == content


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    content=RECORDS.filter(len),
    chunk=st.sampled_from(ANY_CHUNK),
    line_end=st.sampled_from(["\n", "\r\n", "\n\n \n"]),
    last_end=st.booleans(),
    start=st.sampled_from(["", "\ufeff", "\n"]),
)
def test_lines_are_records(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: list[Any],
    chunk: int,
    line_end: str,
    last_end: bool,
    start: str,
) -> None:
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    path = tmp_path / "records.jsonl"
    lines = line_end.join(json.dumps(record, ensure_ascii=False) for record in content)
    path.write_bytes((start + lines + (line_end if last_end else "")).encode())
    assert all_records(path) == content


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    content = [{"id": 1, "text": "a]"}, {"id": "图", "n": [2]}]
    path = tmp_path / name
    lines = [json.dumps(record, ensure_ascii=False) for record in content]
    data = (f"[{', '.join(lines)}]" if name == "records.json" else "\n".join(lines)).encode()
    first_line = len(lines[0].encode())
    for end in range(1, len(data)):
        if name == "records.jsonl" and end in (first_line, first_line + 1):
            continue  # what is left is whole
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=rf"data\.file is {path}"):
            locate_records(path, "data.file", LIMIT)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", None, "cannot be read: No such file"),
        ("a.csv", "", "a .json file .* or .jsonl"),
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", "\n \n", "holds no records"),
        ("a.json", "", "ends at byte 0"),
        ("a.json", '{"id": 1}', r"no list of records.* is \.jsonl.*byte 0 there is '{'"),
        ("a.json", '[{"id": 1} {"id": 2}]', "after record 0, a comma or ].*byte 11"),
        ("a.json", '[{"id": 1}, {"id": nope}]', "record 1, at byte 12, is no JSON"),
        ("a.json", '[{"id": 1},]', "record 1, at byte 11, is no JSON"),
        ("a.json", '[{"id": 1}] [', "after the list of 1 records there is more, at byte 12"),
        (
            "a.json",
            '["' + "a" * LIMIT + '", ' + "b" * 2 * LIMIT,
            "record 1, at byte 10005, is no JSON, or longer",
        ),
        ("a.json", b'["\xff"]', "can't decode byte"),
        ("a.jsonl", '{"id": 1}\n{"id": ', "record 1, the last, is unfinished.*cut off"),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, name: str, content: str | bytes | None, complaint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=rf"data\.file is {path}.*{complaint}"):
        locate_records(path, "data.file", LIMIT)


def test_a_long_last_line_need_not_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n"' + "a" * LIMIT + '"')
    assert len(locate_records(path, "data.file", LIMIT)) == 2


def test_broken_and_long_lines_are_that_records_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id":\n"' + b"a" * LIMIT + b'"\n\xff\n{"id": 5}\n')
    spans = locate_records(path, "data.file", LIMIT)
    assert [(span.offset, span.size) for span in spans[:2]] == [(0, 10), (10, 7)]
    causes = []
    for span in spans:
        try:
            causes.append(span.read(path, LIMIT))
        except RecordError as error:
            causes.append(error.cause)
    assert causes == [{"id": 1}, "invalid JSON", "record too large", "invalid JSON", {"id": 5}]
    assert spans[-1] == Span(number=4, offset=spans[3].offset + 2, size=10)
