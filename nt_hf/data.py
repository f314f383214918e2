"""From text files to token batches: one reader for local and remote files, exact to resume.

A source is a string, or a list of them:

- ``sample:train``, ``sample:validation``: the C4 documents that come with the package;
- a local file or glob: ``.json`` and ``.jsonl`` (one object a line; plain, ``.gz``, ``.xz``, ``.zst``),
  ``.parquet``, ``.arrow``;
- ``hub:<repo>[@<revision>][:<config>[:<split>]]``: a data set of the Hugging Face hub, streamed;
- any other URL or URL glob that ``fsspec`` opens (``hf://…``, ``s3://…``).

Whatever the source, it becomes a list of files, and everything after that is the same code. Each pass over the
files (an *epoch*) is divided between *streams*, one for each loader worker of each rank: whole files as long as
every stream gets as many, the documents of the files that remain one after the other. So each document is used
once an epoch, by exactly one stream. A stream's place is a few integers, which makes stopping and resuming exact.
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SAMPLE = Path(__file__).parent / "sample"
SAMPLE_FILES = {"train": "c4-train-1000.jsonl.gz", "validation": "c4-heldout-330.jsonl.gz"}
PACKINGS = ("pack", "pad")
ON_BAD_LINE = ("error", "skip")
IGNORE_INDEX = -100

_LINES = tuple(kind + codec for kind in (".json", ".jsonl") for codec in ("", ".gz", ".xz", ".zst"))
_TABLES = (".parquet", ".arrow")
TOKENIZE_AT_ONCE = 128  # documents; enough to occupy a fast tokenizer's threads, few enough to start quickly


class DataError(ValueError):
    """Text that cannot be found or read; the message is one line that names the file or source."""


@dataclass
class DataConfig:
    """What to read and how to make batches of it; ``TokenBatches`` and the module explain the fields.

    Raises:
        ValueError: a field has a value that is not accepted.
    """

    train: str | list[str] = "hub:allenai/c4:en:train"
    validation: str | list[str] = "hub:allenai/c4:en:validation"
    tokenizer: str = "sample"
    sequence_length: int = 256
    packing: str = "pack"
    shuffle_block: int = 1024
    num_workers: int = 0
    on_bad_line: str = "error"
    validation_tokens: int | None = field(default=10_000_000, metadata={"help": "at most so many; None for all"})
    text_field: str = "text"

    def __post_init__(self):
        for name in ("train", "validation"):
            _check_source(name, getattr(self, name))
        for name in ("tokenizer", "text_field"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a non-empty string")
        _check_choice("packing", self.packing, PACKINGS)
        _check_choice("on_bad_line", self.on_bad_line, ON_BAD_LINE)
        _check_int("sequence_length", self.sequence_length, 2)  # one token predicts nothing
        _check_int("shuffle_block", self.shuffle_block, 0)
        _check_int("num_workers", self.num_workers, 0)
        if self.validation_tokens is not None:
            _check_int("validation_tokens", self.validation_tokens, 1)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer called ``name``: ``"sample"`` (T5's 32,000 pieces, with the package), a directory or a hub name.

    Raises:
        ValueError: there is no such tokenizer, or it has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(SAMPLE if name == "sample" else name)
    except Exception as error:  # missing files, bad json, no network: as many types as causes
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded ({_one_line(error)}): "
            "expected 'sample', a tokenizer's directory or its name on the hub"
        ) from error
    eos_id(tokenizer)
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that every id the tokenizer can emit is below ``vocab_size``; ids may have gaps, so it counts none.

    Raises:
        ValueError: the largest id is ``vocab_size`` or more.
    """
    largest = max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder])
    if largest >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the tokenizer emits ids up to {largest}, expected {largest + 1} or more"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of all that a tokenizer's ids depend on, its vocabulary and its end-of-sequence token."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------------
# From a source to files


