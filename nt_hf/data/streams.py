"""From documents to token batches: rows, and the streams that read them, exact to resume.

The module ``sources`` says what a source of text is and how it becomes files. Each pass over the files (an *epoch*)
is divided between *streams*, one for each loader worker of each rank, see the module ``slices``: whole files as long
as every stream gets as many, the documents of the files that remain one after the other. So each document is used
once an epoch, by exactly one stream. A stream's place is a few integers, which makes stopping and resuming exact,
and what all streams have left can be dealt again to another number of them.
"""

import hashlib
import itertools
import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ..checks import Rule, check, check_fields, integer, one_line, optional, setting
from ..models.losses import IGNORE_INDEX
from .config import RULES
from .errors import DataError
from .slices import StreamState, deal_epoch, redistribute
from .sources import Reader, find_files
from .tokenizers import eos_id, tokenize

TOKENIZE_AT_ONCE = 128  # documents; enough to occupy a fast tokenizer's threads, few enough to start quickly


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


@dataclass(kw_only=True, eq=False, repr=False)
class BatchOptions:
    """How rows make batches, and how these are divided among ranks.

    Args:
        batch_size: rows a batch.
        sequence_length: tokens a row.
        seed: of the shuffling.
        epochs: passes over the source; None for no end.
        rank, world_size: this process among those that share the source.

    Raises:
        ValueError: an argument has a value that is not accepted.
    """

    batch_size: int = setting(MISSING, integer(1))
    sequence_length: int = setting(MISSING, RULES["sequence_length"])
    seed: int = 0
    epochs: int | None = setting(None, optional(integer(1)))
    rank: int = 0
    world_size: int = setting(1, integer(1))

    def __post_init__(self):
        check_fields(self)
        ranks = f"0 to {self.world_size - 1} (world_size={self.world_size})"
        check("rank", self.rank, Rule(lambda rank: rank in range(self.world_size), ranks))


