"""The releases of Transformers that the model files are made for, and what differs between them.

Checked on import, so before anything else of Transformers can fail or mean something else: a checkpoint carries this
file, too.
"""

import os

import transformers
from transformers import Cache

# First and last minor release that the tests were run with; setup.cfg accepts the same.
OLDEST, NEWEST = (5, 17), (5, 24)
ANY_VERSION = "NT_HF_ANY_TRANSFORMERS"


def check_version(version: str, environment: dict[str, str] | os._Environ = os.environ) -> None:
    """Refuses a release of Transformers that the model files were not tested with.

    A newer release can rename an argument, and a model that misses one is wrong without a word.

    Raises:
        ImportError: ``version`` is another; the message names those that are accepted.
    """
    if not OLDEST <= _release(version) <= NEWEST and environment.get(ANY_VERSION) != "1":
        raise ImportError(
            f"Transformers {version} is installed, and the code of this NeuroTrails model was tested with "
            f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}: install one of these, or a newer nt_hf; "
            f"{ANY_VERSION}=1 tries it all the same"
        )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


check_version(transformers.__version__)

#: What Transformers calls the key-value cache in arguments and outputs: "cache" from 5.24 on.
CACHE = "cache" if _release(transformers.__version__) >= (5, 24) else "past_key_values"


def either_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, by its new name or by its old one.

    Raises:
        ValueError: both names were used.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: accepted is one of them")
    return past_key_values if cache is None else cache
