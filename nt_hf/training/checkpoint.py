"""Checkpoints of training runs: written whole or not at all, checked before they are trusted, never unpickled.

```
checkpoint-<step>/
  config.json, model.safetensors, …   what from_pretrained reads, tokenizer and model code included
  README.md, sparsity.json, run.yaml  the model card, densities by tensor, the configuration
  training_state/
    state.json                        step, tokens, number of processes, the tokenizer's fingerprint
    rank-<rank>.json                  place in the data and random generators of each process
    state-<i>-of-<n>.safetensors      optimizer, sparsifier, and the fp32 weights where the model's own file is rounded
  manifest.json                       size and CRC-32 of every file above; written last
```

The state files are those of PyTorch's distributed checkpoints in their safetensors form: each process writes the shards
that it holds, and any number of processes reads them.
"""

import base64
import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..files import sync, write_text, writing
from ..models.masks import local
from ..models.modeling_neurotrails_llama import NeuroTrailsLlamaForCausalLM
from ..sparsity.sharding import first_row, full_state_dict, is_sharded, owns_shard
from ..sparsity.sparsifier import Sparsifier

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "training_state"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step, tokens: completed steps, and tokens seen by then.
        evaluated: whether the step's evaluation, if it has one, is in the metrics.
        processes: that wrote the checkpoint.
        tokenizer: its fingerprint.
    """

    step: int
    tokens: int
    evaluated: bool
    processes: int
    tokenizer: str


# ------------------------------------------------------------------------------------------------- finding


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_resume(resume: str, run_dir: Path) -> list[Path]:
    """The checkpoints to continue from, the best first, none for a new run.

    Args:
        resume: ``"auto"`` for those of ``run_dir``, the newest first; ``"never"`` for none; or a path for that one.

    Raises:
        ValueError: ``"never"`` for a directory that holds a run, a path that is no checkpoint of a run, or one that
            ``run_dir`` has newer checkpoints than: the next ``"auto"`` would go back to those.
    """
    found = find_checkpoints(run_dir)[::-1]
    if resume == "auto":
        return found
    if resume == "never":
        if found:
            raise ValueError(f"--resume never: {run_dir} holds a run ({found[0].name}); take another --output_dir")
        return []
    path = Path(resume)
    if not (path / MANIFEST).is_file() or not (path / "run.yaml").is_file():
        raise ValueError(f"--resume {resume}: accepted are auto, never, or a checkpoint-<step> directory of a run")
    if found and found[0].resolve() != path.resolve():
        raise ValueError(
            f"--resume {resume}: {run_dir} holds a later checkpoint, {found[0].name}; take another --output_dir "
            "or move the later ones away"
        )
    return [path]


def first_intact(checkpoints: Iterable[Path]) -> Path | None:
    """The first of some checkpoints whose files are as they were written; a warning names each one that is passed over.

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
        raise ValueError(f"{problem}; no other checkpoint is left to continue from: begin anew in another --output_dir")
    return None


def choose_checkpoint(checkpoints: Iterable[Path], accelerator: Accelerator) -> Path | None:
    """As [`first_intact`], judged by one process for all of them."""
    found, problem = None, None
    if accelerator.is_main_process:
        try:
            found = first_intact(checkpoints)
        except ValueError as error:
            problem = str(error)
    found, problem = broadcast_object_list([found, problem])
    if problem:
        raise ValueError(problem)
    return found


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest: a missing, shortened or changed file; ``None`` if nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files = {checkpoint / name: dict(entry) for name, entry in manifest["files"].items()}
        # The manifest has a sum of its own: else a flipped bit in a file's name would hide the file.
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


def set_aside(run_dir: Path, after: int) -> None:
    """Renames the checkpoints beyond step ``after``: those that a run which continues there could not use."""
    for path in find_checkpoints(run_dir):
        if _step_of(path) > after:
            target = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)


def clean_up(run_dir: Path) -> None:
    """Removes what a killed run left unfinished."""
    for path in run_dir.glob(".partial-checkpoint-*"):
        shutil.rmtree(path)
    for path in run_dir.glob(".*.partial"):
        path.unlink()


# -------------------------------------------------------------------------------------------------- saving


