"""What the training loop needs and no more: optimizer, learning rate, accumulation, preemption, metrics."""

import fnmatch
import itertools
import json
import logging
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..config import TrainConfig
from ..files import write_whole, writing
from ..models.modeling_neurotrails_llama import IGNORE_INDEX, NeuroTrailsLlamaForCausalLM
from ..sparsity.schedules import cosine

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]


def make_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW, fused; weight decay spares norms and biases (everything with fewer than two dimensions).

    Each group of parameters has its ``learning_rate_factor``, for the loop to multiply the rate by.

    Raises:
        ValueError: a glob of ``learning_rate_factors`` fits no parameter.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for glob in train.learning_rate_factors:
        if not fnmatch.filter(named, glob):
            raise ValueError(
                f"train.learning_rate_factors: {glob!r} fits no parameter; accepted are globs of names such as "
                f"{', '.join(list(named)[:3])}"
            )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        fitting = [value for glob, value in train.learning_rate_factors.items() if fnmatch.fnmatchcase(name, glob)]
        key = (train.weight_decay if parameter.dim() >= 2 else 0.0, (fitting or [1.0])[-1])
        groups.setdefault(key, []).append(parameter)
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return cls(
        [
            {"params": parameters, "weight_decay": decay, "learning_rate_factor": factor}
            for (decay, factor), parameters in groups.items()
        ],
        lr=train.learning_rate, betas=tuple(train.betas), eps=train.eps, fused=True,
    )  # fmt: skip


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate of optimizer step ``step`` (from 0): linear warm-up, then what ``lr_schedule`` says, see `TrainConfig`."""
    decay = warmup = round(train.warmup_ratio * train.max_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.lr_schedule == "warmup_stable_decay":
        decay = max(warmup, train.max_steps - round(train.decay_ratio * train.max_steps))
    floor = train.learning_rate * train.min_lr_ratio
    return cosine(step, decay, train.max_steps, train.learning_rate, floor)


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


#: Exit code of a run that a signal stopped, once its state was saved: "temporary failure, try again" in sysexits.h.
EXIT_PREEMPTED = 75


class Preemption:
    """Remembers that SIGTERM or SIGUSR1 came, with which schedulers announce that a process will be killed.

    A context manager: it puts the signals' handlers back when it is left.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "Preemption":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        logger.info("%s: saving after this step, then stopping", signal.Signals(number).name)
        self.received = True


def end_training(accelerator: Accelerator) -> None:
    """Ends trackers and process groups.

    Gloo's threads need the interpreter to let go of the last collective, and a group that is destroyed meanwhile, with
    the interpreter's lock held, waits for them forever (https://github.com/pytorch/pytorch/issues/56297).
    """
    if accelerator.num_processes > 1:
        time.sleep(0.5)
    accelerator.end_training()


def limited(
    batches: Iterable[Batch], max_tokens: int | None, stop: Callable[[], bool], multiple: int = 1
) -> Iterator[Batch]:
    """Batches, until they hold ``max_tokens`` predicted tokens or ``stop`` says so.

    The first limit counts ``multiple`` batches as one: with those of a whole optimizer step, the text is the same
    however that is divided into forward passes.
    """
    tokens = 0
    for number, batch in enumerate(batches, 1):
        yield batch
        tokens += sum(count_targets([batch]))
        if stop() or (max_tokens is not None and tokens >= max_tokens and number % multiple == 0):
            return


def in_step(batches: Iterable[Batch], length: int, accelerator: Accelerator) -> Iterator[Batch]:
    """As many batches on every process, whose passes through a sharded model must come together.

    A process that has run out gets rows ``[1, length]`` without a token to predict.
    """
    iterator = iter(batches)
    nothing = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
    nothing |= {"attention_mask": torch.ones(1, length, dtype=torch.long)}
    nothing |= {"labels": torch.full((1, length), IGNORE_INDEX)}
    while True:
        batch = next(iterator, None)
        if not accelerator.reduce(torch.tensor(int(batch is not None), device=accelerator.device)):
            return
        yield batch or nothing


def count_targets(batches: Iterable[Batch]) -> list[int]:
    """Number of predicted tokens: labels that count, without each row's first, which nothing predicts.

    One number, or one for each head where each has a batch of its own.
    """
    counted = [batch["labels"][..., 1:] != IGNORE_INDEX for batch in batches]
    return sum(counts.sum((-2, -1)).reshape(-1) for counts in counted).tolist()


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
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        """Appends a record of kind ``event`` (``train``, ``update``, ``eval``) and returns it."""
        record = {"event": event, **values}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        return record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, one a line; the last line, if a killed run left it unfinished, is dropped.

    Raises:
        ValueError: another line is no JSON object with an ``event`` and its ``step``; the message names it.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    unfinished = lines.pop()  # "" where all is well
    records = []
    for number, line in enumerate([*lines, *filter(None, [unfinished])], 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number > len(lines):
                logger.warning("%s: dropped an unfinished line", path)
                break
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int or "event" not in record:
            raise ValueError(f"{path}, line {number}: accepted is a JSON object with event and step, not {line[:60]!r}")
        records.append(record)
    return records
