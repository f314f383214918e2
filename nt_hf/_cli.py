"""What the command-line programs share: how they end, and how they write what they found.

Bad input is one clear line and a non-zero exit code, not a traceback.
"""

import importlib.metadata
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def provenance(*packages: str) -> dict[str, Any]:
    """What a result was made by: the command, versions (of ``packages``, too), and the commit of a source tree."""
    names = ("nt_hf", "torch", "transformers", *packages)
    here = Path(__file__).parent
    commit = None
    try:
        # Tracked there: the package may also be installed into an environment within somebody else's repository.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, check=True, capture_output=True)
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pass
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": commit,
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, dataclasses as objects, in one piece: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=asdict) + "\n")
    os.replace(partial, path)
