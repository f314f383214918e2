"""The batches of a run: read, divided into the passes of optimizer steps, brought to the device, counted."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..data.prepared import token_batches
from ..data.streams import HeadBatches
from ..models.losses import IGNORE_INDEX

Batch = Mapping[str, torch.Tensor]


class Batches(Protocol):
    """What training reads: batches without end, whose position can be saved (`TokenBatches`, for example)."""

    epoch: int
    bad_lines: int

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None: ...


def reading_options(config: RunConfig, accelerator: Accelerator) -> dict[str, Any]:
    """How this process reads text: arguments of `token_batches`."""
    data, processes = config.data, accelerator.num_processes
    return {
        "batch_size": config.train.accumulation_steps(processes)[0],
        "sequence_length": data.sequence_length,
        "packing": data.packing,
        "rank": accelerator.process_index,
        "world_size": processes,
        "num_workers": data.num_workers,
        "on_bad_line": data.on_bad_line,
        "text_field": data.text_field,
    }


def training_batches(
    config: RunConfig, heads: int, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> Batches:
    """The training data, in one order for all heads or in a separate order for each."""
    data, seed = config.data, config.train.seed
    # Head 0 reads in the order that all heads would share. The seeds of the others are unlikely to be another run's.
    seeds = [seed + 1_000_003 * head for head in range(heads if data.order_per_head else 1)]
    streams = [
        token_batches(data.train, tokenizer, **options, shuffle_block=data.shuffle_block, seed=stream_seed)
        for stream_seed in seeds
    ]
    return HeadBatches(streams) if data.order_per_head else streams[0]


def validation_batches(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> Iterable[Batch]:
    """The validation text, once."""
    return token_batches(config.data.validation, tokenizer, **{**options, "num_workers": 0}, epochs=1)


def saliency_batch(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """Some training text, the same on every process, for first masks that saliency chooses."""
    rows = config.train.micro_batch_size or min(config.train.batch_size, 32)
    single = {**options, "batch_size": rows, "rank": 0, "world_size": 1, "num_workers": 0}
    batch = next(iter(token_batches(config.data.train, tokenizer, **single, seed=config.train.seed)))
    return {key: value.to(device) for key, value in batch.items()}


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


def synchronized(batches: Iterable[Batch], length: int, accelerator: Accelerator) -> Iterator[Batch]:
    """As many batches on every process, whose passes through a sharded model must come together.

    A process that has run out gets rows ``[1, length]`` without a token to predict.
    """
    iterator = iter(batches)
    empty = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
    empty |= {"attention_mask": torch.ones(1, length, dtype=torch.long)}
    empty |= {"labels": torch.full((1, length), IGNORE_INDEX)}
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
