"""Remote files: requests that are tried again while their errors may pass, and files that continue at the same byte."""

import contextlib
import io
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ..checks import one_line
from .errors import DataError

logger = logging.getLogger(__name__)

ATTEMPTS = 7  # of each request
FIRST_PAUSE = 1.0  # seconds after the first attempt, twice as many after each further one: a minute in all
BUFFER = 1 << 20  # bytes
T = TypeVar("T")


def retried(what: str, action: Callable[[], T]) -> T:
    """The result of ``action``, tried ``ATTEMPTS`` times with growing pauses while its errors may pass.

    Raises:
        DataError: the last attempt failed, too; ``what`` says what did.
        Exception: whatever trying again does not help against, as it came.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:  # each file system raises errors of its own
            if _is_final(error):
                raise
            problem = one_line(_reason(error))
            if attempt == ATTEMPTS:
                raise DataError(f"{what} after {ATTEMPTS} attempts ({problem})") from error
            pause = FIRST_PAUSE * 2 ** (attempt - 1)
            logger.warning("%s (%s): attempt %d of %d, the next in %g s", what, problem, attempt, ATTEMPTS, pause)
        time.sleep(pause)
    raise AssertionError("unreachable")


# What no waiting mends: names that do not exist, missing rights, missing packages, faulty requests.
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
)


def _is_final(error: BaseException) -> bool:
    text = f"{type(error).__name__}: {error}"  # `datasets` wraps what huggingface_hub raised, without a cause
    if "OfflineModeIsEnabled" in text:  # the user's own choice
        return True
    if "LocalEntryNotFoundError" in text:  # "not found" in the cache, because the hub did not answer
        return False
    reason = _reason(error)
    status = getattr(reason, "status", None) or getattr(getattr(reason, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)  # timeouts, "too early", "too many requests"
    return isinstance(reason, _FINAL)


def _reason(error: BaseException) -> BaseException:
    """The error itself, or what fsspec's HTTP file system took for "not found": any failure at all."""
    cause = error.__cause__
    over_http = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp.")
    return cause if over_http and cause is not None else error


class RemoteFile(io.RawIOBase):
    """A file behind a URL. When a request fails, it is opened again and goes on at the same byte.

    So what reads from it (a decompressor, a parser of tables) notices nothing, and no byte comes twice.
    """

    def __init__(self, url: str):
        self.url = url
        self._file = None
        self._position = 0  # of the next byte to hand out
        self._reached = 0  # the open file's own position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._request(self._size)
        self._position = offset
        return offset

    def readinto(self, buffer) -> int:
        data = self._request(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _request(self, action: Callable[[], T]) -> T:
        def attempt():
            try:
                if self._file is None:
                    import fsspec

                    self._file, self._reached = fsspec.open(self.url, "rb").open(), 0
                return action()
            except Exception:
                self._drop()
                raise

        return retried(f"{self.url}: cannot be read", attempt)

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # of a connection that is broken already
                file.close()

    def _size(self) -> int:
        self._reached = self._file.seek(0, io.SEEK_END)
        return self._reached

    def _read(self, size: int) -> bytes:
        if self._reached != self._position:
            try:
                self._reached = self._file.seek(self._position)
            except ValueError:  # a server that does not send ranges
                if self._reached > self._position:
                    raise
                while self._reached < self._position:
                    skipped = self._file.read(min(self._position - self._reached, BUFFER))
                    if not skipped:
                        raise EOFError(f"ends at byte {self._reached}, before {self._position}") from None
                    self._reached += len(skipped)
        data = self._file.read(size)
        self._reached += len(data)
        return data
