"""From a source of text to its documents: finds the files, reads any format, local or remote, from any record on.

A source is a string, or a list of them:

- ``sample:train``, ``sample:validation``: the C4 documents that come with the package;
- a local file or glob: ``.json`` and ``.jsonl`` (one object a line, or one list of them) and ``.txt`` (one document a
  file), plain or as ``.gz``, ``.xz``, ``.zst``; ``.parquet``, ``.arrow``;
- ``hub:<repo>[@<revision>][:<config>[:<split>]]``: a data set of the Hugging Face hub, streamed;
- any other URL or URL glob that ``fsspec`` opens (``hf://…``, ``s3://…``).

Whatever the source, it becomes a list of files, and everything after that is the same code.
"""

import codecs
import glob
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..checks import check, one_line
from .config import SOURCE
from .errors import DataError, reason
from .remote import BUFFER, RemoteFile, retried
from .slices import FileSlice

logger = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent / "sample"
SAMPLE_FILES = {"train": "c4-train-1000.jsonl.gz", "validation": "c4-heldout-330.jsonl.gz"}
INDEX = "index.json"  # of a directory of prepared tokens
PREPARED = "prepared:"  # the beginning of a source of tokens, which no reader of text takes

_CODECS = ("", ".gz", ".xz", ".zst")
_LINES = tuple(kind + codec for kind in (".json", ".jsonl") for codec in _CODECS)
_PLAIN = tuple(".txt" + codec for codec in _CODECS)
_TABLES = (".parquet", ".arrow")
EXTENSIONS = ".json, .jsonl or .txt (plain, .gz, .xz or .zst), .parquet or .arrow"
_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}  # what such files begin with
_LOOK_AHEAD = 1000  # records after a bad one, to find a good one
_ROWS = 1024  # of a table, decoded at once
T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------------------
# From a source to files


def find_files(source: str | Sequence[str]) -> list[str]:
    """The files or URLs behind ``source``, sorted within each of its entries, so that all ranks see one order.

    Raises:
        DataError: an entry matches nothing, cannot be resolved, is empty, or has an unknown extension.
        ValueError: ``source`` is neither a string nor a list of strings.
    """
    check("source", source, SOURCE)
    files = []
    for entry in [source] if isinstance(source, str) else source:
        if entry.startswith(PREPARED):
            raise DataError(f"{entry}: prepared tokens; accepted is a source of text")
        if entry.startswith("sample:"):
            files += _sample_files(entry)
        elif entry.startswith("hub:"):
            files += _hub_files(entry)
        elif "://" in entry:
            files += _url_files(entry)
        else:
            files += _local_files(entry)
    for file in files:
        if not file.endswith(_LINES + _PLAIN + _TABLES):
            raise DataError(f"{file}: unknown extension; accepted is {EXTENSIONS}")
    return files


def _sample_files(entry: str) -> list[str]:
    split = entry.removeprefix("sample:")
    if split not in SAMPLE_FILES:
        raise DataError(
            f"{entry}: unknown sample; accepted is {' or '.join(f'sample:{name}' for name in SAMPLE_FILES)}"
        )
    return [str(SAMPLE / SAMPLE_FILES[split])]


def _local_files(entry: str) -> list[str]:
    path = os.path.expanduser(entry)
    files = [path] if os.path.exists(path) else sorted(glob.glob(_below_existing(path), recursive=True))
    if not files:
        raise DataError(f"{entry}: no such file, and no file matches it as a glob")
    for file in files:
        if os.path.isfile(os.path.join(file, INDEX)):
            raise DataError(f"{file}: holds prepared tokens; accepted is {PREPARED}{file} for them")
        if os.path.isdir(file):
            raise DataError(f"{file}: is a directory; accepted are files, for example {os.path.join(file, '*.jsonl')}")
        if os.path.getsize(file) == 0:
            raise DataError(f"{file}: is empty")
    return files


def _below_existing(pattern: str) -> str:
    """A glob whose first folders, as far as they exist by these very names, stand for nothing else: ``[1]/*.jsonl``."""
    folder, rest = os.path.split(pattern)
    while folder not in ("", os.sep) and not os.path.isdir(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest)
    return os.path.join(glob.escape(folder), rest)


