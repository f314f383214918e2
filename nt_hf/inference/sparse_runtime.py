"""Sparse inference: masked linear layers computed by whichever kernel is fastest on this machine, at this batch.

[`specialize`] times each kind of layer with dense and sparse kernels and gives a layer another forward where that
pays; [`restore`] takes it back. The dense weights stay where they are, so that the state dict, ``save_pretrained``,
losses and everything else that reads a weight are as before; the sparse copies come on top (on a CPU 6 bytes an active
weight in fp32, 4 in bf16).

Kernels beside ``dense``, the module's own forward:

- ``compiled``: csrc/sparse_linear.cpp, fp32 and bf16 on a CPU; built by the system's compiler on first use.
- ``csr``: PyTorch's compressed rows, fp32 on a CPU.
- ``2:4 cutlass``, ``2:4 cusparselt``: PyTorch's semi-structured kernels, fp16 and bf16 on a CUDA GPU, for weights with
  at most two of four neighbours active.
"""

import bisect
import copy
import ctypes
import functools
import hashlib
import itertools
import logging
import math
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..models.masks import canonical_name, check_masks, masked_modules

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "sparse_linear.cpp"
ROUNDS = 5
# A model's weights do not fit a cache; those of one layer timed again and again would.
EVICTED_BYTES = 2**26

Kernel = Callable[[torch.Tensor], torch.Tensor]


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
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([*table, f"sparse copies: {self.extra_bytes / 2**20:.1f} MiB, made in {self.seconds:.1f} s"])


@torch.no_grad()
def specialize(model: nn.Module, rows: Sequence[int] = (1, 128)) -> Report:
    """Gives the masked ``nn.Linear`` layers of a model the kernels that are fastest for the batch in use.

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
        raise ValueError("the model is in training mode; sparse kernels are for inference: call model.eval() first")
    if any(_is_specialized(module) for module in model.modules()):
        raise ValueError("the model is specialized already; call restore(model) first")
    layers = _masked_linears(model)
    if not layers:
        raise ValueError("no nn.Linear of the model carries a mask; accepted is a model with masks")
    if violations := check_masks(model):
        raise ValueError(
            f"non-zero weights outside their masks in {', '.join(violations)}; nt_hf.apply_masks(model) restores them"
        )
    timed: dict[tuple, dict[int, dict[str, float]]] = {}
    reports, extra = [], 0
    for name, module in layers.items():
        weight = module.weight
        density = weight.count_nonzero().item() / max(1, weight.numel())
        builders = _builders(weight)
        kind = (type(module), weight.shape, weight.dtype, weight.device, module.bias is None, round(20 * density))
        kind = (*kind, *builders)
        built: dict[str, Kernel] = {}
        if kind not in timed:
            built = {kernel: build(weight, module.bias) for kernel, build in builders.items()}
            timed[kind] = {count: _time(module, built, count) for count in rows}
        chosen = {count: min(times, key=times.__getitem__) for count, times in timed[kind].items()}
        kernels = {
            kernel: built.get(kernel) or builders[kernel](weight, module.bias)
            for kernel in sorted(set(chosen.values()) - {"dense"})
        }
        if kernels:
            module.forward = _SparseForward(module, kernels, chosen)
        extra += sum(kernel.nbytes for kernel in kernels.values())
        reports.append(LayerReport(name, tuple(weight.shape), density, chosen, timed[kind]))
    return Report(reports, extra, time.perf_counter() - start)


def restore(model: nn.Module) -> None:
    """Takes back what [`specialize`] did: every layer runs its own forward, on the weights that never changed."""
    for module in model.modules():
        if _is_specialized(module):
            del module.forward


def _is_specialized(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), _SparseForward)


def _masked_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers with a masked weight, which may be tied: then the mask lies on its owner."""
    masked = {id(module.weight) for module in masked_modules(model).values()}
    return {
        canonical_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module.weight) in masked
        and module.weight.is_floating_point()
        and not module.weight.is_meta
        and "forward" not in vars(module)  # another library's, which moves weights between devices, say
    }


class _SparseForward:
    """The forward of a specialized layer."""

    def __init__(self, module: nn.Linear, kernels: dict[str, Kernel], chosen: dict[int, str]):
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
        if torch.is_grad_enabled() and (weight.requires_grad or x.requires_grad):
            raise RuntimeError(
                "a specialized layer computes no gradients: call the model within torch.no_grad(), or "
                "nt_hf.inference.restore(model) before training"
            )
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


def _state(module: nn.Linear) -> tuple:
    """Changes whenever a weight is written or replaced."""
    tensors = [module.weight] if module.bias is None else [module.weight, module.bias]
    return tuple((tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors)


# ------------------------------------------------------------------------------------------------------ measuring


def _time(module: nn.Linear, kernels: dict[str, Kernel], rows: int) -> dict[str, float]:
    """Seconds of the dense forward and of each kernel, taking turns, with the weights in memory.

    The shortest of several times: what else a machine does only adds to it.
    """
    weight = module.weight
    x = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    sides = {"dense": module.forward, **kernels}
    expected = module.forward(x).float()
    # A rounding or two of the result, and what fp32 sums of thousands of numbers lose.
    tolerance = (2 * torch.finfo(weight.dtype).eps + 2**-14) * expected.abs().max().item()
    for name, kernel in kernels.items():
        if not (error := (kernel(x).float() - expected).abs().max().item()) <= tolerance:
            logger.warning("the kernel %s is wrong by %g on a weight %s: left out", name, error, list(weight.shape))
            del sides[name]
    cache = torch.empty(EVICTED_BYTES, dtype=torch.uint8, device=weight.device)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            cache.fill_(0)
            _synchronize(weight.device)
            start = time.perf_counter()
            side(x)
            _synchronize(weight.device)
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------------- kernels


def _builders(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor, torch.Tensor | None], Kernel]]:
    """The sparse kernels that can take a weight, ``(weight, bias) -> kernel``, by name."""
    if weight.device.type == "cuda":
        backends = _semi_structured_backends()
        return {
            name: functools.partial(_SemiStructured, backend=backend)
            for name, backend in backends.items()
            if fits_semi_structured(weight, backend)
        }
    if weight.device.type != "cpu":
        return {}
    builders = {}
    if weight.dtype in _FUNCTIONS and weight.shape[1] <= 2**16 and _library() is not None:
        builders["compiled"] = _Compiled
    if weight.dtype == torch.float32:
        builders["csr"] = _Csr
    return builders


