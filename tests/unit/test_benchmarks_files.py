"""Files that are missing, broken or too large: one UserError that names the file, and the row where there is one."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.errors import UserError
from megatron_vl.evaluate.benchmarks import files, pictures
from megatron_vl.evaluate.benchmarks.catalog import BENCHMARKS
from megatron_vl.evaluate.benchmarks.files import Row, read_rows

SUFFIXES = (".tsv", ".parquet", ".jsonl", ".json")


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_reader_refuses_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"nothing.* does not exist; it must be"):
        BENCHMARKS[name].read(tmp_path / "nothing", None)


@pytest.mark.parametrize("name", list(BENCHMARKS))
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1, 2", b"\n"])
def test_every_reader_refuses_an_empty_or_broken_file(tmp_path: Path, name: str, content: bytes) -> None:
    for suffix in SUFFIXES:
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"broken{suffix}"):
            BENCHMARKS[name].read(path, None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "has 0 bytes"), (b"\xff", "is no text in UTF-8"), (b" \n", "row 1: text is")],
)
def test_a_document_is_text(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt.* {complaint}"):
        BENCHMARKS["text"].read(tmp_path / "a.txt", None)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", b'{"x": 1}\n[2]\n', "a.jsonl, line 2 is a list; it must be an object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 is no JSON"),
        ("a.jsonl", b"\n \n", "a.jsonl has no rows"),
        ("a.tsv", b"index\timage\n", "a.tsv has no rows"),
        ("a.tsv", b"index\timage\n1\n", "a.tsv, row 1 has 1 cells; the header names 2"),
        ("a.tsv", "index\n\x80".encode("latin-1"), "a.tsv is no table .* in UTF-8"),
        ("a.parquet", b"PAR1 and more, then PAR1", "a.parquet is no whole parquet file"),
        ("a.csv", b"x", "a.csv ends with '.csv'; it must be a .tsv or .parquet or .jsonl or .json file"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        list(read_rows(tmp_path / name, *SUFFIXES))


def test_a_truncated_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"x": list(range(1000))}), path)
    assert [row.fields["x"] for row in read_rows(path, ".parquet")] == list(range(1000))
    whole = path.read_bytes()
    for end in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"shard.parquet is no whole parquet file"):
            list(read_rows(path, ".parquet"))
    path.write_bytes(whole[:20] + bytes(len(whole) // 2) + whole[20 + len(whole) // 2 :])
    with pytest.raises(UserError, match=r"shard.parquet is no whole parquet file"):
        list(read_rows(path, ".parquet"))


@pytest.mark.parametrize(
    ("limit", "name", "complaint"),
    [
        ("MAX_FILE_BYTES", "a.jsonl", "has 31 bytes; it must have 1 to 16"),
        ("MAX_FILE_BYTES", "a.tsv", "has 31 bytes; it must have 1 to 16"),
        ("MAX_CELL_BYTES", "a.jsonl", "line 1 is longer than 16 bytes"),
        ("MAX_CELL_BYTES", "a.tsv", "field larger than field limit"),
    ],
)
def test_files_and_cells_beyond_the_limits_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, name: str, complaint: str
) -> None:
    monkeypatch.setattr(files, limit, 16)
    (tmp_path / name).write_bytes(b'{"x": "' + b"y" * 22 + b'"}')
    with pytest.raises(UserError, match=f"{name}.*{complaint}"):
        list(read_rows(tmp_path / name, *SUFFIXES))


def test_a_parquet_that_is_large_decoded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"x": [b"\0" * 1000 for _ in range(1000)]}), path, use_dictionary=False)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 100_000)
    assert path.stat().st_size < files.MAX_FILE_BYTES
    with pytest.raises(UserError, match=r"bomb.parquet holds 10[0-9]{5} bytes decoded; the most is 100000"):
        list(read_rows(path, ".parquet"))


def test_images_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_IMAGE_BYTES", 3)
    (tmp_path / "a.png").write_bytes(b"1234")
    row = Row({"image": {"bytes": b"1234", "path": None}}, Path("b.parquet"), 5)
    with pytest.raises(UserError, match=r"b.parquet, row 5: its image has 4 bytes; it must have 1 to 3"):
        pictures.from_base64(row, "MTIzNA==")
    with pytest.raises(UserError, match="row 5: its image has 4 bytes"):
        pictures.from_column(row, "image", None)
    with pytest.raises(UserError, match=r"row 5: its image .*a.png has 4 bytes"):
        pictures.from_folder(row, "a.png", tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_may_not_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(UserError, match=rf"a{suffix} .*Permission denied"):
        list(read_rows(path, suffix))


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no .tsv file; give a folder with them, or a file"):
        list(read_rows(tmp_path, ".tsv"))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_written_lists_are_read_back(texts: list[str]) -> None:
    row = Row({"written": repr(texts), "plain": texts}, Path("x"), 1)
    expected = tuple(text.replace("<image>", "< image >").strip() for text in texts)
    assert row.texts("written") == row.texts("plain") == expected


@pytest.mark.parametrize("written", ["nan", "[1, None]", "['a', {}]", "(1, 2)", "f'{1}'", "[" * 300])
def test_other_values_are_no_lists_of_texts(written: str) -> None:
    with pytest.raises(UserError, match=r"x, row 1: field is"):
        Row({"field": written}, Path("x"), 1).texts("field")


def test_the_limit_of_csv_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.tsv").write_bytes(b"index\n1\n")
    assert len(list(read_rows(tmp_path / "a.tsv", ".tsv"))) == 1
    assert csv.field_size_limit() == before
