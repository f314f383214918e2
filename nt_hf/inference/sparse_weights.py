"""Models that hold the active values of their weights alone, from a sparse checkpoint straight into the kernels' form.

A weight is then a [`SparseParameter`]: by shape, type and name the parameter that it was, so that the modules around it
stay as they are. It can be multiplied and looked up, and nothing else.
"""

import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn

from ..models.auto import class_of_family, family_of
from ..models.masks import is_transposed
from ..models.sparse_checkpoint import check_parts, expand, sparse_weights_as
from .compiled import DTYPES, SparseRows, form_for, library

# Denser weights stay dense: the kernels are not faster there, and little memory is saved.
MOST_DENSITY = 0.5


def load_sparse(path: str | os.PathLike, **options) -> nn.Module:
    """Loads a sparse checkpoint for inference on a CPU; its dense weights are never made.

    The model is what ``from_pretrained`` gives, of the same class, and its layers compute the same results up to the
    order of the sums. Masked weights of linear layers and embeddings, up to density 0.5, are in a form of the kernels:
    ``CompressedRows``, or in bf16 from density 1/8 and where the CPU can, ``BitmapRows``. Denser ones and those of
    convolutions are dense, and everything else is as in the file. What needs a dense weight is an error: gradients,
    saving, other devices. [`restore`] makes the weights dense.

    Args:
        path: a directory or hub id of a checkpoint of ``save_pretrained(..., sparse=True)``. Its files must stay while
            the model is in use: masks and dense weights are mapped from them.
        options: those of ``from_pretrained`` except ``device_map`` and ``quantization_config``, such as
            ``dtype=torch.bfloat16`` and ``heads=[0]``.

    Raises:
        ValueError: the checkpoint is dense or damaged, an option is not accepted, the type is neither fp32 nor bf16, or
            there is no compiler for the kernels.
    """
    if (device := options.get("device_map")) not in (None, "cpu", torch.device("cpu")):
        raise ValueError(f"device_map={device!r}: accepted is 'cpu', or from_pretrained without load_sparse")
    if options.get("quantization_config") is not None:
        raise ValueError("quantization_config: accepted is none, or from_pretrained without load_sparse")
    if library() is None:
        raise ValueError("load_sparse: there are no compiled kernels; accepted is a machine with g++, or CXX set")
    cls = class_of_family(family_of(path))
    with sparse_weights_as(_compress):
        model = cls.from_pretrained(path, use_safetensors=True, **options)
    model = model[0] if isinstance(model, tuple) else model
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, SparseParameter):
            _check_dtype(weight.dtype)  # of a file in fp16 that no option converts
        if isinstance(weight, SparseParameter) and is_transposed(module):
            by_outputs = type(weight.compressed).of_dense(weight.compressed.dense().T.contiguous())
            module.weight = nn.Parameter(SparseParameter(by_outputs, transposed=True), weight.requires_grad)
    return model


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: accepted of sparse weights are {', '.join(map(str, DTYPES))}")


def _compress(values: torch.Tensor, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if len(shape) != 2 or len(values) > MOST_DENSITY * shape[0] * shape[1]:
        return expand(values, packed, shape)
    check_parts(values, packed, shape)
    density = len(values) / max(1, shape[0] * shape[1])
    return SparseParameter(form_for(values.dtype, density).of_mask(values, packed, tuple(shape)))


def make_dense(model: nn.Module) -> None:
    """Replaces each [`SparseParameter`] of a model by its dense weight; shared ones stay shared."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old ones, whose ids must not be given away
    for module in model.modules():
        if isinstance(weight := module._parameters.get("weight"), SparseParameter):
            if id(weight) not in made:
                made[id(weight)] = weight, nn.Parameter(weight.dense(), weight.requires_grad)
            module.weight = made[id(weight)][1]


def is_sparse(model: nn.Module) -> bool:
    """Whether a model holds weights without their inactive values."""
    return any(isinstance(parameter, SparseParameter) for parameter in model.parameters())


def refuse_gradients(*tensors: torch.Tensor) -> None:
    """Raises ``RuntimeError`` where a product of these would have to be differentiable."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "a sparse layer computes no gradients: call the model within torch.no_grad(), or "
            "nt_hf.inference.restore(model) before training"
        )


