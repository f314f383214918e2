"""What flows into the layers of a block: their inputs' second moments, or products of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..models.masks import is_transposed
from .block_replay import BlockRun, Seen


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
    """Calls ``look(name, module, input)`` whenever some layers run, while it is entered."""

    def __init__(self, modules: Mapping[str, nn.Module], look: Callable[[str, nn.Module, torch.Tensor], None]):
        self._modules, self._look = modules, look

    def __enter__(self) -> None:
        self._hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: self._look(name, module, args[0]))
            for name, module in self._modules.items()
        ]

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def in_turn(run: BlockRun, modules: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """The layers of a block in the order in which a batch reaches them; those that take one tensor are together.

    Raises:
        ValueError: a layer did not run, or ran twice.
    """
    groups: dict[int, tuple[torch.Tensor, dict[str, nn.Module]]] = {}  # with the tensor, which keeps its id alive

    def look(name: str, module: nn.Module, value: torch.Tensor) -> None:
        groups.setdefault(id(value), (value, {}))[1][name] = module

    with _Watch(modules, look):
        next(run.changed())
    reached = [layers for _, layers in groups.values()]
    for name in modules:
        if not any(name in layers for layers in reached):
            raise ValueError(f"{name}: did not run on the calibration batches; accepted is to exclude it")
        if sum(name in layers for layers in reached) > 1:
            raise ValueError(f"{name}: runs twice in its block; accepted is to exclude it")
    return reached


@torch.no_grad()
def original_inputs(run: BlockRun, modules: Mapping[str, nn.Module]) -> list[dict[str, torch.Tensor]]:
    """For every batch, the layers' inputs in the model as it was, by name; the block must not have changed yet."""
    found: list[dict[str, torch.Tensor]] = [{}]

    def look(name: str, module: nn.Module, value: torch.Tensor) -> None:
        found[-1][name] = value

    with _Watch(modules, look):
        for _ in run.original():
            found.append({})
    return found[:-1]


@torch.no_grad()
def look_at(
    run: BlockRun,
    groups: Sequence[Mapping[str, nn.Module]],
    *,
    products: bool,
    originals: Sequence[Mapping[str, torch.Tensor]] | None = None,
) -> dict[str, Inputs]:
    """What is known of the inputs of some layers of a block.

    Args:
        run: runs the block.
        groups: of layers by name, see [`in_turn`]; of those that take one tensor the first is looked at for all.
        products: look at all products, not at the second moments alone.
        originals: of every batch, see [`original_inputs`], for ``Inputs.crossed``.

    Raises:
        ValueError: the inputs of a layer are not finite.
    """
    inputs: dict[str, Inputs] = {}
    modules = {name: module for layers in groups for name, module in layers.items()}
    for layers in groups:
        shared: Inputs | None = None
        for name, module in layers.items():
            if shared is None or isinstance(module, nn.Conv2d):  # whose patches are its own
                shape = weight_rows(module).shape[1:] * (2 if products else 1)
                shared = Inputs(torch.zeros(shape, device=module.weight.device))
            inputs[name] = shared
    batch = 0
    # Of layers that take one tensor, the first.
    watched = list({id(known): name for name, known in reversed(inputs.items())}.values())[::-1]

    def look(name: str, module: nn.Module, value: torch.Tensor) -> None:
        before = originals and input_rows(module, originals[batch][name])
        inputs[name].add(input_rows(module, value), before)
        if name == watched[-1]:  # groups and layers are in the order in which they run
            raise Seen

    with _Watch({name: modules[name] for name in watched}, look):
        for batch, _ in enumerate(run.changed(), 1):  # noqa: B007, look sees it
            pass
    for name, known in inputs.items():
        if not known.sums.isfinite().all():
            raise ValueError(f"{name}: its inputs are not finite on the calibration batches")
    return inputs
