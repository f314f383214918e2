"""Checks of what this folder is given, and the errors that say what is accepted."""

from collections.abc import Sequence


class DataError(ValueError):
    """Text or tokens that cannot be found or read; the message is one line that names the file or source."""


def one_line(error: BaseException) -> str:
    """An error's type and message, for the end of a message of one line."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("datasets", "pyarrow"):
        return f"{error.name} is not installed: pip install 'nt_hf[data]'"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def check_source(name: str, source) -> None:
    """Raises ValueError unless the setting ``name`` is a string or a list of strings."""
    entries = [source] if isinstance(source, str) else source
    if not isinstance(entries, Sequence) or not entries or not all(isinstance(x, str) and x for x in entries):
        raise ValueError(f"{name}={source!r}: expected a text source or a list of them")


def check_choice(name: str, value, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected {' or '.join(map(repr, choices))}")


def check_int(name: str, value, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")