def find_files(source: str | Sequence[str]) -> list[str]:
    """The files or URLs behind ``source``, sorted within each of its entries, so that all ranks see one order.

    Raises:
        DataError: an entry matches nothing, cannot be resolved, is empty, or has an unknown extension.
        ValueError: ``source`` is neither a string nor a list of strings.
    """
    _check_source("source", source)
    files = []
    for entry in [source] if isinstance(source, str) else source:
        if entry.startswith("sample:"):
            files += _sample_files(entry)
        elif entry.startswith("hub:"):
            files += _hub_files(entry)
        elif "://" in entry:
            files += _url_files(entry)
        else:
            files += _local_files(entry)
    for file in files:
        if not file.endswith(_LINES + _TABLES):
            raise DataError(
                f"{file}: unknown extension, expected .json or .jsonl (plain, .gz, .xz or .zst), .parquet or .arrow"
            )
    return files


def _sample_files(entry: str) -> list[str]:
    split = entry.removeprefix("sample:")
    if split not in SAMPLE_FILES:
        raise DataError(f"{entry}: unknown sample, expected {' or '.join(f'sample:{name}' for name in SAMPLE_FILES)}")
    return [str(SAMPLE / SAMPLE_FILES[split])]


def _local_files(entry: str) -> list[str]:
    path = os.path.expanduser(entry)
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise DataError(f"{entry}: no such file, and no file matches it as a glob")
    for file in found:
        if os.path.isdir(file):
            raise DataError(f"{file}: is a directory, expected files, for example {os.path.join(file, '*.jsonl')}")
        if os.path.getsize(file) == 0:
            raise DataError(f"{file}: is empty")
    return found


def _url_files(entry: str) -> list[str]:
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(entry)
        found = sorted(fs.glob(path)) if glob.has_magic(path) else [path]
    except Exception as error:  # each file system raises errors of its own
        raise DataError(f"{entry}: cannot be resolved ({_one_line(error)})") from error
    if not found:
        raise DataError(f"{entry}: no file matches it")
    return [fs.unstrip_protocol(file) for file in found]


def _hub_files(entry: str) -> list[str]:
    name, config, split, *rest = [*entry.removeprefix("hub:").split(":"), "", ""]
    repo, _, revision = name.partition("@")
    split = split or "train"
    if not repo or any(rest):
        raise DataError(f"{entry}: expected hub:<repo>[@<revision>][:<config>[:<split>]]")
    try:
        import datasets

        builder = datasets.load_dataset_builder(repo, config or None, revision=revision or None)
    except Exception as error:  # not found, gated, no network, no `datasets`: as many types as causes
        raise DataError(f"{entry}: cannot be resolved ({_one_line(error)})") from error
    splits = builder.config.data_files or {}
    if split not in splits:
        raise DataError(f"{entry}: unknown split {split!r}, expected one of {', '.join(splits) or 'none'}")
    return sorted(splits[split])


# ------------------------------------------------------------------------------------------------------------------
# From files to texts


def read_texts(source: str | Sequence[str], text_field: str = "text", on_bad_line: str = "error") -> "_Reader":
    """An iterable over the documents of ``source`` in the order of its files, without the blank ones.

    Its ``bad_lines`` counts the lines that were skipped.

    Raises:
        DataError: (also while iterating) a file cannot be found or read, or holds a bad line and ``on_bad_line`` is
            ``"error"``.
    """
    return _Reader(find_files(source), text_field, on_bad_line)


