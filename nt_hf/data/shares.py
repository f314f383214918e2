"""Who reads which documents: an epoch as a list of shares, dealt to streams, and dealt anew to another number of them.

A *stream* is what one loader worker of one rank reads; streams are numbered over all ranks. Everything here is
integers: no file is opened.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Share(NamedTuple):
    """A part of an epoch that one stream reads in order.

    These are the documents of the ``file``-th file in the epoch's order whose count, from 1, is ``first`` modulo
    ``step``, after the ``record``-th and up to the ``end``-th (None: to the file's end). A share with ``taken`` or
    ``offset`` is a block somebody else has begun, see ``Place``; it is never split.
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
class Place:
    """Where a stream stands; all it takes to go on from there.

    The block being used up is of the ``share``-th of the stream's shares, after record ``record`` (0: the share's
    beginning) and up to ``end`` (None: the file's end); ``taken`` of its documents and ``offset`` tokens of the
    next one are used. ``shares`` are what was dealt anew; None for a whole epoch, which follows from the numbers of
    files and streams. After them comes epoch ``epoch + 1``, whole. ``documents`` (used up) and ``bad_lines``
    (skipped) count over all epochs.
    """

    epoch: int = 0
    shares: list[Share] | None = None
    share: int = 0
    record: int = 0
    end: int | None = None
    taken: int = 0
    offset: int = 0
    documents: int = 0
    bad_lines: int = 0

    @property
    def begun(self) -> bool:
        """Whether anything of ``epoch`` was used, by this stream or by those it was dealt anew from."""
        return self.shares is not None or any((self.share, self.record, self.taken, self.offset))

    @property
    def epochs_done(self) -> int:
        """Epochs of which nothing is left for this stream."""
        if self.shares is None:
            return self.epoch
        return min((share.epoch for share in self.shares[self.share :]), default=self.epoch + 1)

    def next_epoch(self) -> None:
        self.epoch, self.shares, self.share = self.epoch + 1, None, 0

    def to_json(self) -> dict:
        """A few integers, and after dealing anew the list of the shares that are left."""
        state = {key: value for key, value in vars(self).items() if key != "shares"}
        if self.shares is not None:
            state |= {"share": 0, "shares": [list(share) for share in self.shares[self.share :]]}
        return state

    @classmethod
    def from_json(cls, state: dict) -> "Place":
        """The place that [`to_json`] described; TypeError, ValueError or AttributeError for anything else."""
        place = cls(**state)
        if place.shares is not None:
            place.shares = [Share(*share) for share in place.shares]
        numbers = [value for key, value in vars(place).items() if key != "shares"]
        for value in itertools.chain(numbers, *(place.shares or [])):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise ValueError(f"{value!r} is not a count")
        return place


def deal(shares: Sequence[Share], stream: int, streams: int) -> list[Share]:
    """What one of ``streams`` gets of ``shares``: whole ones in turn as long as every stream gets as many.

    Each of the rest is split between all streams, document by document. Splitting begins at another stream for each
    one, so that files of one document each go to all streams in turn, too.
    """
    whole = len(shares) - len(shares) % streams
    mine = list(shares[stream:whole:streams])
    for place in range(whole, len(shares)):
        share = shares[place]
        first = share.first + share.step * ((stream - place) % streams)
        mine.append(share._replace(first=first, step=share.step * streams))
    return mine


def deal_epoch(epoch: int, files: int, stream: int, streams: int) -> list[Share]:
    """What a stream gets of a whole epoch."""
    return deal([Share(epoch, file) for file in range(files)], stream, streams)


def deal_anew(places: Sequence[Place], files: int, streams: int) -> list[Place]:
    """The places of ``streams`` streams that together do exactly what the ``places`` of others have left to do.

    That is the rest of every epoch that any of them has begun. Begun blocks go to the new streams in turn, as they
    are; what has not been begun is dealt like an epoch. The epochs after that are dealt as ever.
    """
    last = max(place.epoch if place.begun else place.epoch - 1 for place in places)
    left = [share for i, place in enumerate(places) for share in _left(place, i, len(places), files, last)]
    # Oldest first; shares in progress, which are shorter, before whole ones, so that each stream gets some of both.
    left.sort(key=lambda share: (share.epoch, share.record == 0, share.file, share.step, share.first, share.record))
    blocks = [share for share in left if share.begun]
    rest = [share for share in left if not share.begun]
    new = []
    for stream in range(streams):
        shares = blocks[stream::streams] + deal(rest, stream, streams)
        place = Place(
            epoch=last,
            shares=sorted(shares, key=lambda share: share.epoch),
            documents=sum(old.documents for old in places[stream::streams]),
            bad_lines=sum(old.bad_lines for old in places[stream::streams]),
        )
        if not shares:
            place.next_epoch()
        new.append(place)
    return new


def _left(place: Place, stream: int, streams: int, files: int, last: int) -> Iterator[Share]:
    """What a stream has not used of the epochs up to ``last``."""
    if place.epoch > last:
        return
    shares = deal_epoch(place.epoch, files, stream, streams) if place.shares is None else place.shares
    for share in shares[place.share : place.share + 1]:
        start = share._replace(record=max(place.record, share.record), taken=0, offset=0)
        if place.taken or place.offset:
            yield start._replace(end=place.end, taken=place.taken, offset=place.offset)
            if place.end != share.end:
                yield start._replace(record=place.end)
        else:
            yield start if place.record else share
    yield from shares[place.share + 1 :]
    for epoch in range(place.epoch + 1, last + 1):
        yield from deal_epoch(epoch, files, stream, streams)