def require_same(saved: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    """Raises ValueError unless the settings of a saved position in the data are the accepted ones."""
    for key, value in accepted.items():
        if saved.get(key) != value:
            raise ValueError(f"data state: was saved with {key}={saved.get(key)!r}; accepted is {value!r} to resume")


@dataclass(eq=False, repr=False)
class TokenBatches(BatchOptions):
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
    a share, the documents. Both permutations depend on nothing but the seed, the epoch and the block's place in the
    files, so that a place in the shuffled stream needs no buffer to be saved and any stream can finish a block.

    Every ``iter()`` starts from the beginning, except the first after ``load_state_dict``.

    Args:
        source: text source(s), see the module.
        tokenizer: any tokenizer with an end-of-sequence token; its automatic special tokens are not used.
        packing: ``"pack"`` or ``"pad"``.
        shuffle_block: documents a block; 0 keeps the order of files and documents.
        num_workers: loader processes for this rank; 0 loads in this process. The batches of one worker follow
            those of the next in turn, so their order is fixed but depends on this number.
        on_bad_line: ``"error"`` or ``"skip"`` (counted in ``bad_lines`` and logged).
        text_field: name of the field that holds the text.
        further ones: those of [`BatchOptions`].

    Attributes:
        files: the files or URLs read, in order.

    Raises:
        ValueError: an argument has a value that is not accepted.
        DataError: (also while iterating) a file cannot be found or read, or the source has no documents.
    """

    source: str | Sequence[str]
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    packing: str = setting("pack", RULES["packing"])
    shuffle_block: int = setting(0, RULES["shuffle_block"])
    num_workers: int = setting(0, RULES["num_workers"])
    on_bad_line: str = setting("error", RULES["on_bad_line"])
    text_field: str = "text"

    def __post_init__(self):
        super().__post_init__()
        self.eos_id = eos_id(self.tokenizer)
        self.files = find_files(self.source)
        self._workers = max(1, self.num_workers)
        self._resume = False
        self._start()

    def _start(self) -> None:
        self._states = [StreamState() for _ in range(self._workers)]
        self._next_worker = 0

    @property
    def epoch(self) -> int:
        """Passes that all of this rank's workers have finished, as of the latest batch."""
        return min(state.epochs_done for state in self._states)

    @property
    def documents(self) -> int:
        """Documents this rank has used up over all epochs, as of the latest batch."""
        return sum(state.documents for state in self._states)

    @property
    def bad_lines(self) -> int:
        """Bad lines this rank has skipped over all epochs, as of the latest batch."""
        return sum(state.bad_lines for state in self._states)

    def state_dict(self) -> dict:
        """The place after the latest batch that was handed out, as plain json. Every rank has its own."""
        return {
            "settings": self._settings(),
            "rank": self.rank,
            "next_worker": self._next_worker,
            "workers": [state.to_json() for state in self._states],
        }

    def load_state_dict(self, states: Sequence[dict]) -> None:
        """Makes the next ``iter()`` go on where ``states`` were taken: those of all ranks of that run, in their order.

        With as many ranks and workers as then, each goes on exactly where it was. With others, what was left of the
        epochs that had been begun is dealt again: every document, and with ``packing="pack"`` every token, is used as
        often as without the change. ``documents`` and ``bad_lines`` keep their sums over all ranks. The batch size
        may change as well.

        Raises:
            ValueError: the states belong to other files, packing, shuffling or seed, are not those of all ranks, or
                are no such states.
        """
        try:
            settings = [dict(state["settings"]) for state in states]
            ranks = [state["rank"] for state in states]
            streams = [[StreamState.from_json(worker) for worker in state["workers"]] for state in states]
            next_workers = [int(state["next_worker"]) for state in states]
            world_size, workers = settings[0]["world_size"], max(1, settings[0]["num_workers"])
            if any(len(rank_states) != workers for rank_states in streams):
                raise ValueError(f"accepted are {workers} worker(s) per rank")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"data state: not one that TokenBatches wrote ({one_line(error)})") from error
        if ranks != list(range(world_size)):
            raise ValueError(
                f"data state: of ranks {', '.join(map(str, ranks))}; "
                f"accepted are those of all {world_size} in their order"
            )
        # A run may differ in how many share the work.
        accepted = self._settings() | {key: settings[0].get(key) for key in ("world_size", "num_workers")}
        for saved in settings:
            require_same(saved, accepted)
        if (world_size, workers) == (self.world_size, self._workers):
            self._states, self._next_worker = streams[self.rank], next_workers[self.rank]
        else:
            # A stream's number is its rank's times the workers plus its worker's, as in `_documents`.
            dealt = redistribute(list(itertools.chain(*streams)), len(self.files), self.world_size * self._workers)
            self._states = dealt[self.rank * self._workers : (self.rank + 1) * self._workers]
            self._next_worker = 0
        self._resume = True

    def _settings(self) -> dict:
        # Names without folders and revisions: data may move between a run's two halves, but not change.
        names = "\n".join(os.path.basename(file) for file in self.files)
        return {
            "files": f"{len(self.files)} ({hashlib.sha256(names.encode()).hexdigest()[:12]})",
            "packing": self.packing,
            "shuffle_block": self.shuffle_block,
            "seed": self.seed,
            "world_size": self.world_size,
            "num_workers": self.num_workers,
        }

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if not self._resume:
            self._start()
        self._resume = False
        for worker, batch, state in self._loaded():
            if isinstance(state, DataError):
                raise state
            self._states[worker] = state
            self._next_worker = (worker + 1) % self._workers
            if batch is not None:
                yield batch
        if self.world_size == 1 and not self.documents:
            raise DataError(f"{self.source}: holds no documents")

    def _loaded(self) -> Iterable[tuple]:
        streams = _Streams(self, [replace(state) for state in self._states], self._next_worker)
        if not self.num_workers:
            return streams
        return DataLoader(
            streams,
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # else it draws from the global one, and loading would change training
        )

    def _stream(self, worker: int, state: StreamState) -> Iterator[tuple[dict[str, torch.Tensor] | None, StreamState]]:
        """The batches of one worker, each with the state after it; last a None with the final state."""
        rows, row = [], []
        for ids in self._documents(worker, state):
            begin = state.offset
            while begin < len(ids):
                end = min(begin + self.sequence_length - len(row), len(ids))
                row += ids[begin:end]
                begin = state.offset = end
                if end == len(ids):
                    state.taken, state.offset, state.documents = state.taken + 1, 0, state.documents + 1
                if len(row) == self.sequence_length or self.packing == "pad":
                    rows.append(row)
                    row = []
                if len(rows) == self.batch_size:
                    yield pad_rows(rows, self.sequence_length, self.tokenizer), replace(state)
                    rows = []
        if row:
            rows.append(row)
        yield pad_rows(rows, self.sequence_length, self.tokenizer) if rows else None, replace(state)

    def _documents(self, worker: int, state: StreamState) -> Iterator[list[int]]:
        """The ids of each document of a worker's stream, ``</s>`` included; moves ``state`` along.

        The consumer counts ``state.taken`` and ``state.offset``; the rest of ``state`` stays at the beginning of
        the current block, from where a resumed stream reads again.
        """
        stream, streams = self.rank * self._workers + worker, self.world_size * self._workers
        shuffle = self.shuffle_block > 0
        size = self.shuffle_block or TOKENIZE_AT_ONCE
        reader = Reader(self.files, self.text_field, self.on_bad_line, self.seed if shuffle else None)
        reader.bad_lines = state.bad_lines
        while self.epochs is None or state.epoch < self.epochs:
            any_document = state.begun  # what was read of this epoch before a resume is not known here
            slices = state.slices
            if slices is None:
                slices = deal_epoch(state.epoch, len(self.files), stream, streams)
            while state.index < len(slices):
                file_slice = slices[state.index]
                if not (state.record or state.taken or state.offset):
                    state.taken, state.offset = file_slice.taken, file_slice.offset
                # A resumed block is read a second time, and its bad lines have been counted already.
                counted = state.taken > 0 or state.offset > 0
                # Reading starts after the last block that was used up, of this slice or of the one it was dealt from.
                start = max(state.record, file_slice.record)
                texts = reader.texts(file_slice._replace(record=start))
                while block := list(itertools.islice(texts, size)):
                    if counted:
                        reader.bad_lines, counted = state.bad_lines, False
                    state.bad_lines = reader.bad_lines
                    # A short block is the last one: the slice was read to its end, bad lines there included.
                    record = block[-1][0]
                    state.record, state.end = start, record if len(block) == size else file_slice.end
                    if shuffle:
                        key = "/".join(map(str, (self.seed, *file_slice[:4], start)))  # epoch, file, first, step
                        random.Random(key).shuffle(block)
                    # The shuffled block is the same as before a resume, so the documents in front were used already.
                    for begin in range(state.taken, len(block), TOKENIZE_AT_ONCE):
                        yield from self._tokenize([text for _, text in block[begin : begin + TOKENIZE_AT_ONCE]])
                    state.record, state.taken = record, 0
                    start, any_document = record, True
                state.bad_lines = reader.bad_lines
                state.index, state.record, state.taken, state.offset = state.index + 1, 0, 0, 0
            if not any_document and self.epochs is None:
                raise DataError(
                    f"{self.source}: no document for stream {stream} of {streams} in a whole pass; "
                    "accepted are more documents or fewer processes and loader workers"
                )
            state.next_epoch()

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        ids = tokenize(texts, self.tokenizer)
        if self.packing == "pack":
            return [[*document, self.eos_id] for document in ids]
        return [[*document[: self.sequence_length - 1], self.eos_id] for document in ids]


