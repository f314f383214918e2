"""What the command-line programs share: how they read a text, how they write what they found, and how they end.

Bad input is one clear line and a non-zero exit code, not a traceback.
"""

import argparse
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

from .._version import __version__
from ..data.streams import check_vocabulary, load_tokenizer, read_texts
from ..evaluation.perplexity import DocumentWindows, load_config
from ..files import write_whole, writing
from ..models.configuration_neurotrails_llama import NeuroTrailsLlamaConfig


def run(main: Callable[[], None]) -> None:
    """Runs ``main``; ``NT_HF_TRACEBACK=1`` in the environment shows the traceback of an error as well."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nt_hf").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    try:
        with logging_redirect_tqdm():
            main()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        dead_worker = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
        if os.environ.get("NT_HF_TRACEBACK") or (isinstance(error, RuntimeError) and not dead_worker):
            raise
        reason = "; out of memory perhaps: fewer data.num_workers need less" if dead_worker else ""
        sys.exit(f"error: {' '.join(str(error).split())}{reason}")


def provenance(*packages: str) -> dict[str, Any]:
    """What a result was made by: the command, versions (of ``packages``, too), and the commit of a source tree."""
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
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)}
    return {
        "command": shlex.join(["python", *sys.argv]),
        # Of this package not by its metadata: a source tree on PYTHONPATH has none.
        "versions": {"python": platform.python_version(), "nt_hf": __version__, **versions},
        "git_commit": commit,
    }


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, dataclasses as objects, in one piece.

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
    write_whole(path, text + "\n")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of programs that score a model on a text."""
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, of NeuroTrails or a Llama")
    parser.add_argument("--data", nargs="+", required=True, help="files, globs, sample:validation, hub:…")
    parser.add_argument("--batch_size", type=int, default=8, help="windows a batch")
    parser.add_argument("--stride", type=int, help="tokens from window to window; default: half a window")
    parser.add_argument("--sequence_length", type=int, help="tokens a window; default: the model's trained length")
    parser.add_argument("--max_tokens", type=int, help="stop after the document that reaches so many; default: all")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--on_bad_line", default="error", choices=["error", "skip"])


def open_text(args: argparse.Namespace) -> tuple[NeuroTrailsLlamaConfig, DocumentWindows]:
    """The model's configuration and the windows that [`add_text_arguments`] describe.

    All arguments are checked here; the model, which takes longer, is loaded afterwards.
    """
    config = load_config(args.model)
    trained_length = config.max_position_embeddings
    length = trained_length if args.sequence_length is None else args.sequence_length
    if not 2 <= length <= trained_length:
        raise ValueError(f"--sequence_length {length}: accepted are 2 to {trained_length}, the model's trained length")
    tokenizer = load_tokenizer(str(args.model))
    check_vocabulary(tokenizer, config.vocab_size)
    texts = read_texts(args.data, args.text_field, args.on_bad_line)
    return config, DocumentWindows(
        texts, tokenizer, length=length, stride=args.stride, batch_size=args.batch_size, max_tokens=args.max_tokens
    )


def text_record(args: argparse.Namespace, windows: DocumentWindows) -> dict[str, Any]:
    """What of [`open_text`] belongs into a result, once the windows were scored."""
    return {
        "model": str(args.model),
        "data": args.data,
        "sequence_length": windows.length,
        "stride": windows.stride,
        "batch_size": windows.batch_size,
        "max_tokens": windows.max_tokens,
        "documents": windows.documents,
        "bad_lines": windows.texts.bad_lines,
    }


def check_output(path: Path, *, directory: bool = False, option: str = "--output") -> None:
    """Checks, before the work begins, that its result can be written to ``path``; nothing is made yet.

    Args:
        path: a file, or with ``directory`` a directory. It may be there already, and its parents may be missing.
        option: the argument that names it.

    Raises:
        ValueError: it is the other of the two, it would lie within a file, or its directory cannot be written to.
    """
    wanted = "directory" if directory else "file"
    if path.exists() and not (path.is_dir() if directory else path.is_file()):
        raise ValueError(f"{option} {path}: is no {wanted}; accepted is the path of a {wanted} to write")
    nearest = path if directory else path.parent
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        problem = "cannot be written to" if nearest.is_dir() else "is no directory"
        raise ValueError(f"{option} {path}: {nearest} {problem}; accepted is the path of a {wanted} to write")
