"""Compressed rows of a weight, and the package's own kernels for them: csrc/sparse_linear.cpp, for a CPU.

The kernels are built for the CPU at hand by the system's compiler, on first use, into the user's cache.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy
import torch
from torch import nn

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "sparse_linear.cpp"

#: Types that the kernels multiply.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_BITS = {2: torch.int16, 4: torch.int32}  # by bytes a value


class SparseRows:
    """A weight ``[out, in]`` in a form of the kernels, which are its subclasses; ``values`` are in row-major order."""

    values: torch.Tensor
    shape: tuple[int, int]
    nbytes: int

    @classmethod
    def of_dense(cls, weight: torch.Tensor) -> "SparseRows":
        """Of a dense weight's numbers that are not +0."""
        mask = weight.view(_BITS[weight.element_size()]) != 0
        packed = torch.from_numpy(numpy.packbits(mask.numpy(), axis=1, bitorder="little"))
        return cls.of_mask(weight[mask], packed, tuple(weight.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def dense(self) -> torch.Tensor:
        """The weight ``[out, in]``."""
        return self.dense_rows(torch.arange(self.shape[0]))


class CompressedRows(SparseRows):
    """A weight ``[out, in]`` without its inactive values: 3 bytes an active weight in bf16, 5 in fp32.

    Args:
        rows: ``[out + 1]``, int64, where each row begins among the entries.
        steps: ``[entries]``, uint8, the distance of each entry's column from that of the entry before, in each row
            from column 0. A longer way has entries of value 0 on it.
        values: ``[entries]``, of 2 or 4 bytes each.
        shape: ``(out, in)``.
    """

    def __init__(self, rows: torch.Tensor, steps: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]):
        self.rows, self.steps, self.values, self.shape = rows, steps, values, shape
        self.nbytes = sum(tensor.nbytes for tensor in (rows, steps, values))

    @classmethod
    def of_mask(cls, values: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> "CompressedRows":
        """Of the ``values`` ``[active]`` inside a packed mask that fits them, in row-major order."""
        rows, width = torch.empty(shape[0] + 1, dtype=torch.int64), values.element_size()
        compress = getattr(library(), f"compress_{width}")
        source = packed.data_ptr(), values.data_ptr(), *shape, rows.data_ptr()
        compress(*source, None, None)
        entries = int(rows[-1])
        steps, targets = torch.empty(entries, dtype=torch.uint8), values.new_empty(entries)
        compress(*source, steps.data_ptr(), targets.data_ptr())
        return cls(rows, steps, targets, shape)

    def to(self, dtype: torch.dtype) -> SparseRows:
        """In another type, and in the form that fits it."""
        if form_for(dtype, len(self.values) / max(1, self.shape[0] * self.shape[1])) is BitmapRows:
            return BitmapRows.of_dense(self.dense().to(dtype))
        return CompressedRows(self.rows, self.steps, self.values.to(dtype), self.shape)

    def dense_rows(self, chosen: torch.Tensor) -> torch.Tensor:
        """The dense rows ``[*chosen.shape, in]`` of some numbers ``chosen`` (int64), bit for bit.

        Raises:
            IndexError: there is no such row.
        """
        chosen, inputs = _checked(chosen, self.shape), self.shape[1]
        target = self.values.new_empty(*chosen.shape, inputs)
        pointers = (tensor.data_ptr() for tensor in (self.rows, self.steps, self.values, chosen))
        getattr(library(), f"expand_{self.values.element_size()}")(*pointers, chosen.numel(), inputs, target.data_ptr())
        return target

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[tokens, out]`` of a contiguous ``x`` ``[tokens, in]`` of the values' type and a bias in fp32."""
        out, inputs = self.shape
        count = len(x)
        y, scratch = x.new_empty(count, out), torch.empty(inputs * 128, dtype=torch.uint8)
        pointers = [tensor.data_ptr() for tensor in (self.rows, self.steps, self.values)]
        getattr(library(), f"sparse_linear_{DTYPES[self.dtype]}")(
            *pointers, None if bias is None else bias.data_ptr(), x.data_ptr(), y.data_ptr(), scratch.data_ptr(),
            count, out, inputs, torch.get_num_threads(),
        )  # fmt: skip
        return y


class BitmapRows(SparseRows):
    """A weight ``[out, in]`` in bf16 as a sparse checkpoint has it: a bit for each weight, and the active values.

    Takes 2 bytes an active weight and 1/8 a weight, less than [`CompressedRows`] above density 1/8. Needs a CPU with
    AVX-512 VBMI2 and BF16 (see [`bitmaps`]).

    Args:
        rows: ``[out]``, int64, where the values of each row begin.
        bits: ``[out, 4 * chunks]``, uint8, the mask's bits, chunks of 32 columns.
        values: ``[active + 32]``, bf16, with zeros at the end, since a whole vector is read where the last values are.
        shape: ``(out, in)``.
    """

    CHUNK = 32  # columns that are multiplied at a time
    TOKENS = 4  # rows of inputs that are multiplied at a time
    FEW = 12  # up to so many rows of inputs that is faster than a dense product of rows that are expanded before
    SLAB = 2**22  # weights that are expanded at a time

    def __init__(self, rows: torch.Tensor, bits: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]):
        self.rows, self.bits, self.values, self.shape = rows, bits, values, shape
        self.chunks = bits.shape[1] // 4
        self.nbytes = sum(tensor.nbytes for tensor in (rows, bits, values))

    @classmethod
    def of_mask(cls, values: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> "BitmapRows":
        """As [`CompressedRows.of_mask`]; keeps ``packed`` where its rows are whole chunks."""
        out, inputs = shape
        packed, chunks = packed.reshape(out, -(-inputs // 8)), -(-inputs // cls.CHUNK)
        bits = nn.functional.pad(packed, (0, 4 * chunks - packed.shape[1])).contiguous()
        if bits.data_ptr() % 4:  # a file may have it anywhere, and the kernels read words
            bits = bits.clone()
        rows = torch.empty(out, dtype=torch.int64)
        library().bitmap_rows(bits.data_ptr(), out, chunks, rows.data_ptr())
        return cls(rows, bits, torch.cat([values, values.new_zeros(cls.CHUNK)]), shape)

    def to(self, dtype: torch.dtype) -> CompressedRows:
        """In a type that bitmaps do not have."""
        return CompressedRows.of_dense(self.dense().to(dtype))

    def dense_rows(self, chosen: torch.Tensor) -> torch.Tensor:
        """As [`CompressedRows.dense_rows`]."""
        chosen = _checked(chosen, self.shape)
        target = self.values.new_empty(*chosen.shape, self.shape[1])
        pointers = (tensor.data_ptr() for tensor in (self.rows, self.bits, self.values, chosen))
        library().bitmap_expand(*pointers, chosen.numel(), *self.shape, target.data_ptr(), torch.get_num_threads())
        return target

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As [`CompressedRows.linear`]; a zero times an infinity is NaN, as in a dense layer."""
        (out, inputs), count = self.shape, len(x)
        y = x.new_empty(count, out)
        if count > self.FEW:
            bias = None if bias is None else bias.to(x.dtype)
            for chosen in torch.arange(out).split(max(1, self.SLAB // inputs)):
                rows = slice(int(chosen[0]), int(chosen[-1]) + 1)
                part = None if bias is None else bias[rows]
                y[:, rows] = nn.functional.linear(x, self.dense_rows(chosen), part)
            return y
        scratch = x.new_empty(self.TOKENS, self.chunks * self.CHUNK)
        tensors = (self.rows, self.bits, self.values, bias, x, y, scratch)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        library().bitmap_linear(*pointers, count, out, inputs, torch.get_num_threads())
        return y


def form_for(dtype: torch.dtype, density: float) -> type[SparseRows]:
    """The form that a weight of some density takes least memory in, of those that this CPU can multiply."""
    return BitmapRows if dtype == torch.bfloat16 and density > 1 / 8 and bitmaps() else CompressedRows


def _checked(chosen: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Numbers of rows, contiguous.

    Raises:
        IndexError: there is no such row.
    """
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < shape[0]:
        raise IndexError(f"rows {int(chosen.min())} to {int(chosen.max())}: accepted are 0 to {shape[0] - 1}")
    return chosen.contiguous()


def bitmaps() -> bool:
    """Whether this CPU has the kernel of [`BitmapRows`]."""
    return library() is not None and hasattr(library(), "bitmap_linear")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None``, with a warning, where they cannot be built."""
    try:
        loaded = ctypes.CDLL(str(_build()))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        lines = [*(getattr(error, "stderr", None) or str(error)).strip().splitlines(), "the compiler failed"]
        reason = next((line for line in lines if "error" in line.lower()), lines[0])
        logger.warning("no compiled sparse kernels, only PyTorch's: %s", reason)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = {f"sparse_linear_{name}": [pointer] * 7 + [number] * 4 for name in DTYPES.values()}
    if hasattr(loaded, "bitmap_linear"):
        arguments["bitmap_linear"] = [pointer] * 7 + [number] * 4
        arguments["bitmap_expand"] = [pointer] * 4 + [number] * 3 + [pointer, number]
        arguments["bitmap_rows"] = [pointer, number, number, pointer]
    for width in _BITS:
        arguments[f"compress_{width}"] = [pointer] * 2 + [number] * 2 + [pointer] * 3
        arguments[f"expand_{width}"] = [pointer] * 4 + [number] * 2 + [pointer]
    for name, types in arguments.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def _build() -> Path:
    """Compiles the kernels for this CPU, if the user's cache has none yet; the library's path.

    Raises:
        OSError, ValueError, subprocess.CalledProcessError: there is no compiler (``CXX``, a command with its options,
            by default g++), or it fails.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    flags = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp"]
    source = SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join([source, *map(str.encode, [*compiler, *flags, _cpu()])])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nt_hf"
    path = folder / f"sparse_linear-{key[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects, library = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
            # Linked without OpenMP, and now rather than lazily: the process's own runtime serves, or loading fails. A
            # second one would bring threads that compete with PyTorch's.
            for command in (
                [*compiler, *flags, "-c", str(SOURCE), "-o", objects],
                [*compiler, "-shared", "-Wl,-z,now", objects, "-o", library],
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
