"""What the training loop needs and no more: optimizer, learning rate, accumulation, checkpoints, metrics."""

import itertools
import json
import logging
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from .data import TokenBatches
from .modeling_neurotrails_llama import IGNORE_INDEX, NeuroTrailsLlamaForCausalLM
from .run_config import RunConfig, TrainConfig
from .schedules import cosine
from .sparsifier import Sparsifier

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, fused; weight decay spares norms and biases (everything with fewer than two dimensions)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return cls(groups, lr=train.learning_rate, betas=tuple(train.betas), eps=train.eps, fused=True)


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine to ``min_lr_ratio`` of the peak."""
    warmup = round(train.warmup_ratio * train.max_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    floor = train.learning_rate * train.min_lr_ratio
    return cosine(step, warmup, train.max_steps, train.learning_rate, floor)


def accumulation_steps(train: TrainConfig, processes: int) -> tuple[int, int]:
    """Splits ``batch_size`` into (sequences of one forward pass, forward passes of one step) of each process.

    Raises:
        ValueError: the batch does not divide evenly.
    """
    micro = train.micro_batch_size or max(1, train.batch_size // processes)
    passes, rest = divmod(train.batch_size, micro * processes)
    if rest or not passes:
        raise ValueError(
            f"train.batch_size={train.batch_size}: accepted are multiples of micro_batch_size * processes = "
            f"{micro} * {processes}"
        )
    return micro, passes


def grouped(batches: Iterable[Batch], passes: int) -> Iterator[list[Batch]]:
    """The batches of one optimizer step after the other."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, passes)):
        yield group


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """What a training pass needs of a batch, on its way to the device, which may be busy meanwhile.

    Not the attention mask: rows are padded on the right, where causal attention never looks, and the labels of padding
    do not count. A mask would be checked for zeros, which waits for the device, and takes attention off its fast path.
    """
    pinned = device.type == "cuda"
    return {
        key: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
        for key, value in batch.items()
        if key != "attention_mask"
    }


def compile_blocks(model: NeuroTrailsLlamaForCausalLM) -> None:
    """Compiles the decoder blocks in place; names, masks and checkpoints stay as they are.

    All blocks share one graph. Masks are no part of it, so topology updates do not compile anything again.
    """
    for block in [*model.model.layers, *(block for head in model.model.heads for block in head.layers)]:
        block.compile()