def save_checkpoint(
    run_dir: Path,
    step: int,
    tokens: int,
    *,
    accelerator: Accelerator,
    model: NeuroTrailsLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier,
    data: Any,
    config: RunConfig,
    model_card: str,
    evaluated: bool,
    fingerprint: str,
) -> Path:
    """Writes ``checkpoint-<step>`` under a temporary name, syncs it, renames it, and then deletes old ones.

    Whatever goes wrong on the way (a full disk, a kill) leaves the earlier checkpoints as they were. All processes must
    call it, and share the file system of ``run_dir``.

    Raises:
        OSError: a file cannot be written; the message names it.
    """
    final, partial = run_dir / f"checkpoint-{step}", run_dir / f".partial-checkpoint-{step}"
    state, rank, main = partial / STATE, accelerator.process_index, accelerator.is_main_process
    try:
        with writing(final):  # what names no file of its own
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                state.mkdir(parents=True)
            accelerator.wait_for_everyone()
            rounded = config.train.save_dtype != "float32"
            weights = full_state_dict(model, keep=main)
            report = sparsifier.report()
            if main:
                _save_model(partial, model, weights, config.train.save_dtype)
                with writing(partial / "tokenizer.json"):
                    tokenizer.save_pretrained(partial)
                sparsity = {"config": asdict(sparsifier.config), "steps": sparsifier.steps, **asdict(report)}
                write_text(partial / "README.md", model_card)
                write_text(partial / "sparsity.json", json.dumps(sparsity, indent=1))
                write_text(partial / "run.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
                progress = Progress(step, tokens, evaluated, accelerator.num_processes, fingerprint)
                write_text(state / "state.json", json.dumps(asdict(progress)))
            del weights
            own = {"data": data.state_dict(), "random": _random_state()}
            write_text(state / f"rank-{rank}.json", json.dumps(own))
            mine = [state / f"rank-{rank}.json"]
            if main or is_sharded(model):
                writers = accelerator.num_processes if is_sharded(model) else 1
                mine.append(state / f"state-{rank + 1:05d}-of-{writers:05d}.safetensors")
                with writing(mine[-1]):
                    _write_shards(mine[-1], _state_tensors(model, optimizer, sparsifier, rounded), main)
            if main:
                mine = [path for path in sorted(partial.rglob("*")) if path.is_file() and not _is_others(path, rank)]
            accelerator.wait_for_everyone()
            files = gather_object([{str(path.relative_to(partial)): _seal(path) for path in mine}])
            if main:
                merged = {name: entry for part in files for name, entry in sorted(part.items())}
                manifest = {"files": merged, "crc32": _crc32_of_json(merged)}
                write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
                folders = (folder for folder in partial.rglob("*") if folder.is_dir())
                for path in (partial / MANIFEST, *folders, partial):
                    sync(path)
                _remove(final)
                os.rename(partial, final)
                sync(run_dir)
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if main:
        _delete_old(run_dir, final, config.train.keep)
    accelerator.wait_for_everyone()
    return final


def _delete_old(run_dir: Path, newest: Path, keep: int) -> None:
    """Deletes all but the ``keep`` newest checkpoints, once the newest one was read again and found whole."""
    older = [path for path in find_checkpoints(run_dir) if _step_of(path) < _step_of(newest)]
    doomed = older[: len(older) - keep + 1]
    if doomed and (problem := find_damage(newest)):
        logger.warning("%s just after it was written; older checkpoints stay", problem)
        return
    for path in doomed:
        _remove(path)


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; its name goes first, so that a half-deleted one is never taken for complete."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".partial-{checkpoint.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)


def _is_others(path: Path, rank: int) -> bool:
    """Whether another process wrote a file."""
    if path.parent.name != STATE or not path.name.startswith(("rank-", "state-")):
        return False
    return path.name != f"rank-{rank}.json" and not path.name.startswith(f"state-{rank + 1:05d}-")


def _seal(path: Path) -> dict[str, int]:
    """Syncs a file to the disk; its size and checksum, which is computed while the disk works."""
    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(sync, path)
        entry = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        synced.result()
    return entry


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc32_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _save_model(path: Path, model: nn.Module, weights: dict[str, torch.Tensor], dtype: str) -> None:
    kind = getattr(torch, dtype)
    weights = {name: value.to(kind) if value.is_floating_point() else value for name, value in weights.items()}
    # A shell without weights: wrappers around the trained model would find their way into the files.
    with torch.device("meta"):
        shell = NeuroTrailsLlamaForCausalLM(model.config)
    shell.generation_config = model.generation_config
    with writing(path / "model.safetensors"):
        shell.save_pretrained(path, state_dict=weights)
    config = json.loads((path / "config.json").read_text())
    write_text(path / "config.json", json.dumps(config | {"dtype": dtype}, indent=2))


def _write_shards(path: Path, tensors: Mapping[str, torch.Tensor], main: bool) -> None:
    """Writes this process's shards, and the main process's whole tensors, in the form of `HuggingFaceStorageReader`."""
    own = {name: local(tensor).contiguous() for name, tensor in tensors.items() if owns_shard(tensor, main)}
    offsets = {name: [first_row(tensors[name]), *[0] * (value.dim() - 1)][: value.dim()] for name, value in own.items()}
    layout = {name: {"saved_offsets": offset} for name, offset in offsets.items()}
    save_file(own, path, {"DCP_SHARDING_INFO": json.dumps(layout)})


def _state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, sparsifier: Sparsifier, with_weights: bool
) -> dict[str, torch.Tensor]:
    """All tensors of the training state by name."""
    tensors = {f"sparsifier.{name}": value for name, value in sparsifier.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        if with_weights:
            tensors[f"weight.{name}"] = parameter.detach()
    return tensors


# ------------------------------------------------------------------------------------------------- loading


def load_model(path: Path) -> NeuroTrailsLlamaForCausalLM:
    """The model of a checkpoint in fp32, its weights as ``model.safetensors`` has them.

    Raises:
        ValueError: the checkpoint is incomplete, damaged, or of another kind of model.
    """
    try:
        model = NeuroTrailsLlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    except ValueError:
        raise
    except Exception as error:  # damaged files: as many types as causes
        raise ValueError(f"{path} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}") from error
    return model


def cannot_continue(path: Path, fingerprint: str, data: Any) -> str | None:
    """Why a run with this tokenizer and these training data cannot continue from a checkpoint; ``None`` if it can.

    Leaves the data at the checkpoint's place.
    """
    try:
        progress, ranks = _read_progress(path)
        if progress.tokenizer != fingerprint:
            return "it was trained with another tokenizer"
        data.load_state_dict([each["data"] for each in ranks])
    except Exception as error:  # damaged files: as many types as causes
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _read_progress(path: Path) -> tuple[Progress, list[dict[str, Any]]]:
    """How far a checkpoint is, and what each of its processes has left."""
    progress = Progress(**json.loads((path / STATE / "state.json").read_text()))
    return progress, [json.loads((path / STATE / f"rank-{r}.json").read_text()) for r in range(progress.processes)]


def load_training_state(
    path: Path,
    *,
    accelerator: Accelerator,
    model: NeuroTrailsLlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier,
    data: Any,
) -> Progress:
    """Restores what training needs beside ``load_model``; returns how far the run is.

    On as many processes as wrote it everything is as it was. On another number the data are divided anew, and each
    process's random generators start from its rank and the step.

    Raises:
        ValueError: a part is missing or does not fit.
    """
    state, rank, processes = path / STATE, accelerator.process_index, accelerator.num_processes
    try:
        progress, ranks = _read_progress(path)
        places, random = [each["data"] for each in ranks], ranks[rank % len(ranks)]["random"]
        tensors = _to_be_loaded(HuggingFaceStorageReader(str(state)), model, sparsifier)
        with warnings.catch_warnings():  # one that says what no_dist asks for
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(state)), no_dist=not is_sharded(model))
    except Exception as error:
        raise ValueError(f"{state} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}") from error
    parameters = dict(model.named_parameters())
    topology = {}
    for entry, tensor in tensors.items():
        kind, _, rest = entry.partition(".")
        if kind == "sparsifier":
            topology[rest] = tensor
        elif kind == "optimizer":
            key, _, name = rest.partition(".")
            optimizer.state[parameters[name]][key] = tensor
    sparsifier.load_state_dict(topology)
    data.load_state_dict(places)
    if progress.processes == processes:
        _set_random_state(random)
    else:
        torch.manual_seed(progress.step * processes + rank)
    return progress


def _to_be_loaded(
    reader: HuggingFaceStorageReader, model: nn.Module, sparsifier: Sparsifier
) -> dict[str, torch.Tensor]:
    """Tensors to read a training state into, sharded as the model is; the weights of the model are its own."""
    parameters = dict(model.named_parameters())
    tensors = {f"sparsifier.{name}": value for name, value in sparsifier.state_dict().items()}
    for entry, found in reader.read_metadata().state_dict_metadata.items():
        kind, _, rest = entry.partition(".")
        if kind == "weight":
            tensors[entry] = parameters[rest].detach()
        elif kind == "optimizer":
            parameter = parameters[rest.partition(".")[2]].detach()
            whole = found.size == parameter.shape
            tensors[entry] = torch.zeros_like(parameter) if whole else torch.zeros(found.size, device=parameter.device)
        elif entry not in tensors:
            raise KeyError(f"{entry} is unknown")
    return tensors


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(bytes(state.tolist())).decode() for device, state in states.items()}


def _set_random_state(states: Mapping[str, str]) -> None:
    decoded = {device: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for device, text in states.items()}
    torch.set_rng_state(decoded["cpu"])
    if "cuda" in decoded and torch.cuda.is_available():
        torch.cuda.set_rng_state(decoded["cuda"])
