"""Runs a model block by block on some batches, so that a block can be changed before those behind it see its output.

One forward pass of each batch records what every block is called with, and which of it are outputs of earlier blocks.
The blocks are then called again one after another. Memory holds the outputs that are still needed of every batch, and
whatever is done with one block; not the activations within all blocks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class _Output:
    """Stands for what an earlier block returned: all of it, or one of its tensors."""

    block: int
    index: int | None


@dataclass
class _Batch:
    """The calls of a pass.

    Attributes:
        calls: the arguments of each block, in the order in which they ran, with `_Output` for those of earlier ones.
        last_use: of each block's output, the last block that takes it.
        outputs: of blocks that have run again, as they have become; originals: as they were.
    """

    calls: dict[int, tuple[tuple, dict]] = field(default_factory=dict)
    last_use: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    originals: dict[int, Any] = field(default_factory=dict)

    def call(self, block: nn.Module, number: int, outputs: Mapping[int, Any]) -> Any:
        """The output of a block after some outputs of earlier ones."""

        def value(output: _Output) -> Any:
            found = outputs[output.block]
            return found if output.index is None else found[output.index]

        args, kwargs = _replaced(self.calls[number], _Output, value)
        return block(*args, **kwargs)

    def finish(self, number: int) -> None:
        """Forgets what no block behind this one needs."""
        del self.calls[number]
        for block in [block for block in self.outputs if self.last_use.get(block, number) <= number]:
            del self.outputs[block]
            self.originals.pop(block, None)


def _replaced(value: Any, kind: type | tuple[type, ...], replacement: Callable[[Any], Any]) -> Any:
    """A nest of lists, tuples and dicts with every object of a kind replaced."""
    if isinstance(value, kind):
        return replacement(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, kind, replacement) for item in value)
    if type(value) is dict:
        return {key: _replaced(item, kind, replacement) for key, item in value.items()}
    return value


def _record(model: nn.Module, blocks: Sequence[nn.Module], inputs: Mapping[str, Any]) -> _Batch:
    batch = _Batch()
    tensors: dict[int, tuple[torch.Tensor, _Output]] = {}  # with the tensor, so that its address is not given away

    def before(number: int, args: tuple, kwargs: dict) -> None:
        if number in batch.calls:
            raise NotImplementedError(f"{type(blocks[number]).__name__}: accepted are blocks that are called once")
        taken: list[_Output] = []

        def output_of(tensor: torch.Tensor) -> torch.Tensor | _Output:
            known = tensors.get(id(tensor))
            if known:
                taken.append(known[1])
            return known[1] if known else tensor

        first = not batch.calls
        batch.calls[number] = _replaced((args, kwargs), torch.Tensor, output_of)
        if not (taken or first):
            kind = type(blocks[number]).__name__
            raise NotImplementedError(f"{kind}: accepted are blocks that take what an earlier one returned, as it is")
        batch.last_use |= {output.block: number for output in taken}

    def after(number: int, output: Any) -> None:
        parts = [(None, output)] if isinstance(output, torch.Tensor) else list(enumerate(output))
        for index, tensor in parts:
            if isinstance(tensor, torch.Tensor):
                tensors[id(tensor)] = (tensor, _Output(number, index))

    hooks = []
    for number, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(lambda _, a, k, n=number: before(n, a, k), with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda _, a, output, n=number: after(n, output)))
    try:
        getattr(model, "base_model", model)(**inputs)  # what follows the blocks is not needed
    finally:
        for hook in hooks:
            hook.remove()
    return batch


class Seen(Exception):
    """Ends a pass through a block early: what runs after what was looked at is not needed."""


@dataclass(frozen=True)
class BlockRun:
    """A block, and what runs it on one batch after another, as often as it is asked for.

    Attributes:
        block: to look at, and then to change.
        number: of the block in the model.
    """

    block: nn.Module
    number: int
    batches: Sequence[_Batch]

    def changed(self) -> Iterator[None]:
        """Runs the block on what the changed blocks before it make of the batches; a hook may raise `Seen`."""
        for batch in self.batches:
            with contextlib.suppress(Seen):
                batch.call(self.block, self.number, batch.outputs)
            yield

    def original(self) -> Iterator[None]:
        """Runs the block, which must not have changed yet, on what the model as it was makes of the batches.

        Either all blocks are run so, each once, or none.
        """
        for batch in self.batches:
            batch.originals[self.number] = batch.call(self.block, self.number, batch.originals)
            yield


@torch.no_grad()
def block_by_block(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Mapping[str, Any]]
) -> Iterator[BlockRun]:
    """Goes through the blocks in the order in which they run.

    Args:
        model: to run; it is left in eval mode while this goes on.
        blocks: of the model, each called once in a pass, with the output of an earlier one.
        batches: keyword arguments of the model; the hidden states of all are kept.

    Yields:
        Every block. What is done to it until the next is asked for, the blocks behind it see.

    Raises:
        NotImplementedError: a block is called twice, or something happens to the hidden states between two blocks.
    """
    training = model.training
    model.eval()
    try:
        records = [_record(model, blocks, inputs) for inputs in batches]
        for number in list(records[0].calls):
            yield BlockRun(blocks[number], number, records)
            for record in records:
                record.outputs[number] = record.call(blocks[number], number, record.outputs)
                record.finish(number)
    finally:
        model.train(training)
