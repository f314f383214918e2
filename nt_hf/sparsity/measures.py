"""What is measured of masked tensors while they train: densities, gradient norms, dead units, overlap of heads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ..models.masks import count_active, is_transposed
from ..text import markdown_table
from .selection import Reduce, count_set, no_reduction
from .tensor_state import TensorState

# A weight of a head by its name, and which head that is.
_HEAD = re.compile(r"(?:^|\.)\w*heads\.(\d+)(?=\.)")


@dataclass(frozen=True)
class TopologyUpdate:
    """What one update did, over all masked tensors.

    Attributes:
        step: number of the optimizer step, from 1.
        drop_fraction: share of the active weights that was to move.
        requested: weights that were to move, before ``regrow="forbid"`` capped them.
        dropped: weights that were active and are not any more.
        grown: weights that were not active and are now. With ``regrow="allow"`` a dropped weight that was chosen
            again counts in neither, so both may be fewer than ``requested``.
        grown_kept: share of the weights grown at the previous update that are still active; ``None`` if none were.
        density: share of active weights.
        density_by_group: the same of each group of tensors, see [`group_of`].
        ever_active: share of weights that were active at any time, ITOP's exploration rate R (Liu et al. 2021).
        dead_rows: output units (rows of a linear weight, output channels) without an active weight.
        dead_columns: input units (columns, input channels) without an active weight.
        head_overlap: mean overlap (Jaccard: common active weights / active in either) of the masks of every two heads;
            ``None`` without heads, which are the parts of a model named ``…heads.<number>``.
        grad_norm_active: norm of the gradient of the weights active before the update.
        grad_norm_inactive: norm of the gradient of the inactive ones.
    """

    step: int
    drop_fraction: float
    requested: int
    dropped: int
    grown: int
    grown_kept: float | None
    density: float
    density_by_group: dict[str, float]
    ever_active: float
    dead_rows: int
    dead_columns: int
    head_overlap: float | None
    grad_norm_active: float
    grad_norm_inactive: float


@dataclass(frozen=True)
class DensityRow:
    """Density of one tensor, of a group of tensors, or overall; ``shape`` only for a tensor."""

    name: str
    shape: tuple[int, ...] | None
    size: int
    target: int
    active: int
    density: float


@dataclass(frozen=True)
class DensityReport:
    """Densities by tensor, by group (see [`group_of`]) and overall."""

    tensors: list[DensityRow]
    groups: list[DensityRow]
    overall: DensityRow

    def __str__(self) -> str:
        """A table of the groups and of all; each tensor's row is in ``tensors``."""
        rows = [["weights", "tensors", "size", "target", "active", "density"]]
        for row in (*self.groups, self.overall):
            tensors = sum(row is self.overall or group_of(tensor.name) == row.name for tensor in self.tensors)
            counts = (f"{count:,}" for count in (tensors, row.size, row.target, row.active))
            rows.append([row.name, *counts, f"{row.density:.4f}"])
        return markdown_table(rows)


def group_of(name: str) -> str:
    """Group of a weight, for reports: its name up to the first number.

    "model.layers.3.mlp.up_proj.weight" → "model.layers", "lm_heads.0.weight" → "lm_heads"; without a number the
    module's name, "model.embed_tokens.weight" → "model.embed_tokens".
    """
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0]] if numbers else parts[:-1]) or name


def density_report(tensors: Mapping[str, TensorState], active: Sequence[int]) -> DensityReport:
    """The report of some tensors by name, and of the numbers of their active weights."""

    def row(name: str, shape: tuple[int, ...] | None, size: int, target: int, active: int) -> DensityRow:
        return DensityRow(name, shape, size, target, active, active / size if size else 1.0)

    def total(name: str, rows: list[DensityRow]) -> DensityRow:
        return row(name, None, *(sum(getattr(row, key) for row in rows) for key in ("size", "target", "active")))

    rows = [
        row(name, tuple(tensor.weight.shape), tensor.weight.numel(), tensor.target, count)
        for (name, tensor), count in zip(tensors.items(), active)
    ]
    groups = dict.fromkeys(group_of(row.name) for row in rows)
    by_group = [total(group, [row for row in rows if group_of(row.name) == group]) for group in groups]
    return DensityReport(rows, by_group, total("overall", rows))


def head_overlap(masks: Mapping[str, torch.Tensor], reduce: Reduce = no_reduction) -> float | None:
    """Mean Jaccard overlap of the masks of every two heads, from packed masks by weight name.

    Heads are the parts named ``…heads.<number>``; weights of the same name in two heads are compared. ``None`` where no
    two heads have one. ``reduce`` sums counts over the processes that hold the other rows.
    """
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for name, packed in masks.items():
        if match := _HEAD.search(name):
            without_number = name[: match.start(1)] + name[match.end(1) :]
            heads.setdefault(match.group(1), {})[without_number] = packed
    counts = []
    for one, other in combinations(heads.values(), 2):
        pairs = [(one[name], other[name]) for name in one if name in other and one[name].shape == other[name].shape]
        counts.append([sum(count_active(a & b) for a, b in pairs), sum(count_active(a | b) for a, b in pairs)])
    if not counts:
        return None
    summed = reduce(torch.tensor(counts, device=next(iter(masks.values())).device)).tolist()
    overlaps = [both / either for both, either in summed if either]
    return sum(overlaps) / len(overlaps) if overlaps else None


def gradient_norms(tensors: Sequence[TensorState], reduce: Reduce = no_reduction) -> tuple[float, float]:
    """Norms of the gradient of the active and of the inactive weights."""
    squares = []
    for tensor in tensors:
        grad, inactive = tensor.grad, tensor.inactive
        everywhere = torch.linalg.vector_norm(grad, dtype=torch.float32)
        outside = everywhere * 0
        if inactive is not None:
            outside = torch.linalg.vector_norm(grad.masked_fill(~inactive, 0), dtype=torch.float32)
        squares.append(torch.stack([everywhere, outside]).square())
    everywhere, outside = reduce(torch.stack(squares).sum(0)).tolist() if squares else (0.0, 0.0)
    return max(0.0, everywhere - outside) ** 0.5, outside**0.5


def dead_units(tensors: Sequence[TensorState], reduce: Reduce = no_reduction) -> tuple[int, int]:
    """Output and input units of all masked tensors that have no active weight."""
    dead = [0, 0]
    for tensor in tensors:
        if tensor.inactive is None:
            continue
        # Units of the first dimension lie in one process each, those of the second are spread over all.
        active = ~tensor.inactive
        first = active.flatten(1).any(1)
        second = reduce(active.transpose(0, 1).flatten(1).sum(1))
        units = [tensor.weight.shape[0] - int(reduce(count_set(first))), int(torch.count_nonzero(second == 0))]
        for side, number in enumerate(reversed(units) if is_transposed(tensor.module) else units):
            dead[side] += number
    return dead[0], dead[1]
