"""Sparse checkpoints: of a masked weight, a file holds the active values and the mask.

In place of ``<name>.weight`` lie

- ``<name>.weight_values`` ``[active]``: the weight's values inside its mask, in the row-major order of the weight,
- ``<name>.weight_mask``: the packed mask, as in a dense checkpoint (see the masks module),
- ``<name>.weight_shape``: the weight's shape, int64.

These keys are how a sparse checkpoint is recognised, tensor by tensor: one file may hold weights of both forms.

This file is copied into checkpoints that load with ``trust_remote_code``: it imports what Transformers requires only.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from safetensors import safe_open

from .masks import count_active, packed_shape, unpack_mask

PARTS = ("_values", "_mask", "_shape")

# The bits of each byte of a mask, least significant first.
_BITS = (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu") & 1).to(torch.int32)
# Bytes of a mask that are expanded at one time: their indices stay in a CPU's cache.
_PIECE = 2**16


def compress(weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """The values ``[active]`` of a weight inside its packed mask, in row-major order.

    Raises:
        ValueError: the mask does not belong to a weight of this shape, or the weight is not 0 (or NaN) outside it.
    """
    _check_mask(packed, weight.shape)
    mask = unpack_mask(packed, weight.shape)
    if ((weight != 0) & ~mask).any():
        raise ValueError("non-zero weights outside the mask; a sparse checkpoint stores none")
    return weight[mask]


def expand(values: torch.Tensor, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The weight of ``shape`` with ``values`` ``[active]`` inside its packed mask, in row-major order, and 0 outside.

    Raises:
        ValueError: the mask does not belong to a weight of this shape, or the number of values is not that of its bits.
    """
    check_parts(values, packed, shape)
    weight = values.new_empty(len(packed), packed.shape[1] * 8)
    bits, start = _BITS.to(values.device), 0
    # Every weight is looked up, inactive ones at a 0 before the values. ``masked_scatter`` decides weight by weight,
    # which takes three times as long where half of them are active.
    for piece, target in zip(packed.flatten().split(_PIECE), weight.flatten().split(_PIECE * 8)):
        active = bits.index_select(0, piece.int()).flatten()
        places = active.cumsum(0, dtype=torch.int32)
        end = start + int(places[-1:].sum())
        source = torch.cat([values.new_zeros(1), values[start:end]])
        torch.index_select(source, 0, places.mul_(active), out=target)
        start = end
    return weight[:, : torch.Size(shape[1:]).numel()].contiguous().view(tuple(shape))


