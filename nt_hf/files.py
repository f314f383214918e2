"""What is written to disk: whole or not at all, by one run at a time, and errors that name the file."""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

_held: set[int] = set()  # file descriptors
# A loader's worker would hold the lock for as long as it outlives a killed run.
os.register_at_fork(after_in_child=lambda: [os.close(_held.pop()) for _ in range(len(_held))])


class WriteError(OSError):
    """A file that cannot be written; the message is one line that names it."""


class LockedError(OSError):
    """A directory that another process writes into; the message is one line that names it."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong within, a full disk for example, into one line that names ``path``.

    Raises:
        WriteError: writing failed. safetensors has an error of its own for that, which is no ``OSError``.
    """
    try:
        yield
    except (WriteError, LockedError):
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise WriteError(f"{path}: cannot be written ({reason})") from error


def write_atomic(path: Path, content: str | Callable[[IO[bytes]], object]) -> None:
    """Makes the file ``path`` in one step: whatever happens, it is complete and on the disk, or as it was.

    Args:
        path: the file; its directory must exist.
        content: a text, or a function that writes into the open file.

    Raises:
        WriteError: it cannot be written; nothing is left of it.
    """
    # The process's number keeps an orphan of a killed program from writing into the same file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            with open(partial, "wb") as file:
                file.write(content.encode()) if isinstance(content, str) else content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync(path.parent)  # the name, too, has to reach the disk
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file by [`write_atomic`]; dataclasses become objects, missing folders are made.

    Raises:
        ValueError: a number is not finite, which JSON cannot hold.
        OSError: the file cannot be written; the message names it.
    """
    try:
        text = json.dumps(content, indent=2, default=asdict, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}; accepted are finite numbers") from error
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file within a directory that is not whole yet itself.

    Raises:
        WriteError: it cannot be written.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Makes a file's content, or a directory's names, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Keeps a directory for this process: made if it is not there, and removed again if nothing came to lie in it.

    The kernel frees the lock of a process that dies, so a killed run locks nobody out.

    Raises:
        LockedError: another process holds it.
        WriteError: it cannot be made.
    """
    with writing(directory):
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        descriptor = _lock(directory)
    _held.add(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is held: whoever waits for it looks whether it is still there
            for path in missing:
                path.rmdir()
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(directory: Path) -> int:
    """A descriptor of the directory itself, locked, so that no file of a lock lies about."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockedError(
                f"{directory}: another process writes there; wait for its end, or take another directory"
            ) from error
        except OSError:  # network file systems
            logger.warning("%s: directories cannot be locked there; no other run may write into it", directory)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return descriptor
        os.close(descriptor)  # its holder ended and removed it meanwhile