@dataclass
class _Reader:
    """Reads the documents of stream number ``stream`` out of ``streams``."""

    files: list[str]
    text_field: str
    on_bad_line: str
    seed: int | None = None  # of the order of the files; None keeps it
    stream: int = 0
    streams: int = 1
    bad_lines: int = 0

    def __iter__(self) -> Iterator[str]:
        return (text for _, _, text in self.texts(epoch=0))

    def texts(self, epoch: int, file: int = 0, record: int = 0) -> Iterator[tuple[int, int, str]]:
        """Yields the stream's documents of an epoch, from record ``record`` of the ``file``-th file on.

        With each comes the place to go on from after it, as (file, record). Files count in the epoch's order.
        """
        order = list(self.files)
        if self.seed is not None:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        whole = len(order) - len(order) % self.streams
        for place in range(file, len(order)):
            if place < whole and place % self.streams != self.stream:
                continue
            path, count = order[place], 0
            for count, (number, raw) in enumerate(_records(path, self.text_field), 1):
                # Adding the place deals files of one document each, too, to all streams in turn.
                if count <= record or (place >= whole and (place + count) % self.streams != self.stream):
                    continue
                try:
                    text = _text(raw, self.text_field)
                except ValueError as error:
                    self._bad_line(f"{path}, {'row' if path.endswith(_TABLES) else 'line'} {number}: {error}")
                    continue
                if text and not text.isspace():
                    yield place, count, text
            if not count:
                raise DataError(f"{path}: holds no documents")
            record = 0

    def _bad_line(self, problem: str) -> None:
        if self.on_bad_line == "error":
            raise DataError(f"{problem} (on_bad_line='skip' would leave it out)")
        self.bad_lines += 1
        if self.bad_lines.bit_count() == 1:  # the 1st, 2nd, 4th, 8th, …: a log that stays readable
            logger.warning("skipped %s (bad lines so far: %d)", problem, self.bad_lines)


def _records(path: str, text_field: str) -> Iterator[tuple[int, bytes | str | None]]:
    """The number (from 1) and content of each line that is not blank, or of each row of a table."""
    try:
        with _open(path) as file:
            yield from _rows(path, file, text_field) if path.endswith(_TABLES) else _lines(path, file)
    except DataError:
        raise
    except Exception as error:  # each codec and each file system raises errors of its own
        raise DataError(f"{path}: cannot be read ({_one_line(error)})") from error


def _open(path: str):
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def _lines(path: str, file) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(io.BufferedReader(_decompressed(path, file), 1 << 20), 1):
        if not line.isspace():
            yield number, line


def _decompressed(path: str, file):
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if path.endswith(".xz"):
        return lzma.LZMAFile(file)
    if path.endswith(".zst"):
        import pyarrow  # unlike the zstandard package it notices a truncated file, and it comes with datasets

        return pyarrow.input_stream(file, compression="zstd")
    return file


def _rows(path: str, file, text_field: str) -> Iterator[tuple[int, str | None]]:
    import pyarrow
    import pyarrow.parquet

    if path.endswith(".parquet"):
        table = pyarrow.parquet.ParquetFile(file)
        schema, batches = table.schema_arrow, table.iter_batches(1024, columns=[text_field])
    else:
        is_file = file.read(6) == b"ARROW1"  # the file format; `datasets` writes the stream format
        file.seek(0)
        table = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        schema, batches = table.schema, map(table.get_batch, range(table.num_record_batches)) if is_file else table
    if text_field not in schema.names:
        raise DataError(f"{path}: has no column {text_field!r}, its columns are {', '.join(schema.names)}")
    column = schema.field(text_field).type
    if not (pyarrow.types.is_string(column) or pyarrow.types.is_large_string(column)):
        raise DataError(f"{path}: column {text_field!r} is of type {column}, expected strings")
    yield from enumerate((text for batch in batches for text in batch.column(text_field).to_pylist()), 1)


def _text(raw: bytes | str | None, text_field: str) -> str:
    """The text of a line or row; ``ValueError`` says what is wrong with it."""
    if isinstance(raw, bytes):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({_one_line(error)}), expected one object a line") from error
        if not isinstance(raw, dict) or text_field not in raw:
            raise ValueError(f'has no field {text_field!r}, expected an object like {{"{text_field}": "…"}}')
        raw = raw[text_field]
    if not isinstance(raw, str):
        raise ValueError(f"field {text_field!r} is {raw!r:.40}, expected a string")
    try:
        raw.encode()  # json can spell half a surrogate pair, on which tokenizers fail
    except UnicodeEncodeError:
        raise ValueError(f"field {text_field!r} holds half a surrogate pair, expected Unicode text") from None
    return raw


