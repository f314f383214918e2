"""Sparse kernels of masked linear layers, and which of them can take a weight.

- ``compiled``: csrc/sparse_linear.cpp, fp32 and bf16 on a CPU; built by the system's compiler on first use.
- ``csr``: PyTorch's compressed rows, fp32 on a CPU.
- ``2:4 cutlass``, ``2:4 cusparselt``: PyTorch's semi-structured kernels, fp16 and bf16 on a CUDA GPU, for weights with
  at most two of four neighbours active.

Each is a class that converts a weight once, and multiplies ``[tokens, in]`` by it when called.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "sparse_linear.cpp"

Kernel = Callable[[torch.Tensor], torch.Tensor]


def usable_kernels(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor, torch.Tensor | None], Kernel]]:
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
    builders: dict[str, type] = {}
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
        pointers = x.data_ptr(), y.data_ptr(), scratch.data_ptr()
        self.function(*self.pointers, *pointers, count, out, inputs, torch.get_num_threads())
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
    fields = ("model name", "flags", "Features", "CPU part")
    features = sorted({line for line in lines if line.startswith(fields)})
    return "\n".join([platform.machine(), platform.processor(), *features])


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
        self.nbytes = sum(x.nbytes for x in (self.weight.packed, self.weight.meta) if x is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)
