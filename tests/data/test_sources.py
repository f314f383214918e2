"""Sources of text: formats, names, files that are damaged or lead nowhere."""

import gzip
import io
import itertools
import lzma

import pytest
from text_files import (
    FORMATS,
    arrow,
    arrow_bytes,
    batches,
    documents_of,
    ids_of,
    json_lines,
    parquet_bytes,
    save,
    texts,
    zstd,
)

from nt_hf.data.errors import DataError
from nt_hf.data.slices import FileSlice
from nt_hf.data.sources import Reader, find_files, read_texts

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_gives_the_same_texts(extension, tmp_path):
    documents = ["Line\u2028separator\n", *texts(10), "é漢\U0001f600"]
    path = tmp_path / f"x{extension}"
    path.write_bytes(FORMATS[extension](documents))
    assert list(read_texts(str(path))) == documents


def test_files_come_in_the_order_of_names_and_entries(tmp_path):
    for name in ("b-2", "a-1", "b-1"):
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([name]))
    assert list(read_texts([str(tmp_path / "b-*.jsonl"), str(tmp_path / "a-1.jsonl")])) == ["b-1", "b-2", "a-1"]


def test_file_name_with_glob_characters(tmp_path):
    (tmp_path / "x[1].jsonl").write_bytes(json_lines(["found"]))
    assert list(read_texts(str(tmp_path / "x[1].jsonl"))) == ["found"]


def test_other_urls(tmp_path):
    save(tmp_path, [["a"], ["b"]])
    assert list(read_texts(f"file://{tmp_path}/part-*.jsonl")) == ["a", "b"]


def test_sample_is_whole():
    assert [sum(1 for _ in read_texts(f"sample:{split}")) for split in ("train", "validation")] == [1000, 330]


def test_blank_documents_and_lines_are_skipped(tokenizer, tmp_path):
    lines = [json_lines([text]) for text in ("a", "", " \n\t", "b")]
    (tmp_path / "x.jsonl").write_bytes(b"\n  \n".join(lines) + b"\n\n")
    found = batches(str(tmp_path / "x.jsonl"), tokenizer, epochs=1)
    assert documents_of(found) == ids_of(["a", "b"], tokenizer)
    assert (found.documents, found.bad_lines) == (2, 0)


# --- reading from within a file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".parquet", ".arrow", ".file.arrow", ".jsonl", ".jsonl.gz"])
def test_reading_from_any_record_on(extension, tmp_path):
    documents = texts(10)
    path = tmp_path / f"x{extension}"
    path.write_bytes(FORMATS[extension](documents))
    reader = Reader([str(path)], "text", "error")
    for record, step in itertools.product(range(12), (1, 3)):
        found = list(reader.texts(FileSlice(0, 0, 0, step, record)))
        expected = [(i, text) for i, text in enumerate(documents, 1) if i > record and i % step == 0]
        assert found == expected


def test_consumed_row_groups_are_not_read(tmp_path):
    """A parquet file whose first row groups are gone still gives the rest."""
    path = tmp_path / "x.parquet"
    content = bytearray(parquet_bytes(texts(12)))  # row groups of four
    metadata = arrow("pyarrow.parquet").ParquetFile(io.BytesIO(bytes(content))).metadata
    for group in (0, 1):
        column = metadata.row_group(group).column(1)
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    found = Reader([str(path)], "text", "error").texts(FileSlice(0, 0, record=9))
    assert [text for _, text in found] == texts(12)[9:]