class HostCopy:
    """Numbers on their way from the device to the host, which need not wait for them.

    Args:
        numbers: tensors ``[]`` or ``[n]``.
    """

    def __init__(self, **numbers: torch.Tensor):
        self._numbers = {name: value.detach().to("cpu", non_blocking=True) for name, value in numbers.items()}
        self._event = None
        if any(value.is_cuda for value in numbers.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> dict[str, Any]:
        """The numbers and lists of numbers, by name; waits for them if they are not here yet."""
        if self._event is not None:
            self._event.synchronize()
        return {name: value.tolist() for name, value in self._numbers.items()}


def count_targets(batches: Iterable[Batch]) -> int:
    """Number of predicted tokens: labels that count, without each row's first, which nothing predicts."""
    return sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the accelerator's allocator, on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------ metrics


class Metrics:
    """``metrics.jsonl``: one JSON object a record, written as it happens.

    Args:
        path: the file; its directory must exist.
        resume_step: keep the records up to this step, those of a run that is continued, and drop the rest;
            ``None``: a new run, keep nothing.
    """

    def __init__(self, path: Path, resume_step: int | None = None):
        self.path = path
        old = read_metrics(path) if path.exists() and resume_step is not None else []
        kept = [record for record in old if record["step"] <= resume_step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        """Appends a record of kind ``event`` (``train``, ``update``, ``eval``) and returns it."""
        record = {"event": event, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        return record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a line that a killed run left unfinished is dropped."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: dropped an unfinished line", path)
    return records


# -------------------------------------------------------------------------------------------- checkpoints


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    complete = (path for path in found if (path / "training_state" / "state.json").is_file())
    return sorted(complete, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def find_resume(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint to continue from: ``"auto"`` the newest of ``run_dir`` if any, ``"never"`` none, or a path.

    Raises:
        ValueError: ``"never"`` for a directory that holds a run, a path that is no checkpoint of a run, or one that
            ``run_dir`` has newer checkpoints than: the next ``"auto"`` would go back to those.
    """
    newest = (find_checkpoints(run_dir) or [None])[-1]
    if resume == "auto":
        return newest
    if resume == "never":
        if newest:
            raise ValueError(f"--resume never: {run_dir} holds a run ({newest.name}); take another --output_dir")
        return None
    path = Path(resume)
    if not (path / "training_state" / "state.json").is_file():
        raise ValueError(f"--resume {resume}: accepted are auto, never, or a checkpoint-<step> directory of a run")
    if newest and newest.resolve() != path.resolve():
        raise ValueError(
            f"--resume {resume}: {run_dir} holds a later checkpoint, {newest.name}; take another --output_dir "
            "or move the later ones away"
        )
    return path


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
    data: TokenBatches,
    config: RunConfig,
    model_card: str,
) -> Path:
    """Writes ``checkpoint-<step>`` under a temporary name, renames it when complete, then deletes old ones.

    Whatever goes wrong on the way (a full disk) leaves the earlier checkpoints as they were and no partial one.
    All processes must call it.
    """
    final, partial = run_dir / f"checkpoint-{step}", run_dir / f".partial-checkpoint-{step}"
    state = partial / "training_state"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        state.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        if accelerator.is_main_process:
            _save_model(partial, model, config.train.save_dtype)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(model_card)
            (partial / "sparsity.json").write_text(json.dumps(_sparsity(sparsifier), indent=1))
            (partial / "run.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
            if config.train.save_dtype != "float32":
                save_file(_unshared(model), state / "master.safetensors")
            save_file(sparsifier.state_dict(), state / "sparsifier.safetensors")
            torch.save(optimizer.state_dict(), state / "optimizer.pt")
            progress = {"step": step, "tokens": tokens, "processes": accelerator.num_processes}
            (state / "state.json").write_text(json.dumps(progress))
        rank = accelerator.process_index
        (state / f"data-{rank}.json").write_text(json.dumps(data.state_dict()))
        torch.save(_rng_state(), state / f"rng-{rank}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _remove(final)
            os.rename(partial, final)
    except BaseException:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        for old in find_checkpoints(run_dir)[: -config.train.keep]:
            _remove(old)
    accelerator.wait_for_everyone()
    return final


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint; its name goes first, so that a half-deleted one is never taken for complete."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".partial-{checkpoint.name}.old")
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)


def clean_up(run_dir: Path) -> None:
    """Removes what a killed run left unfinished."""
    for path in run_dir.glob(".partial-checkpoint-*"):
        shutil.rmtree(path)


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


def load_training_state(
    path: Path,
    *,
    accelerator: Accelerator,
    model: NeuroTrailsLlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    sparsifier: Sparsifier,
    data: TokenBatches,
) -> tuple[int, int]:
    """Restores what training needs beside ``load_model``; returns the completed (steps, tokens).

    Raises:
        ValueError: a part is missing or damaged, or was written by another number of processes.
    """
    state, rank = path / "training_state", accelerator.process_index
    try:
        progress = json.loads((state / "state.json").read_text())
        if progress["processes"] == accelerator.num_processes:
            ranks = range(accelerator.num_processes)
            positions = [json.loads((state / f"data-{i}.json").read_text()) for i in ranks]
            rng = torch.load(state / f"rng-{rank}.pt", weights_only=True)
        moments = torch.load(state / "optimizer.pt", map_location="cpu", weights_only=True)
        topology = load_file(state / "sparsifier.safetensors")
        masters = state / "master.safetensors"  # where the model's own file is rounded
        if masters.exists():
            missing = model.load_state_dict(load_file(masters), strict=False).missing_keys
            if set(missing) - set(model.all_tied_weights_keys):
                raise KeyError(f"{masters.name} lacks {missing[0]}")
    except Exception as error:
        raise ValueError(f"{state} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}") from error
    if progress["processes"] != accelerator.num_processes:
        raise ValueError(
            f"{path} was written by {progress['processes']} processes; it resumes on as many, "
            f"not on {accelerator.num_processes}"
        )
    optimizer.load_state_dict(moments)
    sparsifier.load_state_dict(topology)
    data.load_state_dict(positions)
    _set_rng_state(rng)
    return progress["step"], progress["tokens"]


def _sparsity(sparsifier: Sparsifier) -> dict[str, Any]:
    return {"config": asdict(sparsifier.config), "steps": sparsifier.steps, **asdict(sparsifier.report())}


def _save_model(path: Path, model: NeuroTrailsLlamaForCausalLM, dtype: str) -> None:
    if dtype == "float32":
        model.save_pretrained(path)
        return
    kind = getattr(torch, dtype)
    weights = {k: v.to(kind) if v.is_floating_point() else v for k, v in _unshared(model).items()}
    model.save_pretrained(path, state_dict=weights)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2))


def _unshared(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with tied weights once, as safetensors wants it."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
