"""How the command-line programs end: bad input is one clear line and a non-zero exit code, not a traceback."""

import logging
import os
import sys
from collections.abc import Callable

from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging


def run(main: Callable[[], None]) -> None:
    """Runs ``main``; ``NT_HF_TRACEBACK=1`` in the environment shows the traceback of an error as well."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nt_hf").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    try:
        with logging_redirect_tqdm():
            main()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("NT_HF_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
