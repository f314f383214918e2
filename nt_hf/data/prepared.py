"""Reads training rows from prepared tokens; the module ``prepare`` writes them.

A directory of prepared tokens holds one shard for each file of the source and, once all are complete, ``index.json``.
A shard is a safetensors file with ``tokens``: 1-D, uint16, or uint32 where a tokenizer has ids above 65,535; the
documents in the order of the file, ``</s>`` after each.

Training rows are ``sequence_length`` tokens each, cut from all shards joined in the order of the index. Their order
within an epoch is a keyed bijection on row numbers, so a position in it is one integer for all ranks together.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from ..checks import one_line
from .errors import DataError
from .sources import INDEX, PREPARED
from .streams import BatchOptions, TokenBatches, require_same
from .tokenizers import eos_id, tokenize

FORMAT_VERSION = 1
_PROBE = "The  Quick brown FOX, 3.14 x 10\u2076;\n\tna\u00efve \ufb01anc\u00e9e \u6f22\u5b57 \U0001f600 don't\u2026 <b>"


@dataclass
class Shard:
    """One shard, as the index lists it.

    ``file`` is its name in the directory, ``source`` the file or URL of text; ``text_bytes`` counts that text in
    UTF-8 and ``bad_lines`` what was left out of it.
    """

    file: str
    source: str
    tokens: int
    documents: int
    text_bytes: int
    bad_lines: int


def token_batches(
    source: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, **options
) -> "TokenBatches | PreparedTokens":
    """The batches of a source: [`PreparedTokens`] for ``prepared:<directory>``, [`TokenBatches`] for text.

    Args:
        source: text source(s), or ``prepared:<directory>``, one and by itself.
        tokenizer: of the text; prepared tokens must have been made by the same.
        options: those of ``TokenBatches``. Prepared tokens take ``shuffle_block`` as yes or no and have no use for
            ``num_workers``, ``on_bad_line`` and ``text_field``.

    Raises:
        DataError: the source cannot be found or read.
        ValueError: an option has a value that is not accepted.
    """
    entries = [source] if isinstance(source, str) else list(source)
    if not any(isinstance(entry, str) and entry.startswith(PREPARED) for entry in entries):
        return TokenBatches(source, tokenizer, **options)
    if len(entries) > 1:
        raise DataError(f"{', '.join(entries)}: accepted are prepared tokens by themselves, or text only")
    packing = options.pop("packing", "pack")
    if packing != "pack":
        raise ValueError(
            f"packing={packing!r}: accepted is 'pack' for {entries[0]}, whose documents are joined already"
        )
    for name in ("num_workers", "on_bad_line", "text_field"):
        options.pop(name, None)
    shuffle = options.pop("shuffle_block", 0) > 0
    return PreparedTokens(entries[0].removeprefix(PREPARED), tokenizer, shuffle=shuffle, **options)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer does: its vocabulary, its ``</s>``, and the ids of a text with all its pieces.

    Not of its files, which differ between versions of the libraries.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    probe = [_PROBE, " ".join(piece for piece, _ in vocabulary)]
    content = json.dumps([vocabulary, eos_id(tokenizer), tokenize(probe, tokenizer)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_index(directory: str | Path) -> dict[str, Any]:
    """The content of a directory's index.

    Raises:
        DataError: there is none, or it is damaged or of another version of the format.
    """
    path = Path(directory) / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
        if version == FORMAT_VERSION:
            shards = [Shard(**shard) for shard in index["shards"]]
            if not all(isinstance(shard.tokens, int) for shard in shards) or not isinstance(index["tokenizer"], str):
                raise ValueError("fields of another type")
    except FileNotFoundError as error:
        raise DataError(
            f"{PREPARED}{directory}: has no {INDEX}; accepted is a directory that nt-hf prepare has completed"
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is no index of prepared tokens, or damaged ({one_line(error)})") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format_version={version!r}; accepted is {FORMAT_VERSION}")
    return index


def shuffled(positions: np.ndarray, count: int, key: str) -> np.ndarray:
    """Where a permutation of ``range(count)`` that depends on ``key`` takes ``positions``; no table of it is made.

    A Feistel network on pairs of digits to the base ``ceil(sqrt(count))``, which permutes a range that is a little
    larger; what falls beyond ``count`` is sent through again until it does not. Integers only: the same everywhere.

    Args:
        positions: int64 ``[n]``, 0 to ``count - 1``.
        count: at least 1, below 2**62.
        key: any text.

    Returns:
        int64 ``[n]``.
    """
    side = np.uint64(math.isqrt(count - 1) + 1)
    keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), "<u8")  # eight rounds

    def permute(values: np.ndarray) -> np.ndarray:
        left, right = values // side, values % side
        for round_key in keys:
            left, right = right, (left + _mixed(right ^ round_key) % side) % side
        return left * side + right

    values = permute(positions.astype(np.uint64))
    while len(out_of_range := np.flatnonzero(values >= count)):
        values[out_of_range] = permute(values[out_of_range])
    return values.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of a value moves every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(eq=False, repr=False)
class PreparedTokens(BatchOptions):
    """Iterable over batches of prepared tokens, for one rank; the counterpart of ``TokenBatches``.

    A batch is a dict of int64 tensors ``[batch_size, sequence_length]``: ``input_ids``, ``attention_mask`` (all 1)
    and ``labels`` (the ids). Rows cross documents and shards; tokens at the end of the last shard that do not fill a
    row are left out of every epoch.

    The order of the rows belongs to the run, not to its ranks. With ``world_size`` ranks, the ``k``-th batch of
    ``rank`` has the rows number ``(k * world_size + rank) * batch_size`` and following of that order. So the rows of
    an optimizer step are the same for any number of ranks and of batches it takes them in, and the place in the
    order is one number. Batches cross the ends of epochs; with ``epochs``, the last ones can be shorter and some
    ranks can have one fewer.

    Every ``iter()`` starts from the beginning, except the first after ``load_state_dict``.

    Args:
        directory: of the tokens, with its index.
        tokenizer: the one they were made by.
        shuffle: whether to permute all rows, in each epoch anew.
        further ones: those of ``BatchOptions``.

    Attributes:
        rows: number of rows of an epoch.
        bad_lines: 0; the index counts those that preparing left out.

    Raises:
        ValueError: an argument has a value that is not accepted.
        DataError: the index or a shard is missing, damaged or does not fit to the others, the tokens were made by
            another tokenizer, or there are too few for a row.
    """

    bad_lines = 0

    directory: str | Path
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    shuffle: bool = False

    def __post_init__(self):
        super().__post_init__()
        directory = Path(self.directory)
        index = read_index(directory)
        fingerprint = tokenizer_fingerprint(self.tokenizer)
        if index["tokenizer"] != fingerprint:
            raise DataError(
                f"{PREPARED}{directory}: was prepared by another tokenizer ({index['tokenizer']}); "
                f"accepted is {self.tokenizer.name_or_path!r} ({fingerprint})"
            )
        shards = [Shard(**shard) for shard in index["shards"]]
        slices = [_open_shard(directory / shard.file, shard) for shard in shards]
        # Of the shards with tokens: a file can have had blank documents only.
        self._slices = [tokens for tokens, shard in zip(slices, shards) if shard.tokens]
        self._ends = np.cumsum([shard.tokens for shard in shards if shard.tokens])
        tokens = sum(shard.tokens for shard in shards)
        self.rows = tokens // self.sequence_length
        if not self.rows:
            raise DataError(
                f"{PREPARED}{directory}: holds {tokens} tokens, too few for a row "
                f"(sequence_length={self.sequence_length})"
            )
        table = json.dumps([[shard.file, shard.tokens] for shard in shards])
        self._settings = {
            "tokens": f"{tokens} ({hashlib.sha256(table.encode()).hexdigest()[:12]})",
            "tokenizer": fingerprint,
            "sequence_length": self.sequence_length,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }
        self._used = 0  # rows, by all ranks
        self._resume = False

    @property
    def epoch(self) -> int:
        """Passes that all ranks together have finished, as of the latest batch of each."""
        return self._used // self.rows

    def state_dict(self) -> dict:
        """The place after the latest batch that was handed out, as plain json; the same on every rank."""
        return {"settings": dict(self._settings), "rows": self._used}

    def load_state_dict(self, states: Sequence[dict]) -> None:
        """Makes the next ``iter()`` go on where ``states`` were taken: those of all ranks of that run.

        The number of ranks and the batch size may change, the order of the rows stays.

        Raises:
            ValueError: the states belong to other tokens or another order, or are no such states.
        """
        try:
            settings = [dict(state["settings"]) for state in states]
            used = {state["rows"] for state in states}
            if not all(isinstance(rows, int) and rows >= 0 for rows in used) or not used:
                raise ValueError(f"rows={sorted(map(str, used))}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"data state: not one that PreparedTokens wrote ({one_line(error)})") from error
        for saved in settings:
            require_same(saved, self._settings)
        if len(used) > 1:
            raise ValueError(f"data state: of ranks after {sorted(used)} rows; accepted are all after as many")
        (self._used,) = used
        self._resume = True

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        start = self._used if self._resume else 0
        self._used, self._resume = start, False
        end = None if self.epochs is None else self.epochs * self.rows
        for turn in itertools.count():
            begin = start + (turn * self.world_size + self.rank) * self.batch_size
            after = begin + self.batch_size if end is None else min(begin + self.batch_size, end)
            if after <= begin:
                self._used = max(start, end)
                return
            self._used = start + (turn + 1) * self.world_size * self.batch_size
            if end is not None:
                self._used = min(self._used, end)
            yield self._batch(np.arange(begin, after))

    def _batch(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
        epochs, numbers = positions // self.rows, positions % self.rows
        if self.shuffle:
            for epoch in np.unique(epochs):
                in_epoch = epochs == epoch
                numbers[in_epoch] = shuffled(numbers[in_epoch], self.rows, f"{self.seed}/{epoch}")
        input_ids = torch.empty(len(numbers), self.sequence_length, dtype=torch.int64)
        for row, number in zip(input_ids.numpy(), numbers.tolist()):
            self._read(row, number * self.sequence_length)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}

    def _read(self, row: np.ndarray, token: int) -> None:
        """Fills ``row`` with the tokens from number ``token`` on, out of as many shards as they lie in."""
        shard, filled = int(np.searchsorted(self._ends, token, side="right")), 0
        while filled < len(row):
            start, end = (int(self._ends[shard - 1]) if shard else 0), int(self._ends[shard])
            begin = token + filled
            stop = min(token + len(row), end)
            row[filled : filled + stop - begin] = self._slices[shard][begin - start : stop - start]
            filled, shard = filled + stop - begin, shard + 1


def _open_shard(path: Path, shard: Shard):
    """The tokens of a shard, to be sliced: mapped into memory, which keeps no file open."""
    if not path.exists():
        raise DataError(f"{path}: is missing, {INDEX} lists it")
    try:
        tokens = safe_open(path, framework="numpy").get_slice("tokens")
        shape = tokens.get_shape()
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
    if shape != [shard.tokens]:
        raise DataError(f"{path}: holds tokens of shape {shape}, {INDEX} says [{shard.tokens}]")
    return tokens