def _compressed_rows(weight: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return weight.detach().to_sparse_csr()


class _Csr:
    """PyTorch's compressed rows, with 32-bit indices: half the memory to read, 1.5 times as fast with one row."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        sparse = _compressed_rows(weight)
        indices = sparse.crow_indices().int(), sparse.col_indices().int()
        self.weight = torch.sparse_csr_tensor(*indices, sparse.values(), size=weight.shape, check_invariants=False)
        self.bias = bias
        self.nbytes = sum(tensor.nbytes for tensor in (*indices, sparse.values()))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


_FUNCTIONS = {torch.float32: "sparse_linear_float32", torch.bfloat16: "sparse_linear_bfloat16"}


class _Compiled:
    """Compressed rows with 16-bit columns, multiplied by the package's own kernel."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        sparse = _compressed_rows(weight)
        self.rows, self.columns = sparse.crow_indices(), sparse.col_indices().to(torch.uint16)
        self.values = sparse.values()
        self.bias = None if bias is None else bias.detach().float()
        self.shape = tuple(weight.shape)
        self.nbytes = sum(tensor.nbytes for tensor in (self.rows, self.columns, self.values))
        self.function = getattr(_library(), _FUNCTIONS[weight.dtype])
        self.pointers = (
            *(tensor.data_ptr() for tensor in (self.rows, self.columns, self.values)),
            (None if self.bias is None else self.bias.data_ptr()),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out, inputs = self.shape
        count = len(x)
        y, scratch = x.new_empty(count, out), torch.empty(inputs * 128, dtype=torch.uint8)
        places = x.data_ptr(), y.data_ptr(), scratch.data_ptr()
        self.function(*self.pointers, *places, count, out, inputs, torch.get_num_threads())
        return y


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None``, with a warning, where they cannot be built."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = [*(getattr(error, "stderr", None) or str(error)).strip().splitlines(), "the compiler failed"]
        reason = next((line for line in lines if "error" in line.lower()), lines[0])
        logger.warning("no compiled sparse kernels, only PyTorch's: %s", reason)
        return None
    for name in _FUNCTIONS.values():
        function = getattr(library, name)
        function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 4
        function.restype = None
    return library


def _build() -> Path:
    """Compiles the kernels for this CPU, if the user's cache has none yet; the library's path.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler (``CXX``, by default g++), or it fails.
    """
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"]
    source = SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, compiler.encode(), *map(str.encode, flags), _cpu().encode()])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nt_hf"
    path = folder / f"sparse_linear-{key[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects, library = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
            # Linked without OpenMP, and now rather than lazily: the process's own runtime serves, or loading fails. A
            # second one would bring threads that compete with PyTorch's.
            for command in (
                [compiler, *flags, "-c", str(SOURCE), "-o", objects],
                [compiler, "-shared", "-Wl,-z,now", objects, "-o", library],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(library, path)  # complete or not there, whoever else builds at the same time
    return path


def _cpu() -> str:
    """What ``-march=native`` depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    found = sorted({line for line in lines if line.startswith(wanted)})
    return "\n".join([platform.machine(), platform.processor(), *found])


def _semi_structured_backends() -> dict[str, type]:
    """PyTorch's classes of 2:4 tensors that this build can multiply."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    backends = {"2:4 cutlass": SparseSemiStructuredTensorCUTLASS}
    if torch.backends.cusparselt.is_available():
        backends["2:4 cusparselt"] = SparseSemiStructuredTensorCUSPARSELT
    return backends


def fits_semi_structured(weight: torch.Tensor, backend: type) -> bool:
    """Whether one of PyTorch's 2:4 classes can hold a weight exactly.

    It takes fp16 or bf16, sizes that are multiples of the class's own, a contiguous layout, and at most two non-zeros
    in each group of four along the input dimension.
    """
    sizes = backend._DTYPE_SHAPE_CONSTRAINTS.get(weight.dtype)
    if weight.dtype not in (torch.float16, torch.bfloat16) or sizes is None or not weight.is_contiguous():
        return False
    out, inputs = weight.shape
    if not out or not inputs or out % sizes.sparse_min_rows or inputs % sizes.sparse_min_cols:
        return False
    return int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) <= 2


class _SemiStructured:
    """A 2:4 weight in one of PyTorch's compressed forms."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, backend: type):
        self.weight, self.bias = backend.from_dense(weight.detach()), bias
        parts = (self.weight.packed, self.weight.meta)
        self.nbytes = sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


__all__ = ["LayerReport", "Report", "restore", "specialize"]