class HeadBatches:
    """Iterable over a batch for each head, from a stream of each head's own.

    As [`TokenBatches`] and ``PreparedTokens``, with tensors ``[heads, batch_size, sequence_length]``. Streams that
    differ in their seed alone show every head the same rows in an epoch, each in another order.

    Args:
        streams: one for each head.
    """

    def __init__(self, streams: Sequence[TokenBatches]):
        self.streams = list(streams)

    @property
    def epoch(self) -> int:
        """Passes that every head has finished."""
        return min(stream.epoch for stream in self.streams)

    @property
    def bad_lines(self) -> int:
        """Bad lines skipped by the head that has skipped most: all heads meet the same ones."""
        return max(stream.bad_lines for stream in self.streams)

    def state_dict(self) -> dict:
        """The places of all heads, as plain json."""
        return {"heads": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, states: Sequence[dict]) -> None:
        """As of the streams.

        Raises:
            ValueError: the states are not of as many heads, or a stream refuses its own.
        """
        heads = len(self.streams)
        if not all(isinstance(state.get("heads"), list) and len(state["heads"]) == heads for state in states):
            raise ValueError(f"data state: not that of {heads} heads with an order of their own each")
        for head, stream in enumerate(self.streams):
            stream.load_state_dict([state["heads"][head] for state in states])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batches in zip(*self.streams):
            yield {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}


class _Streams(IterableDataset):
    """The streams of one rank for a DataLoader, whose workers it lets take turns from ``first`` on."""

    def __init__(self, batches: TokenBatches, states: list[StreamState], first: int):
        self.batches, self.states, self.first = batches, states, first

    def __iter__(self) -> Iterator[tuple[int, dict[str, torch.Tensor] | None, StreamState | DataError]]:
        info = get_worker_info()
        if info:  # one core a worker: DataLoader stops torch's threads in it, this the tokenizer's
            # Whatever the user set: where workers are forked, the tokenizer's threads are not, and it waits for them.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        worker = (self.first + (info.id if info else 0)) % len(self.states)
        try:
            for batch, state in self.batches._stream(worker, self.states[worker]):
                yield worker, batch, state
        except DataError as error:  # as an item: a DataLoader turns a raised one into a page of traceback
            yield worker, None, error


def _leave_signals_to_parent(_: int) -> None:
    """Lets a loader worker live on when a launcher or ``timeout`` sends a signal to all processes of a run.

    The main process needs batches until it has saved, and ends its workers itself, by SIGTERM as well.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