# ------------------------------------------------------------------------------------------------------------------
# From texts to batches


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, without the special tokens that a tokenizer may add."""
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def pad_rows(rows: Sequence[list[int]], length: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """A batch of rows of ids, padded on the right: int64 ``[rows, length]`` each.

    ``input_ids``; ``attention_mask``, 0 on padding; ``labels``, the ids with -100 on padding.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = eos_id(tokenizer)  # any valid id serves: attention_mask and labels tell padding apart
    input_ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    attention_mask = (torch.arange(length) < torch.tensor([[len(row)] for row in rows])).long()
    labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that separates documents.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path!r}: has no eos_token, expected one to end every document with"
        )
    return tokenizer.eos_token_id


@dataclass
class _Place:
    """Where a stream stands; all it takes to go on from there.

    The block being used up begins at record ``record`` of the ``file``-th file of the epoch; it is the
    ``block``-th of the epoch, ``taken`` of its documents and ``offset`` tokens of the next one are used.
    ``documents`` (used up) and ``bad_lines`` (skipped) count over all epochs.
    """

    epoch: int = 0
    file: int = 0
    record: int = 0
    block: int = 0
    taken: int = 0
    offset: int = 0
    documents: int = 0
    bad_lines: int = 0


class TokenBatches:
    """Iterable over batches of tokens, for one rank.

    A batch is a dict of int64 tensors ``[batch_size, sequence_length]``: ``input_ids``; ``attention_mask``, 0 on
    padding; ``labels``, the ids with -100 on padding (not shifted: the model does that). ``</s>``, the tokenizer's
    end-of-sequence token, follows every document.

    - ``packing="pack"``: the documents of a stream, joined, are cut into rows without losing a token; rows cross
      document and epoch ends. Only the last row of the last epoch can be padded.
    - ``packing="pad"``: one document a row, cut to ``sequence_length`` and padded.

    The last batch of a stream can have fewer rows. Ranks may get different numbers of batches when ``epochs`` is
    finite.

    Shuffling permutes the order of the files and, within each block of ``shuffle_block`` consecutive documents of
    a stream, the documents. Both permutations depend on nothing but the seed, the epoch, the stream and the number
    of the block, so that a place in the shuffled stream needs no buffer to be saved.

    Every ``iter()`` starts from the beginning, except the first after ``load_state_dict``.

    Args:
        source: text source(s), see the module.
        tokenizer: any tokenizer with an end-of-sequence token; its automatic special tokens are not used.
        batch_size: rows a batch.
        sequence_length: tokens a row.
        packing: ``"pack"`` or ``"pad"``.
        shuffle_block: documents a block; 0 keeps the order of files and documents.
        seed: of the shuffling.
        epochs: passes over the source; None for no end.
        rank, world_size: this process among those that share the source.
        num_workers: loader processes for this rank; 0 loads in this process. The batches of one worker follow
            those of the next in turn, so their order is fixed but depends on this number.
        on_bad_line: ``"error"`` or ``"skip"`` (counted in ``bad_lines`` and logged).
        text_field: name of the field that holds the text.

    Attributes:
        files: the files or URLs read, in order.

    Raises:
        ValueError: an argument has a value that is not accepted.
        DataError: (also while iterating) a file cannot be found or read, or the source has no documents.
    """

    def __init__(
        self,
        source: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        sequence_length: int,
        packing: str = "pack",
        shuffle_block: int = 0,
        seed: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        on_bad_line: str = "error",
        text_field: str = "text",
    ):
        _check_choice("packing", packing, PACKINGS)
        _check_choice("on_bad_line", on_bad_line, ON_BAD_LINE)
        _check_int("batch_size", batch_size, 1)
        _check_int("sequence_length", sequence_length, 2)
        _check_int("shuffle_block", shuffle_block, 0)
        _check_int("num_workers", num_workers, 0)
        _check_int("world_size", world_size, 1)
        if epochs is not None:
            _check_int("epochs", epochs, 1)
        if rank not in range(world_size):
            raise ValueError(f"rank={rank!r}: expected 0 to {world_size - 1} (world_size={world_size})")
        self.eos_id = eos_id(tokenizer)
        self.source = source
        self.files = find_files(source)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.packing = packing
        self.shuffle_block = shuffle_block
        self.seed = seed
        self.epochs = epochs
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.on_bad_line = on_bad_line
        self.text_field = text_field
        self._workers = max(1, num_workers)
        self._resume = False
        self._start()

    def _start(self) -> None:
        self._places = [asdict(_Place()) for _ in range(self._workers)]
        self._next_worker = 0

    @property
    def epoch(self) -> int:
        """Passes that all of this rank's workers have finished, as of the latest batch."""
        return min(place["epoch"] for place in self._places)

    @property
    def documents(self) -> int:
        """Documents this rank has used up over all epochs, as of the latest batch."""
        return sum(place["documents"] for place in self._places)

    @property
    def bad_lines(self) -> int:
        """Bad lines this rank has skipped over all epochs, as of the latest batch."""
        return sum(place["bad_lines"] for place in self._places)

    def state_dict(self) -> dict:
        """The place after the latest batch that was handed out, as plain json. Every rank has its own."""
        return {
            "settings": self._settings(),
            "next_worker": self._next_worker,
            "workers": [dict(place) for place in self._places],
        }

    def load_state_dict(self, state: dict) -> None:
        """Makes the next ``iter()`` go on exactly where ``state`` was taken; the batch size may change.

        Raises:
            ValueError: the state belongs to other files, shuffling, ranks or workers, or is no such state.
        """
        expected = self._settings()
        try:
            settings = {key: state["settings"][key] for key in expected}
            places = [asdict(_Place(**place)) for place in state["workers"]]
            next_worker = int(state["next_worker"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"data state: not one that TokenBatches wrote ({_one_line(error)})") from error
        for key, value in expected.items():
            if settings[key] != value:
                raise ValueError(f"data state: was saved with {key}={settings[key]!r}, expected {value!r} to resume")
        self._places, self._next_worker = places, next_worker
        self._resume = True

    def _settings(self) -> dict:
        # Names without folders and revisions: data may move between a run's two halves, but not change.
        names = "\n".join(os.path.basename(file) for file in self.files)
        return {
            "files": f"{len(self.files)} ({hashlib.sha256(names.encode()).hexdigest()[:12]})",
            "packing": self.packing,
            "shuffle_block": self.shuffle_block,
            "seed": self.seed,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_workers": self.num_workers,
        }

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if not self._resume:
            self._start()
        self._resume = False
        for worker, batch, place in self._loaded():
            if isinstance(place, DataError):
                raise place
            self._places[worker] = place
            self._next_worker = (worker + 1) % self._workers
            if batch is not None:
                yield batch
        if self.world_size == 1 and not self.documents:
            raise DataError(f"{self.source}: holds no documents")

    def _loaded(self) -> Iterable[tuple]:
        streams = _Streams(self, [dict(place) for place in self._places], self._next_worker)
        if not self.num_workers:
            return streams
        return DataLoader(
            streams,
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # else it draws from the global one, and loading would change training
        )

    def _stream(self, worker: int, place: _Place) -> Iterator[tuple[dict[str, torch.Tensor] | None, dict]]:
        """The batches of one worker, each with the place after it; last a None with the final place."""
        rows, row = [], []
        for ids in self._documents(worker, place):
            begin = place.offset
            while begin < len(ids):
                end = min(begin + self.sequence_length - len(row), len(ids))
                row += ids[begin:end]
                begin = place.offset = end
                if end == len(ids):
                    place.taken, place.offset, place.documents = place.taken + 1, 0, place.documents + 1
                if len(row) == self.sequence_length or self.packing == "pad":
                    rows.append(row)
                    row = []
                if len(rows) == self.batch_size:
                    yield pad_rows(rows, self.sequence_length, self.tokenizer), asdict(place)
                    rows = []
        if row:
            rows.append(row)
        yield pad_rows(rows, self.sequence_length, self.tokenizer) if rows else None, asdict(place)

    def _documents(self, worker: int, place: _Place) -> Iterator[list[int]]:
        """The ids of each document of a worker's stream, ``</s>`` included; moves ``place`` along.

        The consumer counts ``place.taken`` and ``place.offset``; the rest of ``place`` stays at the beginning of
        the current block, from where a resumed stream reads again.
        """
        stream, streams = self.rank * self._workers + worker, self.world_size * self._workers
        shuffle = self.shuffle_block > 0
        reader = _Reader(self.files, self.text_field, self.on_bad_line, self.seed if shuffle else None, stream, streams)
        reader.bad_lines = place.bad_lines
        counted = place.taken > 0 or place.offset > 0  # the bad lines of the block to be read again
        while self.epochs is None or place.epoch < self.epochs:
            texts = reader.texts(place.epoch, place.file, place.record)
            while block := list(itertools.islice(texts, self.shuffle_block or TOKENIZE_AT_ONCE)):
                if counted:
                    reader.bad_lines, counted = place.bad_lines, False
                place.bad_lines = reader.bad_lines
                file, record, _ = block[-1]
                if shuffle:
                    random.Random(f"{self.seed}/{place.epoch}/{stream}/{place.block}").shuffle(block)
                for start in range(place.taken, len(block), TOKENIZE_AT_ONCE):
                    yield from self._tokenize([text for _, _, text in block[start : start + TOKENIZE_AT_ONCE]])
                place.file, place.record, place.block, place.taken = file, record, place.block + 1, 0
            place.bad_lines = reader.bad_lines
            if not place.block and self.epochs is None:
                raise DataError(
                    f"{self.source}: no document for stream {stream} of {streams} in a whole pass, "
                    "expected more documents or fewer processes and loader workers"
                )
            place.epoch, place.file, place.record, place.block = place.epoch + 1, 0, 0, 0

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids = tokenize(texts, self.tokenizer)
        if self.packing == "pack":
            return [[*document, self.eos_id] for document in ids]
        return [[*document[: self.sequence_length - 1], self.eos_id] for document in ids]


class _Streams(IterableDataset):
    """The streams of one rank for a DataLoader, whose workers it lets take turns from ``first`` on."""

    def __init__(self, batches: TokenBatches, places: list[dict], first: int):
        self.batches, self.places, self.first = batches, places, first

    def __iter__(self) -> Iterator[tuple[int, dict[str, torch.Tensor] | None, dict | DataError]]:
        info = get_worker_info()
        if info:  # one core a worker: DataLoader stops torch's threads in it, this the tokenizer's
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        worker = (self.first + (info.id if info else 0)) % len(self.places)
        try:
            for batch, place in self.batches._stream(worker, _Place(**self.places[worker])):
                yield worker, batch, place
        except DataError as error:  # as an item: a DataLoader turns a raised one into a page of traceback
            yield worker, None, error


def _check_source(name: str, source) -> None:
    entries = [source] if isinstance(source, str) else source
    if not isinstance(entries, Sequence) or not entries or not all(isinstance(x, str) and x for x in entries):
        raise ValueError(f"{name}={source!r}: expected a text source or a list of them")


def _check_choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}")


def _check_int(name: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
