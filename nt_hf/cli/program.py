"""What all command-line programs share: how they end, where a result comes from, and where it may be written.

Bad input is one clear line and a non-zero exit code, not a traceback.
"""

import argparse
import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers.utils import logging as transformers_logging

from .._version import __version__

# Packages that only some programs need, and the extra of this package that installs each.
EXTRAS = {"datasets": "data", "pyarrow": "data", "lm_eval": "eval"}


def run(main: Callable[[], None]) -> None:
    """Runs ``main``; what is wrong with its input ends the program with one line that begins with ``error:``.

    ``NT_HF_TRACEBACK=1`` in the environment shows the traceback of an error instead.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nt_hf").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    try:
        with logging_redirect_tqdm():
            main()
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if os.environ.get("NT_HF_TRACEBACK") or name not in EXTRAS:
            raise
        sys.exit(f"error: {name} is not installed: pip install 'nt_hf[{EXTRAS[name]}]'")
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        dead_worker = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
        # The latter says that a family cannot have heads.
        is_input = not isinstance(error, RuntimeError) or dead_worker or isinstance(error, NotImplementedError)
        if os.environ.get("NT_HF_TRACEBACK") or not is_input:
            raise
        reason = "; out of memory perhaps: fewer data.num_workers need less" if dead_worker else ""
        sys.exit(f"error: {' '.join(str(error).split())}{reason}")


def verb_parser(verb: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of ``nt-hf <verb>``; ``options`` are further ones of `argparse.ArgumentParser`."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(f"nt-hf {verb}", description=description, formatter_class=formatter, **options)


def machine() -> dict[str, Any]:
    """On what a result was made: the names of GPU and CPU, and the number of cores."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return {"gpu": gpu, "cpu": cpu, "cores": os.cpu_count()}


def provenance(*packages: str) -> dict[str, Any]:
    """What a result was made by: the command, versions (of ``packages``, too), and the commit of a source tree."""
    commit, folder = None, Path(__file__).parent
    try:
        # Tracked there: the package may also be installed into an environment within somebody else's repository.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=folder, check=True, capture_output=True)
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pass
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    program, *arguments = sys.argv
    program = ["nt-hf"] if Path(program).name in ("nt-hf", "__main__.py") else ["python", program]
    return {
        "command": shlex.join([*program, *arguments]),
        # Of this package not by its metadata: a source tree on PYTHONPATH has none.
        "versions": {"python": platform.python_version(), "nt_hf": __version__, **versions},
        "git_commit": commit,
    }


def check_output(path: Path, *, directory: bool = False, option: str = "--output") -> None:
    """Checks, before the work begins, that its result can be written to ``path``; nothing is made yet.

    Args:
        path: a file, or with ``directory`` a directory. It may be there already, and its parents may be missing.
        option: the argument that names it.

    Raises:
        ValueError: it is the other of the two, it would lie within a file, or its directory cannot be written to.
    """
    kind = "directory" if directory else "file"
    if path.exists() and not (path.is_dir() if directory else path.is_file()):
        raise ValueError(f"{option} {path}: is no {kind}; accepted is the path of a {kind} to write")
    nearest = path if directory else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        problem = "cannot be written to" if nearest.is_dir() else "is no directory"
        raise ValueError(f"{option} {path}: {nearest} {problem}; accepted is the path of a {kind} to write")
