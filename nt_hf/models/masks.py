"""Packed sparsity masks, stored beside the weights they belong to.

A masked module carries a persistent uint8 buffer ``weight_mask``: one bit a weight, rows padded to whole
bytes with zero bits, little-endian along the input dimension (NumPy's ``unpackbits(bitorder="little")``).
A convolution's mask has one row an output channel, its other dimensions flattened.

The invariant that everything else relies on: **a weight outside its mask is exactly 0**. So a forward pass
is the stock dense one, and a reader that ignores the masks still reads the right weights.

This file is copied into checkpoints that load with ``trust_remote_code``: it imports torch and transformers only.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Conv1D is GPT-2's linear layer: its weight is [in, out], all others have the output dimension first.
MASKABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)

_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Packs a bool mask ``[out, ...]`` into uint8 ``[out, ceil(in / 8)]``, ``in`` the product of the rest."""
    rows = mask.flatten(1)
    padding = -rows.shape[1] % 8
    bits = nn.functional.pad(rows.to(torch.uint8), (0, padding)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Unpacks uint8 ``[out, ceil(in / 8)]`` into a bool mask of ``shape`` ``[out, ...]``."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    columns = torch.Size(shape[1:]).numel()
    return bits.flatten(1)[:, :columns].bool().reshape(shape)


def packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of the packed mask of a weight of ``shape``."""
    return shape[0], -(-torch.Size(shape[1:]).numel() // 8)


def full_mask(shape: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    """Packed mask of a fully dense weight of ``shape``; the padding bits are 0."""
    columns = torch.Size(shape[1:]).numel()
    packed = torch.full(packed_shape(shape), 0xFF, dtype=torch.uint8, device=device)
    if columns % 8:
        packed[:, -1] = (1 << columns % 8) - 1
    return packed


def count_active(packed: torch.Tensor) -> int:
    """Number of set bits of a packed mask."""
    # SWAR population count, a byte at a time: no table look-up, no unpacking.
    x = packed - ((packed >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return int(((x + (x >> 4)) & 0x0F).sum(dtype=torch.int64))


# --------------------------------------------------------------------------------------------------- structure


def parse_structure(structure: str) -> tuple[int, int] | None:
    """``(N, M)`` of an "N:M" structure, ``None`` of "unstructured" and "constant_fan_in".

    Raises:
        ValueError: it is none of them, or N is not from 1 to M.
    """
    if structure in ("unstructured", "constant_fan_in"):
        return None
    parts = structure.split(":") if isinstance(structure, str) else []
    if len(parts) == 2 and all(part.isdecimal() for part in parts) and 1 <= int(parts[0]) <= int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise ValueError(
        f"structure is {structure!r}; accepted: unstructured, constant_fan_in, or N:M with 1 <= N <= M, such as 2:4"
    )


def groups_of(tensor: torch.Tensor, structure: str, transposed: bool = False) -> torch.Tensor:
    """A view ``[..., length]`` of a weight-shaped tensor by the groups that a structure gives equal counts.

    "N:M": ``M`` neighbours along the input dimension. "constant_fan_in": all weights of an output unit.
    "unstructured": everything is one group.

    Args:
        tensor: of a weight's shape, output dimension first, ``transposed`` input dimension first; contiguous.
        structure: see [`parse_structure`].
        transposed: see [`is_transposed`].

    Raises:
        ValueError: the input dimension is not divisible by ``M``.
    """
    sizes = parse_structure(structure)
    if structure == "unstructured":
        return tensor.view(-1)
    rows = tensor.T if transposed else tensor
    if sizes is None:
        return rows.flatten(1)
    inputs = rows.movedim(1, -1)
    if inputs.shape[-1] % sizes[1]:
        raise ValueError(
            f"structure {structure} needs input dimensions divisible by {sizes[1]}; one is {inputs.shape[-1]}, of "
            f"a weight {list(tensor.shape)}"
        )
    return inputs.unflatten(-1, (-1, sizes[1]))


def group_count(shape: Sequence[int], structure: str, transposed: bool = False) -> int:
    """How many groups [`groups_of`] a weight of ``shape`` has."""
    groups = groups_of(torch.empty(tuple(shape), device="meta"), structure, transposed)
    return groups.numel() // max(1, groups.shape[-1])


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight has the input dimension first."""
    return isinstance(module, Conv1D)


def check_structure(mask: torch.Tensor, structure: str, transposed: bool = False) -> None:
    """Checks that a bool mask of a weight's shape has the structure.

    All groups of a tensor hold the same number of active weights; of "N:M" at least ``N``, more of a tensor that is on
    its way from dense to ``N``.

    Raises:
        ValueError: it has not; the message says where.
    """
    if structure == "unstructured" or not mask.numel():
        return
    counts = groups_of(mask, structure, transposed).sum(-1)
    least, most = (int(bound) for bound in counts.aminmax())
    if least != most:
        raise ValueError(f"groups hold {least} to {most} active weights; structure {structure} has as many in each")
    if (sizes := parse_structure(structure)) and least < sizes[0]:
        raise ValueError(f"groups of {sizes[1]} hold {least} active weights; structure {structure} has {sizes[0]}")


# ------------------------------------------------------------------------------------------------------- modules


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its shard of a `DTensor`, which shares its memory, or all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def canonical_name(name: str) -> str:
    """Parameter name without the prefixes that DDP, FSDP, ``torch.compile`` and checkpointing add."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the globs choose ``name``: the last one that fits decides, ``!glob`` excludes."""
    chosen = False
    for pattern in patterns:
        exclude = pattern.startswith("!")
        if fnmatchcase(name, pattern.removeprefix("!")):
            chosen = not exclude
    return chosen


def maskable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weight can carry a mask, by canonical weight name; a shared weight counts once."""
    # Loading, Transformers ties weights only after the model is built: until then they share nothing but this list.
    to_be_tied = getattr(model, "all_tied_weights_keys", {})
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in _maskable(model):
        if name not in to_be_tied and id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    return found


def _maskable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, MASKABLE):
            yield canonical_name(f"{name}.weight" if name else "weight"), module


def dense_parameters(model: nn.Module) -> list[str]:
    """Canonical names of the parameters of two or more dimensions that cannot carry a mask.

    They are no weight of a module of ``MASKABLE``: those of ``nn.MultiheadAttention`` or ``nn.LSTM``, for example.
    Dimensions of size 1 do not count.
    """
    maskable = {id(module.weight) for _, module in _maskable(model)}
    named = model.named_parameters()
    return [canonical_name(name) for name, x in named if id(x) not in maskable and sum(n > 1 for n in x.shape) > 1]


def masked_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that carry a mask, by canonical weight name, in the model's order."""
    return dict(_with_mask(model))


def _with_mask(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if getattr(module, "weight_mask", None) is not None:
            yield canonical_name(f"{name}.weight" if name else "weight"), module


def attach_masks(model: nn.Module, patterns: Sequence[str], prefix: str = "", strict: bool = True) -> list[str]:
    """Gives a fully dense mask to every maskable weight that ``patterns`` choose and that has none yet.

    Args:
        model: any module; the modules of ``MASKABLE`` can carry masks.
        patterns: globs of parameter names (``"model.layers.*"``); ``"!glob"`` excludes, the last match decides.
        prefix: the model's own name within the model that the patterns are written for.
        strict: whether a pattern that fits nothing is an error.

    Returns:
        The names of the chosen weights.

    Raises:
        ValueError: a pattern fits no maskable weight.
    """
    candidates = {prefix + name: module for name, module in maskable_modules(model).items()}
    with_aliases = [prefix + name for name, _ in _maskable(model)]
    for pattern in patterns if strict else ():
        # A shared weight is chosen by its owner's name only, but excluding it by another is no mistake.
        names = with_aliases if pattern.startswith("!") else candidates
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            raise ValueError(
                f"the pattern {pattern!r} fits none of the {len(candidates)} weights that can carry a mask, "
                f"for example {', '.join(list(candidates)[:3]) or 'none'}"
            )
    chosen = [name for name in candidates if matches(name, patterns)]
    for name in chosen:
        module = candidates[name]
        if getattr(module, "weight_mask", None) is None:
            module.register_buffer("weight_mask", full_mask(module.weight.shape, module.weight.device))
    return chosen


def get_mask(module: nn.Module) -> torch.Tensor:
    """The bool mask of a masked module, in its weight's shape; of a sharded one this process's rows."""
    return unpack_mask(local(module.weight_mask), local(module.weight).shape)


@torch.no_grad()
def set_mask(module: nn.Module, mask: torch.Tensor) -> None:
    """Writes a bool mask of the weight's shape (sharded: of this process's rows) and zeros the weight outside it."""
    local(module.weight_mask).copy_(pack_mask(mask))
    local(module.weight).masked_fill_(~mask, 0)


def resize_mask(module: nn.Module) -> None:
    """Fits the mask, if any, to a weight that has lost or gained rows at its end; new rows are active."""
    old = getattr(module, "weight_mask", None)
    if old is not None and len(old) != len(module.weight):
        new = full_mask(module.weight.shape, old.device)
        rows = min(len(old), len(new))
        new[:rows] = old[:rows]
        module.weight_mask = new


@torch.no_grad()
def apply_masks(model: nn.Module) -> None:
    """Restores the invariant: every weight outside its mask becomes exactly 0."""
    for module in masked_modules(model).values():
        local(module.weight).masked_fill_(~get_mask(module), 0)


@torch.no_grad()
def check_masks(model: nn.Module, known: Container[str] = ()) -> list[str]:
    """Names of the weights that are non-zero (or NaN) somewhere outside their mask; empty when all is well.

    Of a sharded model each process looks at its own rows.

    Args:
        model: any module.
        known: names of weights that are known to be 0 there; of these the masks are checked.

    Raises:
        ValueError: a mask has another shape than its weight asks for, set padding bits, or not the structure that the
            model's config declares (``mask_structure``).
    """
    violations = []
    structure = getattr(getattr(model, "config", None), "mask_structure", "unstructured")
    for name, module in masked_modules(model).items():
        packed, weight = local(module.weight_mask), local(module.weight)
        if packed.is_meta or weight.is_meta or not is_plain(weight):
            continue  # offloaded, or quantised into another layout
        if packed.dtype != torch.uint8 or tuple(packed.shape) != packed_shape(weight.shape):
            raise ValueError(
                f"the mask of {name} is {packed.dtype} {list(packed.shape)}; a weight of shape "
                f"{list(weight.shape)} takes torch.uint8 {list(packed_shape(weight.shape))}"
            )
        if (packed & ~full_mask(weight.shape, packed.device)).any():
            raise ValueError(f"the mask of {name} has padding bits set; they must be 0")
        if name in known and structure == "unstructured":
            continue
        mask = get_mask(module)
        try:
            check_structure(mask, structure, is_transposed(module))
        except ValueError as error:
            raise ValueError(f"the mask of {name}: {error}") from None
        if ((weight != 0) & ~mask).any():
            violations.append(name)
    return violations


def check_state_dict(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """As [`check_masks`], of the weights and masks in a state dict; only the zeros are looked at."""
    masked = [name for name in tensors if f"{name}_mask" in tensors and name.endswith("weight")]
    return [
        name
        for name in masked
        if is_plain(tensors[name])
        and not tensors[name].is_meta
        and ((tensors[name] != 0) & ~unpack_mask(tensors[f"{name}_mask"], tensors[name].shape)).any()
    ]


def is_plain(weight: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor of floating point numbers, not one of a quantiser's."""
    return type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point()


def densify(model: nn.Module) -> None:
    """Gives all masks up: every weight may become non-zero, and the checkpoint carries no masks any more."""
    for module in list(masked_modules(model).values()):
        del module.weight_mask
    if hasattr(getattr(model, "config", None), "masked_modules"):
        model.config.masked_modules = []
        model.config.mask_structure = "unstructured"


def freeze_topology(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
    """Keeps the masks through fine-tuning: they are re-applied after every step of ``optimizer``.

    Returns:
        The hook's handle; ``handle.remove()`` ends it.
    """
    inactive = [(module.weight, ~get_mask(module)) for module in masked_modules(model).values()]

    @torch.no_grad()
    def reapply(*_) -> None:
        for weight, outside in inactive:
            local(weight).masked_fill_(outside, 0)

    reapply()
    return optimizer.register_step_post_hook(reapply)


def overall_density(model: nn.Module) -> float:
    """Share of active weights among the masked ones; 1.0 for a model without masks."""
    modules = masked_modules(model).values()
    total = sum(module.weight.numel() for module in modules)
    return sum(count_active(module.weight_mask) for module in modules) / total if total else 1.0