def test_consumed_lines_are_not_parsed(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"bad\nbad\n" + json_lines(["good"]))
    found = Reader([str(tmp_path / "x.jsonl")], "text", "error").texts(FileSlice(0, 0, record=2))
    assert list(found) == [(3, "good")]


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = json_lines(["fine"])
BAD_LINES = {
    "not json": (b"{broken", "is not JSON"),
    "not an object": (b'["text"]', "has no field 'text'"),
    "without text": (b'{"url": ""}', "has no field 'text'"),
    "null": (b'{"text": null}', "field 'text' is None; accepted is a string"),
    "number": (b'{"text": 3}', "field 'text' is 3; accepted is a string"),
    "not utf-8": (b'{"text": "\xff"}', "is not JSON"),
    "surrogate": (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair"),
    "nested": (b"[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_named_or_counted(tokenizer, tmp_path, kind, workers):
    line, problem = BAD_LINES[kind]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b"\n" + line + b"\n" + GOOD))
    with pytest.raises(DataError) as raised:
        list(batches(str(path), tokenizer, epochs=1, num_workers=workers))
    assert str(raised.value).startswith(f"{path}, line 3: {problem}")
    assert "\n" not in str(raised.value)
    found = batches(str(path), tokenizer, epochs=1, num_workers=workers, on_bad_line="skip")
    assert documents_of(found) == ids_of(["fine"] * 2, tokenizer)
    assert (found.documents, found.bad_lines) == (2, 1)


def test_skipped_lines_are_logged(tmp_path, caplog):
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"bad\n" * 20)
    assert list(read_texts(str(tmp_path / "x.jsonl"), on_bad_line="skip")) == ["fine"]
    assert [record.getMessage().rsplit(" ", 1)[1] for record in caplog.records] == ["1)", "2)", "4)", "8)", "16)"]
    assert "x.jsonl, line 2: is not JSON" in caplog.text


def test_row_without_text_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(["fine", None]))
    with pytest.raises(DataError, match=r"x\.parquet, row 2: field 'text' is None"):
        list(read_texts(str(tmp_path / "x.parquet")))


BROKEN = "cannot be read"
BAD_FILES = {
    "empty.jsonl": (lambda: b"", "is empty"),
    "blank.jsonl": (lambda: b"\n \n", "holds no documents"),
    "empty.jsonl.gz": (lambda: gzip.compress(b""), "holds no documents"),
    "truncated.jsonl.gz": (lambda: gzip.compress(json_lines(texts(200)))[:-20], BROKEN),
    "truncated.jsonl.xz": (lambda: lzma.compress(json_lines(texts(200)))[:-20], BROKEN),
    "truncated.jsonl.zst": (lambda: zstd(json_lines(texts(200)))[:-20], BROKEN),
    "truncated.parquet": (lambda: parquet_bytes(texts(200))[:-20], BROKEN),
    "truncated.arrow": (lambda: arrow_bytes(texts(200))[:-200], BROKEN),
    "plain.jsonl.gz": (lambda: GOOD, BROKEN),
    "plain.jsonl.xz": (lambda: GOOD, BROKEN),
    "plain.jsonl.zst": (lambda: GOOD, BROKEN),
    "plain.parquet": (lambda: GOOD, BROKEN),
    "column.parquet": (lambda: parquet_bytes([1, 2]), "column 'text' is of type int64; accepted are strings"),
    "x.csv": (lambda: GOOD, "unknown extension; accepted is .json"),
    "x.gz": (lambda: gzip.compress(GOOD), "unknown extension; accepted is .json"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(tokenizer, tmp_path, name, workers):
    content, problem = BAD_FILES[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(DataError) as raised:
        list(batches([save(tmp_path, [["good"]]), str(tmp_path / name)], tokenizer, epochs=1, num_workers=workers))
    assert str(raised.value).startswith(f"{tmp_path / name}: ") and problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_column_must_exist(tmp_path):
    (tmp_path / "x.parquet").write_bytes(parquet_bytes(["a"]))
    with pytest.raises(DataError, match=r"has no column 'content', its columns are url, text$"):
        list(read_texts(str(tmp_path / "x.parquet"), text_field="content"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("none-*.jsonl", "no such file, and no file matches it as a glob"),
        (".", "is a directory; accepted are files, for example"),
        ("sample:test", "accepted is sample:train or sample:validation"),
        ("file:///none-*.jsonl", "no file matches it"),
        ("nosuch://x.jsonl", "cannot be resolved"),
        ("hub:", "accepted is hub:<repo>"),
    ],
)
def test_source_that_leads_nowhere_is_named(source, problem):
    with pytest.raises(DataError) as raised:
        find_files(source)
    assert str(raised.value).startswith(f"{source}: ") and problem in str(raised.value)
    assert "\n" not in str(raised.value)