class SparseParameter(torch.Tensor):
    """A weight as compressed rows, behind a dense one's shape and type.

    Args:
        compressed: the rows in one of the kernels' forms, by outputs of a linear layer, by tokens of an embedding.
        transposed: whether the weight is ``[in, out]``, as that of ``Conv1D``.
    """

    @staticmethod
    def __new__(cls, compressed: SparseRows, transposed: bool = False):
        shape = compressed.shape[::-1] if transposed else compressed.shape
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=compressed.dtype, device="cpu")

    def __init__(self, compressed: SparseRows, transposed: bool = False):
        self.compressed, self.transposed = compressed, transposed

    def dense(self) -> torch.Tensor:
        """The weight, bit for bit."""
        weight = self.compressed.dense()
        return weight.T.contiguous() if self.transposed else weight

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"SparseParameter({list(self.shape)}, {self.dtype}, {self.compressed.nbytes} bytes)"

    def __deepcopy__(self, memo: dict) -> "SparseParameter":
        # Nobody writes into it, so copies share it.
        copied = nn.Parameter(SparseParameter(self.compressed, self.transposed), self.requires_grad)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol) -> NoReturn:
        _refuse("pickle")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function := _PRODUCTS.get(func):
            return function(*args, **kwargs)
        if func in _OF_MEMORY:
            _refuse("a look at its memory")
        if func == torch.Tensor.data.__set__ and isinstance(args[1], cls):  # how a module's ``to`` replaces a weight
            args[0].compressed = args[1].compressed
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        weight = args[0]
        if isinstance(weight, cls) and func in _COPIES:
            device = kwargs.get("device")
            if device is None or torch.device(device).type == "cpu":
                compressed, dtype = weight.compressed, kwargs.get("dtype") or weight.dtype
                if dtype != weight.dtype:
                    _check_dtype(dtype)
                    compressed = compressed.to(dtype)
                return cls(compressed, weight.transposed)
        _refuse(str(func))


def _refuse(operation: str) -> NoReturn:
    raise RuntimeError(
        f"{operation}: this weight is sparse (nt_hf.inference.load_sparse) and made for products on a CPU alone; "
        "accepted is nt_hf.inference.restore(model) first"
    )


def _check(x: torch.Tensor, weight: SparseParameter) -> None:
    if torch.is_autocast_enabled("cpu"):
        raise RuntimeError("autocast: accepted of sparse weights is none, with load_sparse(path, dtype=...)")
    if x.shape[-1] != weight.compressed.shape[1]:
        raise RuntimeError(f"input {list(x.shape)}: accepted is [..., {weight.compressed.shape[1]}]")
    if x.dtype != weight.compressed.dtype or x.device != weight.device:  # the kernel reads x without a further check
        dtype = weight.compressed.dtype
        raise RuntimeError(f"input {x.dtype} on {x.device}: accepted is {dtype} on a CPU, as the sparse weight")
    refuse_gradients(weight, x)


@torch.compiler.disable
def _linear(x: torch.Tensor, weight: SparseParameter, bias: torch.Tensor | None = None) -> torch.Tensor:
    _check(x, weight)
    rows, inputs = weight.compressed, weight.compressed.shape[1]
    flat = x.reshape(-1, inputs).contiguous()
    return rows.linear(flat, None if bias is None else bias.detach().float()).view(*x.shape[:-1], -1)


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: SparseParameter) -> torch.Tensor:
    return _linear(x, weight, bias)


@torch.compiler.disable
def _embedding(ids: torch.Tensor, weight: SparseParameter, padding_idx=None, max_norm=None, **_) -> torch.Tensor:
    if max_norm is not None:
        _refuse("embedding with max_norm")
    refuse_gradients(weight)
    return weight.compressed.dense_rows(ids.long())


_PRODUCTS = {nn.functional.linear: _linear, torch.addmm: _addmm, nn.functional.embedding: _embedding}
# What gives a tensor of the same numbers; nobody writes into it, so it shares them.
_COPIES = {getattr(torch.ops.aten, name).default for name in ("alias", "detach", "clone", "_to_copy")}
_OF_MEMORY = {
    torch.Tensor.untyped_storage,
    torch.Tensor.storage,
    torch.Tensor.data_ptr,
    torch.Tensor.numpy,
    torch.Tensor.data.__get__,
}
