"""Checkpoints of training runs: written whole or not at all, checked before they are trusted, never unpickled.

```
checkpoint-<step>/
  config.json, model.safetensors, …   what from_pretrained reads, model code and tokenizer (or how to
                                      prepare images) included
  README.md, sparsity.json, run.yaml  the model card, densities by tensor, the configuration
  training_state/
    state.json                        step, tokens or images seen, number of processes, fingerprint of the task
    rank-<rank>.json                  position in the data and random generators of each process
    state-<i>-of-<n>.safetensors      optimizer, sparsifier, and where the model's own file is rounded, weights and
                                      statistics of batch norms in fp32
  manifest.json                       size and CRC-32 of every file above; written last
```

The state files are those of PyTorch's distributed checkpoints in their safetensors form: each process writes the shards
that it holds, and any number of processes reads them.
"""

import base64
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers import PreTrainedModel

from ..checks import one_line
from ..config import RunConfig
from ..files import sync, write_text, writing
from ..models.auto import register
from ..models.masks import local
from ..sparsity.sharding import first_row, full_state_dict, is_sharded, owns_shard
from ..sparsity.sparsifier import Sparsifier
from .batches import Batches
from .manifest import delete_old, remove_checkpoint, sync_with_checksum, write_manifest
from .model_setup import running_statistics
from .tasks import Task

STATE = "training_state"
# Names of fields of `Progress` in state.json, from when there was only text.
IN_STATE_JSON = {"units": "tokens", "fingerprint": "tokenizer"}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step, units: completed steps, and units of the task (tokens, for example) seen by then.
        evaluated: whether the step's evaluation, if it has one, is in the metrics.
        processes: that wrote the checkpoint.
        fingerprint: of the task, such as that of a tokenizer.
    """

    step: int
    units: int
    evaluated: bool
    processes: int
    fingerprint: str

    @classmethod
    def from_json(cls, text: str) -> "Progress":
        saved = json.loads(text)
        return cls(**{name: saved[IN_STATE_JSON.get(name, name)] for name in cls.__dataclass_fields__})

    def to_json(self) -> str:
        return json.dumps({IN_STATE_JSON.get(name, name): value for name, value in asdict(self).items()})


@dataclass
class TrainingState:
    """What a checkpoint holds of a run, and the accelerator that its processes talk by."""

    accelerator: Accelerator
    model: PreTrainedModel
    task: Task
    optimizer: torch.optim.Optimizer
    sparsifier: Sparsifier
    batches: Batches
    config: RunConfig
    progress: Progress


# -------------------------------------------------------------------------------------------------- saving


def save_checkpoint(run_dir: Path, state: TrainingState, model_card: str) -> Path:
    """Writes ``checkpoint-<step>`` under a temporary name, syncs it, renames it, and then deletes old ones.

    If anything goes wrong on the way (a full disk, a kill), the earlier checkpoints stay as they were. All processes
    must call it, and share the file system of ``run_dir``.

    Args:
        run_dir: the run's directory.
        state: of the run.
        model_card: text of the checkpoint's README; that of the main process counts.

    Raises:
        OSError: a file cannot be written; the message names it.
    """
    name, accelerator = f"checkpoint-{state.progress.step}", state.accelerator
    final, partial = run_dir / name, run_dir / f".partial-{name}"
    main = accelerator.is_main_process
    try:
        with writing(final):  # for errors that name no file of their own
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / STATE).mkdir(parents=True)
            accelerator.wait_for_everyone()
            _write_model_files(partial, state, model_card)
            written = _write_state_files(partial / STATE, state)
            if main:
                written += _files_of_no_rank(partial)
            accelerator.wait_for_everyone()
            entries = gather_object([{str(path.relative_to(partial)): sync_with_checksum(path) for path in written}])
            if main:
                write_manifest(partial, {file: entry for part in entries for file, entry in sorted(part.items())})
                remove_checkpoint(final)
                os.rename(partial, final)
                sync(run_dir)
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if main:
        delete_old(run_dir, final, state.config.train.keep)
    accelerator.wait_for_everyone()
    return final


def _write_model_files(folder: Path, state: TrainingState, model_card: str) -> None:
    """Writes, on the main process, what is not training state: model, tokenizer or the like, descriptions."""
    main, config, sparsifier = state.accelerator.is_main_process, state.config, state.sparsifier
    weights = full_state_dict(state.model, keep=main)  # all processes take part in gathering them
    report = sparsifier.report()
    if not main:
        return
    _save_model(folder, state.model, weights, config.train.save_dtype)
    state.task.save(folder)
    sparsity = {"config": asdict(sparsifier.config), "steps": sparsifier.steps, **asdict(report)}
    write_text(folder / "README.md", model_card)
    write_text(folder / "sparsity.json", json.dumps(sparsity, indent=1))
    write_text(folder / "run.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
    write_text(folder / STATE / "state.json", state.progress.to_json())


def _write_state_files(folder: Path, state: TrainingState) -> list[Path]:
    """Writes this process's part of the training state; returns the files."""
    accelerator, model = state.accelerator, state.model
    rank, main = accelerator.process_index, accelerator.is_main_process
    position = {"data": state.batches.state_dict(), "random": _random_state()}
    files = [folder / f"rank-{rank}.json"]
    write_text(files[0], json.dumps(position))
    if main or is_sharded(model):
        writers = accelerator.num_processes if is_sharded(model) else 1
        files.append(folder / f"state-{rank + 1:05d}-of-{writers:05d}.safetensors")
        with_weights = state.config.train.save_dtype != "float32"
        with writing(files[1]):
            _write_shards(files[1], _state_tensors(state, with_weights), main)
    return files


