"""Sparse inference: masked linear layers computed by whichever kernel is fastest on this machine, at this batch.

[`specialize`] times each kind of layer with dense and sparse kernels and gives a layer another forward where that
pays; [`restore`] takes it back. The dense weights stay where they are, so that the state dict, ``save_pretrained``,
losses and everything else that reads a weight are as before; the sparse copies come on top (on a CPU 5 bytes an active
weight in fp32, 3 in bf16; a bitmap has 2, and one bit for every weight). A model without dense weights is
[`load_sparse`]'s, see the sparse_weights module.

The kernels are in `kernels`; ``dense`` is the module's own forward.
"""

import bisect
import copy
import itertools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.masks import canonical_name, check_masks, is_transposed, masked_modules
from ..text import plain_table
from .kernels import Kernel, usable_kernels
from .sparse_weights import is_sparse, make_dense, refuse_gradients

logger = logging.getLogger(__name__)

ROUNDS = 5
# A model's weights do not fit a cache; those of one layer timed again and again would.
EVICTED_BYTES = 2**26


@dataclass(frozen=True)
class LayerReport:
    """What was measured and chosen for one layer.

    Attributes:
        name: the module's name in the model.
        shape: of its weight, ``(out, in)``.
        density: the share of its weights that are not 0.
        kernels: the chosen kernel by rows a call.
        seconds: by rows a call, the shortest time of each kernel that could be used; measured once for layers of equal
            type, shape, dtype and (to 0.05) density.
    """

    name: str
    shape: tuple[int, int]
    density: float
    kernels: dict[int, str]
    seconds: dict[int, dict[str, float]]


@dataclass(frozen=True)
class Report:
    """What [`specialize`] chose; ``str`` gives a table.

    Attributes:
        layers: of every masked linear layer, in the model's order.
        extra_bytes: memory of the sparse copies.
        seconds: that measuring and converting took.
    """

    layers: list[LayerReport]
    extra_bytes: int
    seconds: float

    def __str__(self) -> str:
        lines = [("layer", "weight", "density", "rows", "kernel", "measured (µs)")]
        for layer in self.layers:
            for rows, kernel in layer.kernels.items():
                times = ", ".join(f"{name} {1e6 * value:.0f}" for name, value in layer.seconds[rows].items())
                shape = "x".join(map(str, layer.shape))
                lines.append((layer.name, shape, f"{layer.density:.3f}", str(rows), kernel, times))
        table = plain_table(lines, align="<", indent="")
        return "\n".join([table, f"sparse copies: {self.extra_bytes / 2**20:.1f} MiB, made in {self.seconds:.1f} s"])


@torch.no_grad()
def specialize(model: nn.Module, rows: Sequence[int] = (1, 128)) -> Report:
    """Gives the masked linear layers of a model the kernels that are fastest for the batch in use.

    Linear are ``nn.Linear`` and the ``Conv1D`` of GPT-2 and its like.
    Everything else (embeddings, convolutions, unmasked layers) is left alone, and so are layers that are fastest
    dense. A call with another number of rows than measured takes the kernel of the nearest, by ratio. A specialized
    layer runs its own dense forward where the sparse kernels cannot stand in: with labels, under autocast, under
    ``torch.compile``. Gradients are an error, and so is a weight that has changed since.

    Measured with the current number of threads: set that first.

    Args:
        model: any module with masks, in eval mode, on the device and in the dtype it will run in.
        rows: tokens that a call brings to a layer, batch times new positions: decoding 8 sequences has 8, the prefill
            of a prompt of 128 has 128. Each is measured.

    Raises:
        ValueError: the model is in training mode, specialized already, has no masked linear layers, or has non-zero
            weights outside its masks; or ``rows`` are not whole numbers from 1.
    """
    start = time.perf_counter()
    rows = sorted(set(rows))
    if not rows or not all(type(count) is int and count >= 1 for count in rows):
        raise ValueError(f"rows={rows!r}: accepted are one or more whole numbers from 1")
    if model.training:
        raise ValueError("model: is in training mode; accepted is model.eval(): sparse kernels are for inference")
    if is_sparse(model):
        raise ValueError("model: its weights are sparse already (load_sparse); accepted is restore(model) first")
    if any(_is_specialized(module) for module in model.modules()):
        raise ValueError("model: is specialized already; accepted is restore(model) first")
    layers = _masked_linears(model)
    if not layers:
        raise ValueError("model: no linear layer carries a mask; accepted is a model with masks")
    if violations := check_masks(model):
        raise ValueError(
            f"{', '.join(violations)}: not 0 outside the mask; accepted are zeros, as nt_hf.apply_masks(model) writes "
            "them"
        )
    timed: dict[tuple, dict[int, dict[str, float]]] = {}
    reports, extra = [], 0
    for name, module in layers.items():
        weight = _matrix(module)
        density = weight.count_nonzero().item() / max(1, weight.numel())
        builders = usable_kernels(weight)
        key = (type(module), weight.shape, weight.dtype, weight.device, module.bias is None, round(20 * density))
        key = (*key, *builders)
        built: dict[str, Kernel] = {}
        if key not in timed:
            built = {kernel: build(weight, module.bias) for kernel, build in builders.items()}
            timed[key] = {count: _time(module, built, count) for count in rows}
        chosen = {count: min(times, key=times.__getitem__) for count, times in timed[key].items()}
        kernels = {
            kernel: built.get(kernel) or builders[kernel](weight, module.bias)
            for kernel in sorted(set(chosen.values()) - {"dense"})
        }
        if kernels:
            module.forward = _SparseForward(module, kernels, chosen)
        extra += sum(kernel.nbytes for kernel in kernels.values())
        reports.append(LayerReport(name, tuple(weight.shape), density, chosen, timed[key]))
    return Report(reports, extra, time.perf_counter() - start)


