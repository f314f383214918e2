"""Sparse checkpoints: of a masked weight, a file holds the active values and the mask.

In place of ``<name>.weight`` lie

- ``<name>.weight_values`` ``[active]``: the weight's values inside its mask, in the row-major order of the weight,
- ``<name>.weight_mask``: the packed mask, as in a dense checkpoint (see the masks module),
- ``<name>.weight_shape``: the weight's shape, int64.

These keys are how a sparse checkpoint is recognised, tensor by tensor: one file may hold weights of both forms.

This file is copied into checkpoints that load with ``trust_remote_code``: it imports what Transformers requires only.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open

from .masks import count_active, full_mask, packed_shape, unpack_mask

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
    _check_mask(packed, shape)
    if values.shape != (count := count_active(packed),):
        raise ValueError(f"values {list(values.shape)}, but {count} bits are set in the mask; accepted is one a bit")
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


def _check_mask(packed: torch.Tensor, shape: Sequence[int]) -> None:
    if packed.dtype != torch.uint8 or tuple(packed.shape) != packed_shape(shape):
        raise ValueError(
            f"the mask is {packed.dtype} {list(packed.shape)}; a weight of shape {list(shape)} takes torch.uint8 "
            f"{list(packed_shape(shape))}"
        )
    if (packed & ~full_mask(shape, packed.device)).any():
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


class SparseWeight:
    """A weight of a sparse checkpoint, read and expanded when it is indexed, as safetensors' slices are read."""

    def __init__(self, source: str, values: Any, packed: Any, shape: Sequence[int]):
        self._source, self._values, self._packed, self._shape = source, values, packed, shape

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._values.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            return expand(self._values[...], self._packed[...], self._shape)[index]
        except ValueError as error:
            raise ValueError(f"{self._source}: {error}") from None


def read_tensors(files: Iterable[str]) -> dict[str, Any]:
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
    for name in {key[: -len(end)] for key in origin for end in ("_values", "_shape") if key.endswith("weight" + end)}:
        lost = [name + part for part in PARTS if name + part not in tensors]
        source = f"{origin.get(f'{name}_values') or origin[f'{name}_shape']}: {name}"
        if lost:
            raise ValueError(f"{source} lacks {', '.join(lost)}; a sparse weight has {', '.join(PARTS)}")
        values, packed, shape = tensors.pop(f"{name}_values"), tensors[f"{name}_mask"], tensors.pop(f"{name}_shape")
        shape = shape[...]
        if shape.dtype != torch.int64 or shape.dim() != 1 or not len(shape) or (shape < 0).any():
            raise ValueError(f"{source}_shape is {shape}; accepted is an int64 list of sizes")
        tensors[name] = SparseWeight(source, values, packed, shape.tolist())
    return tensors
