"""The checkpoints in a run's directory, and whether their files are as they were written."""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..files import sync, write_text

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    paths = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in paths if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest: a missing, shortened or changed file; ``None`` if nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files = {checkpoint / name: dict(entry) for name, entry in manifest["files"].items()}
        # The manifest has its own checksum: else a flipped bit in a file's name would hide the file.
        intact = manifest["crc32"] == _crc32_of_json(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / MANIFEST} is damaged ({type(error).__name__})"
    if not intact:
        return f"{checkpoint / MANIFEST} is damaged (its checksum differs)"
    for file, entry in files.items():
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            return f"{file} is damaged ({'missing' if size is None else f'{size} bytes'}, not {entry['bytes']})"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, entry), crc in zip(files.items(), pool.map(_crc32, files)):
            if crc != entry["crc32"]:
                return f"{file} is damaged (its checksum differs)"
    return None


def first_intact(checkpoints: Iterable[Path]) -> Path | None:
    """The first checkpoint of some that is not damaged; ``None`` if there are none.

    Raises:
        ValueError: there are checkpoints, and none is intact.
    """
    problem = None
    for path in checkpoints:
        if problem:
            logger.warning("%s; trying %s", problem, path.name)
        problem = find_damage(path)
        if not problem:
            return path
    if problem:
        raise ValueError(
            f"{problem}; no other checkpoint is left to continue from: start again in another --output_dir"
        )
    return None


def set_aside(run_dir: Path, after: int) -> None:
    """Renames the checkpoints beyond step ``after``: those that a run which continues there could not use."""
    for path in find_checkpoints(run_dir):
        if step_of(path) > after:
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)


def remove_checkpoint(checkpoint: Path) -> None:
    """Deletes a checkpoint; its name goes first, so that a half-deleted one is never taken for complete."""
    if checkpoint.exists():
        renamed = checkpoint.with_name(f".partial-{checkpoint.name}.old")
        shutil.rmtree(renamed, ignore_errors=True)
        os.rename(checkpoint, renamed)
        shutil.rmtree(renamed)


def delete_old(run_dir: Path, newest: Path, keep: int) -> None:
    """Deletes all but the ``keep`` newest checkpoints, if the newest one can be read back and is intact."""
    older = [path for path in find_checkpoints(run_dir) if step_of(path) < step_of(newest)]
    superfluous = older[: len(older) - keep + 1]
    if superfluous and (problem := find_damage(newest)):
        logger.warning("%s just after it was written; older checkpoints stay", problem)
        return
    for path in superfluous:
        remove_checkpoint(path)


def clean_up(run_dir: Path) -> None:
    """Removes what a killed run left unfinished."""
    for path in run_dir.glob(".partial-checkpoint-*"):
        shutil.rmtree(path)
    for path in run_dir.glob(".*.partial"):
        path.unlink()


def sync_with_checksum(path: Path) -> dict[str, int]:
    """Syncs a file to the disk; returns its entry in the manifest: size and checksum."""
    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(sync, path)
        entry = {"bytes": path.stat().st_size, "crc32": _crc32(path)}  # computed while the disk works
        synced.result()
    return entry


def write_manifest(folder: Path, files: Mapping[str, dict[str, int]]) -> None:
    """Writes the manifest of a checkpoint whose ``files`` are sealed, and syncs it and all folders."""
    manifest = {"files": files, "crc32": _crc32_of_json(files)}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    folders = (path for path in folder.rglob("*") if path.is_dir())
    for path in (folder / MANIFEST, *folders, folder):
        sync(path)


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc32_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