def restore(model: nn.Module) -> None:
    """Takes back what [`specialize`] or [`load_sparse`] did: every layer runs its own forward, on dense weights.

    Those of a specialized model never changed. Those of a model that was loaded sparse are made, bit for bit as
    ``from_pretrained`` gives them.
    """
    make_dense(model)
    for module in model.modules():
        if _is_specialized(module):
            del module.forward


def _is_specialized(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), _SparseForward)


def _matrix(module: nn.Module) -> torch.Tensor:
    """A layer's weight with the output dimension first, as ``nn.Linear`` has it."""
    return module.weight.T.contiguous() if is_transposed(module) else module.weight


def _masked_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers with a masked weight, which may be tied: then the mask lies on its owner."""
    masked = {id(module.weight) for module in masked_modules(model).values()}
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_transposed(module))
        and id(module.weight) in masked
        and module.weight.is_floating_point()
        and not module.weight.is_meta
        and "forward" not in vars(module)  # another library's, which moves weights between devices, say
    }


class _SparseForward:
    """The forward of a specialized layer."""

    def __init__(self, module: nn.Module, kernels: dict[str, Kernel], chosen: dict[int, str]):
        self.module, self.kernels = module, kernels
        rows = list(chosen)
        self.limits = [math.sqrt(a * b) for a, b in itertools.pairwise(rows)]
        self.chosen = list(chosen.values())
        self.state = _state(module)

    def __deepcopy__(self, memo) -> "_SparseForward":
        # PyTorch's sparse tensors cannot be copied. A copied model has other weights, so this is refused when called.
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module, memo)
        return other

    def __call__(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        module, weight = self.module, self.module.weight
        if torch.compiler.is_compiling() or args or kwargs or x.dtype != weight.dtype or x.device != weight.device:
            return type(module).forward(module, x, *args, **kwargs)
        refuse_gradients(weight, x)
        if _state(module) != self.state:
            raise RuntimeError(
                "a weight has changed since the model was specialized (or copied): call "
                "nt_hf.inference.restore(model), then specialize(model) again"
            )
        flat = x.reshape(-1, x.shape[-1])
        kernel = self.chosen[bisect.bisect_left(self.limits, len(flat))]
        if kernel == "dense" or not len(flat) or torch.is_autocast_enabled(x.device.type):
            return type(module).forward(module, x)
        return self.kernels[kernel](flat.contiguous()).view(*x.shape[:-1], -1)


def _state(module: nn.Module) -> tuple:
    """Changes whenever a weight is written or replaced."""
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    return tuple((tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors)


# ------------------------------------------------------------------------------------------------------ measuring


def _time(module: nn.Module, kernels: dict[str, Kernel], rows: int) -> dict[str, float]:
    """Seconds of the dense forward and of each kernel, taking turns, with the weights in memory.

    The shortest of several times: what else a machine does only adds to it.
    """
    weight = _matrix(module)
    x = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    functions = {"dense": module.forward, **kernels}
    expected = module.forward(x).float()
    # A rounding or two of the result, and what fp32 sums of thousands of numbers lose.
    tolerance = (2 * torch.finfo(weight.dtype).eps + 2**-14) * expected.abs().max().item()
    for name, kernel in kernels.items():
        if not (error := (kernel(x).float() - expected).abs().max().item()) <= tolerance:
            logger.warning("the kernel %s is wrong by %g on a weight %s: left out", name, error, list(weight.shape))
            del functions[name]
    cache = torch.empty(EVICTED_BYTES, dtype=torch.uint8, device=weight.device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            cache.fill_(0)
            _synchronize(weight.device)
            start = time.perf_counter()
            function(x)
            _synchronize(weight.device)
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
