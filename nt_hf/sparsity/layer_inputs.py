"""What flows into the layers of a block: their inputs' second moments, or all products of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..models.masks import is_transposed

Run = Callable[[], Iterable[None]]


@dataclass
class Inputs:
    """What is known of the inputs of a layer: second moments ``[in]``, or all products ``[in, in]``, summed."""

    sums: torch.Tensor
    count: int = 0

    def add(self, rows: torch.Tensor) -> None:
        rows = rows.float()
        self.sums += rows.square().sum(0) if self.sums.dim() == 1 else rows.T @ rows
        self.count += len(rows)


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

    def __enter__(self) -> "_Watch":
        self._hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: self._look(name, module, args[0]))
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def next_batch(self) -> None:
        self._seen.clear()

    def _look(self, name: str, module: nn.Module, value: torch.Tensor) -> None:
        patches = isinstance(module, nn.Conv2d)
        if name not in self.inputs:
            _, first = self._seen.setdefault(id(value), (value, name))
            self._first_of[name] = name if patches else first
            if self._first_of[name] == name:
                shape = weight_rows(module).shape[1:] * (2 if self._products else 1)
                self.inputs[name] = Inputs(torch.zeros(shape, device=value.device))
            else:
                self.inputs[name] = self.inputs[first]
        if self._first_of[name] == name:
            self.inputs[name].add(input_rows(module, value))


@torch.no_grad()
def look_at(run: Run, modules: Mapping[str, nn.Module], products: bool) -> dict[str, Inputs]:
    """What is known of the inputs of ``modules`` after ``run``, whose iterator runs one batch after another.

    Raises:
        ValueError: a layer did not run, or its inputs are not finite.
    """
    with _Watch(modules, products) as watch:
        for _ in run():
            watch.next_batch()
    for name in modules:
        if name not in watch.inputs:
            raise ValueError(f"{name}: did not run on the calibration batches; accepted is to exclude it")
        if not watch.inputs[name].sums.isfinite().all():
            raise ValueError(f"{name}: its inputs are not finite on the calibration batches")
    return watch.inputs