def _files_of_no_rank(folder: Path) -> list[Path]:
    """The files of a checkpoint that do not belong to one process each."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if path.parent.name != STATE or not path.name.startswith(("rank-", "state-"))]


def _save_model(path: Path, model: nn.Module, weights: dict[str, torch.Tensor], dtype: str) -> None:
    save_dtype = getattr(torch, dtype)
    weights = {name: value.to(save_dtype) if value.is_floating_point() else value for name, value in weights.items()}
    # A second model without weights writes the files: wrappers around the trained model would show in them.
    with torch.device("meta"):
        shell = register(model.config)(model.config)
    if model.can_generate():
        shell.generation_config = model.generation_config
    with writing(path / "model.safetensors"):
        shell.save_pretrained(path, state_dict=weights)
    config = json.loads((path / "config.json").read_text())
    write_text(path / "config.json", json.dumps(config | {"dtype": dtype}, indent=2))


def _write_shards(path: Path, tensors: Mapping[str, torch.Tensor], main: bool) -> None:
    """Writes this process's shards, and the main process's whole tensors, in the form of `HuggingFaceStorageReader`."""
    shards = {name: local(tensor).contiguous() for name, tensor in tensors.items() if owns_shard(tensor, main)}
    layout = {}
    for name, shard in shards.items():  # split by rows: only the first offset can differ from 0
        layout[name] = {"saved_offsets": [first_row(tensors[name]), *[0] * (shard.dim() - 1)][: shard.dim()]}
    save_file(shards, path, {"DCP_SHARDING_INFO": json.dumps(layout)})


def _state_tensors(state: TrainingState, with_weights: bool) -> dict[str, torch.Tensor]:
    """All tensors of the training state by name."""
    tensors = {f"sparsifier.{name}": value for name, value in state.sparsifier.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.optimizer.state[parameter].items()}
        if with_weights:
            tensors[f"weight.{name}"] = parameter.detach()
    if with_weights:
        tensors |= {f"weight.{name}": value for name, value in running_statistics(state.model).items()}
    return tensors


# ------------------------------------------------------------------------------------------------- loading


def load_model(path: Path, task: Task) -> PreTrainedModel:
    """The model of a task's checkpoint in fp32, its weights as ``model.safetensors`` has them.

    Raises:
        ValueError: the checkpoint is incomplete, damaged, or of another kind of model.
    """
    try:
        model = task.models.from_pretrained(path, dtype=torch.float32)
    except ValueError:
        raise
    except Exception as error:  # damaged files raise whatever the code that meets them raises
        raise ValueError(f"{path}: cannot be loaded ({one_line(error)})") from error
    return model


def cannot_continue(path: Path, task: Task, batches: Batches) -> str | None:
    """Why a run with this task and these training data cannot continue from a checkpoint; ``None`` if it can.

    Leaves the data at the checkpoint's position.
    """
    try:
        progress, ranks = _read_progress(path)
        if progress.fingerprint != task.fingerprint:
            return f"it was trained with {task.misfit}"
        batches.load_state_dict([rank["data"] for rank in ranks])
    except ValueError as error:
        return " ".join(str(error).split())
    except Exception as error:  # damaged files raise whatever the code that meets them raises
        return one_line(error)
    return None


def _read_progress(path: Path) -> tuple[Progress, list[dict[str, Any]]]:
    """How far a checkpoint is, and the position and random generators of each of its processes."""
    progress = Progress.from_json((path / STATE / "state.json").read_text())
    return progress, [json.loads((path / STATE / f"rank-{r}.json").read_text()) for r in range(progress.processes)]


def load_training_state(path: Path, state: TrainingState) -> None:
    """Restores what training needs in addition to ``load_model``, in place; ``state.progress`` says how far the run is.

    On as many processes as wrote it everything is as it was. On another number the data are divided again, and each
    process's random generators start from its rank and the step.

    Raises:
        ValueError: a part is missing or does not fit.
    """
    folder, model, rank = path / STATE, state.model, state.accelerator.process_index
    processes = state.accelerator.num_processes
    try:
        state.progress, ranks = _read_progress(path)
        positions, random = [entry["data"] for entry in ranks], ranks[rank % len(ranks)]["random"]
        tensors = _tensors_to_load_into(HuggingFaceStorageReader(str(folder)), model, state.sparsifier)
        with warnings.catch_warnings():  # PyTorch warns of what no_dist asks for
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not is_sharded(model))
    except Exception as error:
        raise ValueError(f"{folder}: cannot be loaded ({one_line(error)})") from error
    parameters = dict(model.named_parameters())
    topology = {}
    for entry, tensor in tensors.items():
        kind, _, name = entry.partition(".")
        if kind == "sparsifier":
            topology[name] = tensor
        elif kind == "optimizer":
            key, _, name = name.partition(".")
            state.optimizer.state[parameters[name]][key] = tensor
    state.sparsifier.load_state_dict(topology)
    state.batches.load_state_dict(positions)
    if state.progress.processes == processes:
        _set_random_state(random)
    else:
        torch.manual_seed(state.progress.step * processes + rank)


def _tensors_to_load_into(
    reader: HuggingFaceStorageReader, model: nn.Module, sparsifier: Sparsifier
) -> dict[str, torch.Tensor]:
    """Tensors to read a training state into, sharded as the model is; weights are read into the model's own."""
    parameters = dict(model.named_parameters())
    values = {name: parameter.detach() for name, parameter in parameters.items()} | running_statistics(model)
    tensors = {f"sparsifier.{name}": value for name, value in sparsifier.state_dict().items()}
    for entry, saved in reader.read_metadata().state_dict_metadata.items():
        kind, _, name = entry.partition(".")
        if kind == "weight":
            tensors[entry] = values[name]
        elif kind == "optimizer":
            parameter = parameters[name.partition(".")[2]].detach()
            if saved.size == parameter.shape:
                tensors[entry] = torch.zeros_like(parameter)
            else:  # Adam's count of steps
                tensors[entry] = torch.zeros(saved.size, device=parameter.device)
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
