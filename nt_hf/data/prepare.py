"""Writes the tokens of a source of text to disk once, for runs that read them with ``PreparedTokens``.

What a shard was made from stands in its metadata. A shard that is there is a finished one, so an interrupted
preparation continues with the others. The module ``prepared`` describes the files.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from ..checks import check, integer, one_line
from ..files import lock_directory, write_atomic, writing
from .config import RULES
from .errors import DataError
from .prepared import FORMAT_VERSION, Shard, read_index, tokenizer_fingerprint
from .sources import INDEX, Reader, find_files
from .streams import TOKENIZE_AT_ONCE
from .tokenizers import eos_id, tokenize


def prepare(
    source: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    *,
    processes: int = 1,
    text_field: str = "text",
    on_bad_line: str = "error",
    progress: Callable[[Shard, int, bool], None] = lambda shard, total, new: None,
) -> dict[str, Any]:
    """Writes the tokens of ``source`` into the directory ``output``; returns the content of its index.

    Interrupted at any moment, it goes on when called again: shards that are there are kept. The bytes written do not
    depend on interruptions or on ``processes``.

    Args:
        source: text source(s).
        tokenizer: any tokenizer with an end-of-sequence token; its automatic special tokens are not used.
        output: directory; made if it is not there. It may hold the same preparation, begun or complete.
        processes: files tokenised at a time; 1 uses this process and lets the tokenizer use all cores.
        text_field: name of the field that holds the text.
        on_bad_line: ``"error"`` or ``"skip"``; may change between interruption and continuation.
        progress: called for each shard with the shard, the number of shards in all and whether it is new.

    Raises:
        DataError: the source cannot be found or read or has no documents, or ``output`` holds something else.
        OSError: ``output`` cannot be written, or another process writes there.
        ValueError: an argument has a value that is not accepted.
    """
    check("processes", processes, integer(1))
    check("on_bad_line", on_bad_line, RULES["on_bad_line"])
    files, output = find_files(source), Path(output)
    names = "\n".join(os.path.basename(file) for file in files)
    largest = max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder, eos_id(tokenizer)])
    identity = {
        "format_version": FORMAT_VERSION,
        "source": [source] if isinstance(source, str) else list(source),
        "files": f"{len(files)} ({hashlib.sha256(names.encode()).hexdigest()[:12]})",
        "text_field": text_field,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dtype": "uint16" if largest < 1 << 16 else "uint32",
    }
    if (output / INDEX).exists():
        index = read_index(output)
        _require_same(output, {key: index.get(key) for key in identity}, identity)
        for shard in index["shards"]:
            progress(Shard(**shard), len(files), False)
        return index
    with lock_directory(output):
        return _prepare_there(source, files, tokenizer, output, identity, on_bad_line, processes, progress)


def _prepare_there(
    source: str | Sequence[str], files: list[str], tokenizer, output: Path, identity: dict, on_bad_line: str,
    processes: int, progress: Callable[[Shard, int, bool], None],
) -> dict[str, Any]:  # fmt: skip
    """The same, into a directory that is this process's alone."""
    with writing(output):
        for stale in output.glob(".*.partial"):
            stale.unlink()
    shards: dict[int, Shard] = {}
    tasks = []
    for number, file in enumerate(files):
        path = output / f"tokens-{number:05}-of-{len(files):05}.safetensors"
        if path.exists():
            made_from, shards[number] = _read_header(path)
            _require_same(output, made_from, identity)
            progress(shards[number], len(files), False)
        else:
            tasks.append((number, file, path))
    for path in output.glob("tokens-*.safetensors"):
        if not path.name.endswith(f"-of-{len(files):05}.safetensors"):
            raise DataError(f"{output}: holds {path.name}, of another source; take another output directory")
    for number, shard in _written(tasks, tokenizer, identity, on_bad_line, processes):
        shards[number] = shard
        progress(shard, len(files), True)
    ordered = [asdict(shards[number]) for number in range(len(files))]
    totals = {key: sum(shard[key] for shard in ordered) for key in ("tokens", "documents", "text_bytes", "bad_lines")}
    if not totals["documents"]:
        raise DataError(f"{source}: holds no documents")
    index = identity | totals | {"shards": ordered}
    write_atomic(output / INDEX, json.dumps(index, indent=1) + "\n")
    return index