def check_parts(values: torch.Tensor, packed: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises ``ValueError`` where values and a packed mask are not those of one weight of ``shape``."""
    _check_mask(packed, shape)
    # Piece by piece: a mask's temporary copies would be a good part of what a sparse model needs.
    if values.shape != (count := sum(map(count_active, packed.flatten().split(_PIECE))),):
        raise ValueError(f"values {list(values.shape)}, but {count} bits are set in the mask; accepted is one a bit")


def _check_mask(packed: torch.Tensor, shape: Sequence[int]) -> None:
    if packed.dtype != torch.uint8 or tuple(packed.shape) != packed_shape(shape):
        raise ValueError(
            f"the mask is {packed.dtype} {list(packed.shape)}; a weight of shape {list(shape)} takes torch.uint8 "
            f"{list(packed_shape(shape))}"
        )
    padding = -torch.Size(shape[1:]).numel() % 8
    if padding and (packed[:, -1] >> (8 - padding)).any():
        raise ValueError("the mask has padding bits set; they must be 0")


def compress_state_dict(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict in the form of a sparse checkpoint; a weight whose mask is all ones stays as it is.

    Raises:
        ValueError: there are no masks, or a weight cannot be compressed; the message names it.
    """
    weights = [key.removesuffix("_mask") for key in tensors if key.endswith("weight_mask")]
    if tensors and not weights:  # where a model is sharded, all ranks but one save nothing
        raise ValueError("sparse=True: there are no masks; accepted is a model with masked_modules, or sparse=False")
    compressed = dict(tensors)
    for name in weights:
        if name not in tensors:
            continue  # of a part of a model
        weight, packed = compressed.pop(name), tensors[f"{name}_mask"]
        if weight.is_meta or packed.is_meta:
            raise ValueError(f"sparse=True: {name} is offloaded; accepted are weights in memory, or sparse=False")
        try:
            values = compress(weight, packed)
        except ValueError as error:
            raise ValueError(f"sparse=True: {name}: {error} (nt_hf.apply_masks restores the zeros)") from None
        if len(values) == weight.numel():
            compressed[name] = weight
        else:
            compressed[f"{name}_values"] = values
            compressed[f"{name}_shape"] = torch.tensor(weight.shape, device="cpu")
    return compressed


def check_dense(model: torch.nn.Module, purpose: str) -> None:
    """Raises ``ValueError`` for a model that was loaded without its dense weights (``nt_hf.inference.load_sparse``)."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "compressed"):
            raise ValueError(
                f"{purpose}: {name} is held sparse; accepted is nt_hf.inference.restore(model) first, which makes its "
                "dense weights"
            )


# What becomes of the values, the packed mask and the shape of a sparse weight that is read.
_FORM: ContextVar[Callable[..., torch.Tensor]] = ContextVar("form", default=expand)


@contextmanager
def sparse_weights_as(form: Callable[[torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]) -> Iterator[None]:
    """Within it, checkpoints load with ``form(values, packed, shape)`` for their sparse weights; dense files do not.

    Args:
        form: a tensor of that shape and of the values' type, of any class. Its ``ValueError`` gets the weight's name.
    """
    token = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(token)


class SparseWeight:
    """A weight of a sparse checkpoint, read when it is indexed, as safetensors' slices are.

    Args:
        source: what messages call it.
        parts: file and key of its values and of its mask.
        shape: the weight's.
        form: see [`sparse_weights_as`].
    """

    def __init__(self, source: str, parts: Sequence[tuple[str, str]], shape: Sequence[int], form: Callable):
        self._source, self._parts, self._shape, self._form = source, parts, shape, form

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        file, key = self._parts[0]
        return safe_open(file, "pt").get_slice(key).get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        # The file is opened for each weight: pages that were read stay in memory as long as it is open.
        files = {file: safe_open(file, "pt") for file, _ in self._parts}
        values, packed = (files[file].get_slice(key)[...] for file, key in self._parts)
        try:
            return self._form(values, packed, self._shape)[index]
        except ValueError as error:
            raise ValueError(f"{self._source}: {error}") from None


def read_tensors(files: Sequence[str]) -> dict[str, Any]:
    """The tensors of a checkpoint's safetensors files, dense or sparse, by the names that a dense one has.

    None is read: safetensors' slices and [`SparseWeight`]s read when they are indexed.

    Raises:
        ValueError: a sparse weight lacks one of its parts, or has a shape of another kind; the message names it.
        safetensors.SafetensorError: a file is truncated or damaged.
    """
    tensors: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file in files:
        # The slices keep the file open.
        keys = safe_open(file, "pt")
        for key in keys.keys():  # noqa: SIM118, no mapping
            tensors[key], origin[key] = keys.get_slice(key), file
    sparse = {key[: -len(end)] for key in origin for end in ("_values", "_shape") if key.endswith("weight" + end)}
    form = _FORM.get()
    if not sparse and form is not expand:
        raise ValueError(f"{file}: no weight is sparse; accepted is a file of save_pretrained(..., sparse=True)")
    for name in sparse:
        lost = [name + part for part in PARTS if name + part not in tensors]
        source = f"{origin.get(f'{name}_values') or origin[f'{name}_shape']}: {name}"
        if lost:
            raise ValueError(f"{source} lacks {', '.join(lost)}; a sparse weight has {', '.join(PARTS)}")
        parts = [(origin[key], key) for key in (f"{name}_values", f"{name}_mask")]
        del tensors[parts[0][1]]
        shape = tensors.pop(f"{name}_shape")[...]
        if shape.dtype != torch.int64 or shape.dim() != 1 or not len(shape) or (shape < 0).any():
            raise ValueError(f"{source}_shape is {shape}; accepted is an int64 list of sizes")
        tensors[name] = SparseWeight(source, parts, shape.tolist(), form)
    if form is not expand:
        for file in files:
            tensors |= _mapped_bytes(file, [f"{name}_mask" for name in sparse if origin[f"{name}_mask"] == file])
    return tensors


def _mapped_bytes(file: str, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of bytes as views of a mapped safetensors file, none of whose pages is read.

    A slice of safetensors is one, too, but reads its first page, and the system then maps many more.
    """
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    content = torch.from_file(str(file), size=os.path.getsize(file), dtype=torch.uint8, device="cpu")
    tensors = {}
    for key in keys:
        begin, end = (8 + length + offset for offset in header[key]["data_offsets"])
        tensors[key] = content[begin:end].view(header[key]["shape"])
    return tensors
