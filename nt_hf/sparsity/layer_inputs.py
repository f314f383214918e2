"""What flows into the layers of a block: their inputs' second moments, or products of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..models.masks import is_transposed
from .block_replay import BlockRun


@dataclass
class Inputs:
    """What is known of the inputs of a layer.

    Attributes:
        sums: their second moments ``[in]``, or all products ``[in, in]``, summed over ``count`` rows.
        crossed: products ``[in, in]`` of what they were in the model before it was changed, and what they are.
    """

    sums: torch.Tensor
    crossed: torch.Tensor | None = None
    count: int = 0

    def add(self, rows: torch.Tensor, originals: torch.Tensor | None) -> None:
        rows = rows.float()
        self.sums += rows.square().sum(0) if self.sums.dim() == 1 else rows.T @ rows
        self.count += len(rows)
        if originals is not None:
            products = originals.float().T @ rows
            self.crossed = products if self.crossed is None else self.crossed + products


def input_rows(module: nn.Module, value: torch.Tensor) -> torch.Tensor:
    """What a layer multiplies its weights by, ``[n, in]``: the input's rows, or a convolution's patches."""
    if not isinstance(module, nn.Conv2d):
        return value.flatten(0, -2)
    patches = F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def weight_rows(module: nn.Module, tensor: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor of the weight's shape (the weight itself) as ``[out, in]``, in the order of [`input_rows`]; a view."""
    tensor = module.weight.detach() if tensor is None else tensor
    return tensor.T if is_transposed(module) else tensor.flatten(1)


class _Watch:
    """Looks at the inputs of some layers while it is entered; layers that take one tensor share what is known."""

    def __init__(self, modules: Mapping[str, nn.Module], products: bool):
        self._modules, self._products = modules, products
        self.inputs: dict[str, Inputs] = {}
        self._first_of: dict[str, str] = {}  # the layer with the same inputs that is looked at
        self._seen: dict[int, tuple[torch.Tensor, str]] = {}
        self._originals: dict[str, torch.Tensor] | None = None  # rows of a batch that is to come in its changed form

    def __enter__(self) -> "_Watch":
        self._hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: self._look(name, module, args[0]))
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def next_batch(self, is_original: bool = False) -> None:
        """Says what the next pass is of; one of an original batch is followed by one of the same batch, changed."""
        self._seen.clear()
        self._is_original = is_original
        if is_original:
            self._originals = {}

    def _look(self, name: str, module: nn.Module, value: torch.Tensor) -> None:
        if name not in self._first_of:
            _, first = self._seen.setdefault(id(value), (value, name))
            self._first_of[name] = name if isinstance(module, nn.Conv2d) else first
        if self._first_of[name] != name:
            self.inputs[name] = self.inputs.get(self._first_of[name])
            return
        rows = input_rows(module, value)
        if self._is_original:
            self._originals[name] = rows
            return
        if name not in self.inputs:
            shape = weight_rows(module).shape[1:] * (2 if self._products else 1)
            self.inputs[name] = Inputs(torch.zeros(shape, device=value.device))
        self.inputs[name].add(rows, self._originals and self._originals[name])


@torch.no_grad()
def look_at(
    run: BlockRun, modules: Mapping[str, nn.Module], *, products: bool, originals: bool = False
) -> dict[str, Inputs]:
    """What is known of the inputs of ``modules`` of a block.

    Args:
        run: runs the block.
        modules: layers by name.
        products: look at all products, not at the second moments alone.
        originals: also run the block on what the model as it was makes of the batches, for ``Inputs.crossed``.

    Raises:
        ValueError: a layer did not run, or its inputs are not finite.
    """
    with _Watch(modules, products) as watch:
        passes = [run.original(), run.changed()] if originals else [run.changed()]
        for _ in run.batches:
            for is_original, one in zip((True, False) if originals else (False,), passes):
                watch.next_batch(is_original)
                next(one)
    for name in modules:
        if watch.inputs.get(name) is None:
            raise ValueError(f"{name}: did not run on the calibration batches; accepted is to exclude it")
        if not watch.inputs[name].sums.isfinite().all():
            raise ValueError(f"{name}: its inputs are not finite on the calibration batches")
    return watch.inputs
