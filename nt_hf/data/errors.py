"""The error of text and tokens that cannot be found or read."""

from ..checks import one_line


class DataError(ValueError):
    """Text or tokens that cannot be found or read; the message is one line that names the file or source."""


def reason(error: BaseException) -> str:
    """What another library's error says, in one line; of a missing package, how to install it."""
    if isinstance(error, ModuleNotFoundError) and error.name in ("datasets", "pyarrow"):
        return f"{error.name} is not installed: pip install 'nt_hf[data]'"
    return one_line(error)