def _url_files(entry: str) -> list[str]:
    import fsspec

    def resolve():
        fs, path = fsspec.core.url_to_fs(entry)
        return fs, sorted(fs.glob(path)) if glob.has_magic(path) else [path]

    fs, files = _resolved(entry, resolve)
    if not files:
        raise DataError(f"{entry}: no file matches it")
    return [fs.unstrip_protocol(file) for file in files]


def _hub_files(entry: str) -> list[str]:
    name, config, split, *rest = [*entry.removeprefix("hub:").split(":"), "", ""]
    repo, _, revision = name.partition("@")
    split = split or "train"
    if not repo or any(rest):
        raise DataError(f"{entry}: accepted is hub:<repo>[@<revision>][:<config>[:<split>]]")

    def resolve():
        import datasets

        return datasets.load_dataset_builder(repo, config or None, revision=revision or None)

    splits = _resolved(entry, resolve).config.data_files or {}
    if split not in splits:
        raise DataError(f"{entry}: unknown split {split!r}; accepted is one of {', '.join(splits) or 'none'}")
    return sorted(splits[split])


def _resolved(entry: str, resolve: Callable[[], T]) -> T:
    try:
        return retried(f"{entry}: cannot be resolved", resolve)
    except DataError:
        raise
    except Exception as error:  # not found, gated, no `datasets`: libraries raise errors of many types
        raise DataError(f"{entry}: cannot be resolved ({reason(error)})") from error


# ------------------------------------------------------------------------------------------------------------------
# From files to texts


def read_texts(source: str | Sequence[str], text_field: str = "text", on_bad_line: str = "error") -> "Reader":
    """An iterable over the documents of ``source`` in the order of its files, without the blank ones.

    Its ``bad_lines`` counts the lines that were skipped.

    Raises:
        DataError: (also while iterating) a file cannot be found or read, or holds a bad line and ``on_bad_line`` is
            ``"error"``.
    """
    return Reader(find_files(source), text_field, on_bad_line)


@dataclass
class Reader:
    """Reads the documents of files, in an order of the files that ``seed`` and the epoch give; None keeps theirs."""

    files: list[str]
    text_field: str
    on_bad_line: str
    seed: int | None = None
    bad_lines: int = 0

    def __iter__(self) -> Iterator[str]:
        slices = (FileSlice(0, file) for file in range(len(self.files)))
        return (text for file_slice in slices for _, text in self.texts(file_slice))

    def texts(self, file_slice: FileSlice) -> Iterator[tuple[int, str]]:
        """Yields the documents of a slice, each with its record: its count in the file, from 1."""
        order = list(self.files)
        if self.seed is not None:
            random.Random(f"{self.seed}/{file_slice.epoch}").shuffle(order)
        path, good = order[file_slice.file], False
        kind = "row" if path.endswith(_TABLES) else "line"
        records = _records(path, self.text_field, file_slice.record)
        for count, number, raw in records:
            if file_slice.end is not None and count > file_slice.end:
                return
            if count % file_slice.step != file_slice.first:
                continue
            try:
                text = _text(raw, self.text_field)
            except ValueError as error:
                problem = f"{path}, {kind} {number}: {error}"
                if self.on_bad_line == "error":
                    following = [_is_good(raw, self.text_field) for _, _, raw in itertools.islice(records, _LOOK_AHEAD)]
                    if good or any(following):
                        problem += " (on_bad_line='skip' would leave it out)"
                    elif following:
                        problem += f"; no {kind} after it is any better"
                    raise DataError(problem) from None
                self._skipped(problem)
                continue
            good = True
            if text and not text.isspace():
                yield count, text

    def _skipped(self, problem: str) -> None:
        self.bad_lines += 1
        if self.bad_lines.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, …: a log that stays readable
            logger.warning("skipped %s (bad lines so far: %d)", problem, self.bad_lines)


def _records(path: str, text_field: str, after: int) -> Iterator[tuple[int, int, Any]]:
    """The lines that are not blank, or the rows of a table, after the ``after``-th: each with its count and number.

    Both are from 1; the number of a line counts blank lines, too, as an editor does.
    """
    try:
        with _open(path) as file:
            yield from _rows(path, file, text_field, after) if path.endswith(_TABLES) else _lines(path, file, after)
    except DataError:
        raise
    except Exception as error:  # each codec and each file system raises errors of its own
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error


