"""The batches of a run: read, divided into the passes of optimizer steps, brought to the device, counted."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from ..models.losses import IGNORE_INDEX

Batch = Mapping[str, torch.Tensor]


class Batches(Protocol):
    """What training reads: batches without end, whose position can be saved (`TokenBatches`, for example)."""

    epoch: int
    bad_lines: int

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None: ...


def grouped(batches: Iterable[Batch], passes: int) -> Iterator[list[Batch]]:
    """Yields the batches of each optimizer step: lists of ``passes`` batches."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, passes)):
        yield group


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Copies what a training pass needs to the device, without waiting for it.

    The attention mask is left out: rows are padded on the right, where causal attention never looks, and the labels of
    padding do not count. Transformers would check a mask for zeros, which waits for the device, and attention with a
    mask is slower.
    """
    pinned = device.type == "cuda"
    return {
        key: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
        for key, value in batch.items()
        if key != "attention_mask"
    }


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


def until(batches: Iterable[Batch], stop: Callable[[], bool]) -> Iterator[Batch]:
    """Batches, at least one, until ``stop`` says so."""
    for batch in batches:
        yield batch
        if stop():
            return


def synchronized(batches: Iterable[Batch], empty: Batch, accelerator: Accelerator) -> Iterator[Batch]:
    """As many batches on every process, whose passes through a sharded model must come together.

    A process that has run out gets ``empty``, a batch without targets.
    """
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if not accelerator.reduce(torch.tensor(int(batch is not None), device=accelerator.device)):
            return
        yield batch or empty


def count_targets(batches: Iterable[Batch]) -> list[int]:
    """Number of predicted tokens: labels that count, without each row's first, which nothing predicts.

    One number, or one for each head where each has a batch of its own.
    """
    predicted = [batch["labels"][..., 1:] != IGNORE_INDEX for batch in batches]
    return sum(tokens.sum((-2, -1)).reshape(-1) for tokens in predicted).tolist()
