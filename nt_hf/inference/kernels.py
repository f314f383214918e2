"""Sparse kernels of masked linear layers, and which of them can take a weight.

- ``compiled``: compressed rows, fp32 and bf16 on a CPU (see the compiled module).
- ``bitmap``: a bit for each weight, bf16 on a CPU with AVX-512 VBMI2 and BF16, for few tokens.
- ``csr``: PyTorch's compressed rows, fp32 on a CPU.
- ``2:4 cutlass``, ``2:4 cusparselt``: PyTorch's semi-structured kernels, fp16 and bf16 on a CUDA GPU, for weights with
  at most two of four neighbours active.

Each is a class that converts a weight once, and multiplies ``[tokens, in]`` by it when called.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import nn

from .compiled import DTYPES, BitmapRows, CompressedRows, SparseRows, bitmaps, library

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
    builders: dict[str, Callable[[torch.Tensor, torch.Tensor | None], Kernel]] = {}
    if weight.dtype in DTYPES and library() is not None:
        builders["compiled"] = functools.partial(_Compiled, form=CompressedRows)
    if weight.dtype == torch.bfloat16 and bitmaps():
        builders["bitmap"] = functools.partial(_Compiled, form=BitmapRows)
    if weight.dtype == torch.float32:
        builders["csr"] = _Csr
    return builders


class _Csr:
    """PyTorch's compressed rows, with 32-bit indices: half the memory to read, 1.5 times as fast with one row."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            sparse = weight.detach().to_sparse_csr()
        indices = sparse.crow_indices().int(), sparse.col_indices().int()
        self.weight = torch.sparse_csr_tensor(*indices, sparse.values(), size=weight.shape, check_invariants=False)
        self.bias = bias
        self.nbytes = sum(tensor.nbytes for tensor in (*indices, sparse.values()))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class _Compiled:
    """The package's own kernels, for a weight in one of their forms."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, form: type[SparseRows]):
        self.weight = form.of_dense(weight.detach())
        self.bias = None if bias is None else bias.detach().float()
        self.nbytes = self.weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.linear(x, self.bias)


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