def _open(path: str) -> io.BufferedReader:
    return io.BufferedReader(RemoteFile(path), BUFFER) if "://" in path else open(path, "rb")


def _lines(path: str, file: io.BufferedReader, after: int) -> Iterator[tuple[int, int, bytes | Any]]:
    text = io.BufferedReader(_decompressed(path, file), BUFFER)
    count, records = 0, iter(text)
    if path.endswith(_PLAIN):
        records = [_Document(text.read())]
    elif text.peek(64)[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        records = _listed(text.read())
    for number, line in enumerate(records, 1):
        if isinstance(line, bytes) and line.isspace():
            continue
        count += 1
        if count > after:
            yield count, number, line
    if not count:
        raise DataError(f"{path}: holds no documents")


class _Document(bytes): ...  # a whole file that is one


def _listed(content: bytes) -> list[Any]:
    """The items of a file that is one JSON list, else its lines."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return list(io.BytesIO(content))


def _decompressed(path: str, file: io.BufferedReader):
    """The content, by what the file begins with; its name says what is expected of one that begins otherwise."""
    begin = file.peek(6)
    codec = next((codec for magic, codec in _MAGIC.items() if begin.startswith(magic)), os.path.splitext(path)[1])
    if codec == ".gz":
        return gzip.GzipFile(fileobj=file)
    if codec == ".xz":
        return lzma.LZMAFile(file)
    if codec == ".zst":
        import pyarrow  # unlike the zstandard package it notices a truncated file, and it comes with datasets

        return pyarrow.input_stream(file, compression="zstd")
    return file


def _rows(path: str, file: io.BufferedReader, text_field: str, after: int) -> Iterator[tuple[int, int, str | None]]:
    import pyarrow
    import pyarrow.parquet

    count = 0  # of the rows before the next batch
    if path.endswith(".parquet"):
        table = pyarrow.parquet.ParquetFile(file)
        schema, groups = table.schema_arrow, list(range(table.num_row_groups))
        while groups and count + (rows := table.metadata.row_group(groups[0]).num_rows) <= after:
            count += rows
            del groups[0]
        batches = table.iter_batches(_ROWS, row_groups=groups, columns=[text_field])
    else:
        is_file = file.read(6) == b"ARROW1"  # the file format; `datasets` writes the stream format
        file.seek(0)
        table = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        schema, batches = table.schema, map(table.get_batch, range(table.num_record_batches)) if is_file else table
    if text_field not in schema.names:
        raise DataError(f"{path}: has no column {text_field!r}, its columns are {', '.join(schema.names)}")
    column = schema.field(text_field).type
    value_type = column.value_type if pyarrow.types.is_dictionary(column) else column
    types = pyarrow.types
    if not (types.is_string(value_type) or types.is_large_string(value_type) or types.is_string_view(value_type)):
        raise DataError(f"{path}: column {text_field!r} is of type {column}; accepted are strings")
    for batch in batches:
        skip = min(max(after - count, 0), batch.num_rows)
        for row, text in enumerate(batch.column(text_field).slice(skip).to_pylist(), count + skip + 1):
            yield row, row, text
        count += batch.num_rows
    if not count:
        raise DataError(f"{path}: holds no documents")


def _is_good(raw: Any, text_field: str) -> bool:
    try:
        _text(raw, text_field)
    except ValueError:
        return False
    return True


def _text(raw: Any, text_field: str) -> str:
    """The text of a line, of an item of a list, of a row or of a whole file; ``ValueError`` says what is wrong."""
    if isinstance(raw, _Document):
        try:
            raw = raw.decode("utf-16" if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 text ({one_line(error)})") from error
    elif not isinstance(raw, str | None):
        try:
            raw = json.loads(raw) if isinstance(raw, bytes) else raw
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({one_line(error)}); accepted is one object a line") from error
        if not isinstance(raw, dict) or text_field not in raw:
            raise ValueError(f'has no field {text_field!r}; accepted is an object like {{"{text_field}": "…"}}')
        raw = raw[text_field]
    if not isinstance(raw, str):
        raise ValueError(f"field {text_field!r} is {raw!r:.40}; accepted is a string")
    try:
        raw.encode()  # json can spell half a surrogate pair, on which tokenizers fail
    except UnicodeEncodeError:
        raise ValueError(f"field {text_field!r} holds half a surrogate pair; accepted is Unicode text") from None
    return raw