def _require_same(output: Path, actual: dict, expected: dict) -> None:
    for key, value in expected.items():
        if actual.get(key) != value:
            raise DataError(
                f"{output}: holds tokens with {key}={actual.get(key)!r}; accepted is {value!r}; "
                "take another output directory"
            )


_worker: dict[str, Any] = {}


def _start_worker(*arguments) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    _worker.update(arguments=arguments, parent=os.getppid())


def _work(task: tuple[int, str, Path]) -> tuple[int, Shard]:
    return task[0], _write_shard(*task[1:], *_worker["arguments"], parent=_worker["parent"])


def _written(
    tasks: list[tuple[int, str, Path]], tokenizer, identity: dict, on_bad_line: str, processes: int
) -> Iterator[tuple[int, Shard]]:
    """Each shard with its number, as it is finished."""
    arguments = (tokenizer, identity, on_bad_line)
    processes = min(processes, len(tasks))
    if processes <= 1:
        for number, file, path in tasks:
            yield number, _write_shard(file, path, *arguments)
        return
    # Spawned, not forked: a forked process would wait for ever for the tokenizer's threads and those of remote files.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=arguments)
    try:
        for future in as_completed([pool.submit(_work, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"{tasks[0][2].parent}: a process ended by force, out of memory perhaps; start again to go on, "
            "with fewer processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(
    file: str, path: Path, tokenizer, identity: dict, on_bad_line: str, parent: int | None = None
) -> Shard:
    texts = Reader([file], identity["text_field"], on_bad_line)
    shard = Shard(path.name, file, 0, 0, 0, 0)
    dtype, eos = np.dtype(identity["dtype"]).newbyteorder("<"), eos_id(tokenizer)

    def write(out) -> None:
        out.write(_header(identity, shard))  # as long as the final one, which is written once the counts are known
        documents = iter(texts)
        while block := list(itertools.islice(documents, TOKENIZE_AT_ONCE)):
            if parent is not None and os.getppid() != parent:
                os._exit(1)  # the preparation was killed; another may be running already
            ids = tokenize(block, tokenizer)
            tokens = np.fromiter(itertools.chain.from_iterable([*document, eos] for document in ids), dtype)
            out.write(tokens.tobytes())
            shard.tokens += len(tokens)
            shard.documents += len(block)
            shard.text_bytes += sum(len(text.encode()) for text in block)
        shard.bad_lines = texts.bad_lines
        out.seek(0)
        out.write(_header(identity, shard))

    write_atomic(path, write)
    return shard


def _header(identity: dict, shard: Shard) -> bytes:
    """The beginning of a safetensors file, as long for any counts: it is written before they are known."""

    def content(shard: Shard) -> bytes:
        size = np.dtype(identity["dtype"]).itemsize * shard.tokens
        kind = {"uint16": "U16", "uint32": "U32"}[identity["dtype"]]
        metadata = {"identity": json.dumps(identity), "shard": json.dumps(asdict(shard))}
        tokens = {"dtype": kind, "shape": [shard.tokens], "data_offsets": [0, size]}
        return json.dumps({"__metadata__": metadata, "tokens": tokens}).encode()

    most = 10**18
    longest = len(content(Shard(shard.file, shard.source, most, most, most, most)))
    length = longest + -longest % 8
    return length.to_bytes(8, "little") + content(shard).ljust(length)  # the format lets headers end with spaces


def _read_header(path: Path) -> tuple[dict, Shard]:
    """The identity and the counts in a finished shard."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["identity"]), Shard(**json.loads(metadata["shard"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is no shard of prepared tokens, or damaged ({one_line(error)})") from error
