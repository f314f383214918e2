"""Who reads which documents: an epoch as slices of files, dealt to streams, and dealt again to another number of them.

A *stream* is what one loader worker of one rank reads; streams are numbered over all ranks. Everything here is
integers: no file is opened.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class FileSlice(NamedTuple):
    """Documents of a file that one stream reads in order, within one epoch.

    These are the documents of the ``file``-th file in the epoch's order whose count, from 1, is ``first`` modulo
    ``step``, after the ``record``-th and up to the ``end``-th (None: to the file's end). A slice with ``taken`` or
    ``offset`` is a shuffled block that another stream has begun, see ``StreamState``; it is never split.
    """

    epoch: int
    file: int
    first: int = 0
    step: int = 1
    record: int = 0
    end: int | None = None
    taken: int = 0
    offset: int = 0

    @property
    def begun(self) -> bool:
        return self.taken > 0 or self.offset > 0


@dataclass
class StreamState:
    """How far a stream has read; all it takes to continue from there.

    The block that is being used is of the slice number ``index`` of the stream's slices, after record ``record`` (0:
    the slice's beginning) and up to ``end`` (None: the file's end); ``taken`` of its documents and ``offset`` tokens of
    the next one are used. ``slices`` are what was dealt again; None for a whole epoch, which follows from the numbers
    of files and streams. After them comes epoch ``epoch + 1``, whole. ``documents`` (used up) and ``bad_lines``
    (skipped) count over all epochs.
    """

    epoch: int = 0
    slices: list[FileSlice] | None = None
    index: int = 0
    record: int = 0
    end: int | None = None
    taken: int = 0
    offset: int = 0
    documents: int = 0
    bad_lines: int = 0

    @property
    def begun(self) -> bool:
        """Whether anything of ``epoch`` was used, by this stream or by those that its slices were dealt from."""
        return self.slices is not None or any((self.index, self.record, self.taken, self.offset))

    @property
    def epochs_done(self) -> int:
        """Epochs of which nothing is left for this stream."""
        if self.slices is None:
            return self.epoch
        return min((file_slice.epoch for file_slice in self.slices[self.index :]), default=self.epoch + 1)

    def next_epoch(self) -> None:
        self.epoch, self.slices, self.index = self.epoch + 1, None, 0

    def to_json(self) -> dict:
        """A few integers, and after dealing again the list of the remaining slices."""
        state = {_KEYS.get(name, name): value for name, value in vars(self).items() if name != "slices"}
        if self.slices is not None:
            state |= {"share": 0, "shares": [list(file_slice) for file_slice in self.slices[self.index :]]}
        return state

    @classmethod
    def from_json(cls, content: dict) -> "StreamState":
        """The state that [`to_json`] described; TypeError, ValueError or AttributeError for anything else."""
        names = {key: name for name, key in _KEYS.items()}
        state = cls(**{names.get(key, key): value for key, value in content.items()})
        if state.slices is not None:
            state.slices = [FileSlice(*values) for values in state.slices]
        counts = [value for name, value in vars(state).items() if name != "slices"]
        for value in itertools.chain(counts, *(state.slices or [])):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{value!r} is not a count")
        return state


# The names of these fields in the state that a checkpoint holds.
_KEYS = {"slices": "shares", "index": "share"}


def deal(slices: Sequence[FileSlice], stream: int, streams: int) -> list[FileSlice]:
    """What one of ``streams`` gets of ``slices``: entire ones in turn as long as every stream gets as many.

    Each of the remaining ones is split between all streams, document by document. Splitting begins at another stream
    for each one, so that files of one document each go to all streams in turn, too.
    """
    entire = len(slices) - len(slices) % streams
    dealt = list(slices[stream:entire:streams])
    for number in range(entire, len(slices)):
        file_slice = slices[number]
        first = file_slice.first + file_slice.step * ((stream - number) % streams)
        dealt.append(file_slice._replace(first=first, step=file_slice.step * streams))
    return dealt


def deal_epoch(epoch: int, files: int, stream: int, streams: int) -> list[FileSlice]:
    """What a stream gets of a whole epoch."""
    return deal([FileSlice(epoch, file) for file in range(files)], stream, streams)


def redistribute(states: Sequence[StreamState], files: int, streams: int) -> list[StreamState]:
    """The states of ``streams`` streams that together do exactly what those of ``states`` have left to do.

    That is what remains of every epoch that any of them has begun. Begun blocks go to the new streams in turn, as they
    are; what has not been begun is dealt like an epoch. The epochs after that are dealt as usual.
    """
    last = max(state.epoch if state.begun else state.epoch - 1 for state in states)
    remaining = [
        file_slice for i, state in enumerate(states) for file_slice in _remaining(state, i, len(states), files, last)
    ]
    # Oldest first; slices in progress, which are shorter, before entire ones, so that each stream gets some of both.
    remaining.sort(key=lambda s: (s.epoch, s.record == 0, s.file, s.step, s.first, s.record))
    blocks = [file_slice for file_slice in remaining if file_slice.begun]
    unread = [file_slice for file_slice in remaining if not file_slice.begun]
    new = []
    for stream in range(streams):
        slices = blocks[stream::streams] + deal(unread, stream, streams)
        state = StreamState(
            epoch=last,
            slices=sorted(slices, key=lambda file_slice: file_slice.epoch),
            documents=sum(old.documents for old in states[stream::streams]),
            bad_lines=sum(old.bad_lines for old in states[stream::streams]),
        )
        if not slices:
            state.next_epoch()
        new.append(state)
    return new


def _remaining(state: StreamState, stream: int, streams: int, files: int, last: int) -> Iterator[FileSlice]:
    """What a stream has not used of the epochs up to ``last``."""
    if state.epoch > last:
        return
    slices = deal_epoch(state.epoch, files, stream, streams) if state.slices is None else state.slices
    for file_slice in slices[state.index : state.index + 1]:
        start = file_slice._replace(record=max(state.record, file_slice.record), taken=0, offset=0)
        if state.taken or state.offset:
            # The begun block goes to one stream as it is, so that it is shuffled as before; what follows it is free.
            yield start._replace(end=state.end, taken=state.taken, offset=state.offset)
            if state.end != file_slice.end:
                yield start._replace(record=state.end)
        else:
            yield start if state.record else file_slice
    yield from slices[state.index + 1 :]
    for epoch in range(state.epoch + 1, last + 1):
        yield from deal_epoch(epoch, files, stream, streams)
