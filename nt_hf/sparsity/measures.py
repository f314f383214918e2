"""What is measured of masked tensors while they train: densities, gradient norms, dead units, overlap of heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from ..models.masks import count_active, is_transposed, local
from ..models.multi_head import MultiHeadMixin
from ..text import markdown_table
from .selection import Reduce, count_set, no_reduction
from .tensor_state import TensorState


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
            ``None`` of a model that is not multi-headed (see ``MultiHeadMixin``).
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


def masks_by_head(model: nn.Module, heads: Sequence[int] | None = None) -> list[dict[str, torch.Tensor]]:
    """The packed masks of each head, or of these, by names that are the same in all heads.

    The model may be wrapped; one that is not multi-headed has none. Of a sharded one they are this process's rows.
    """
    model = next((module for module in model.modules() if isinstance(module, MultiHeadMixin)), None)
    if model is None:
        return []
    chosen = range(model.config.num_ensemble_heads) if heads is None else heads
    modules_by_head = [model.head_modules(head).items() for head in chosen]
    return [
        {name: local(module.weight_mask) for name, module in modules if hasattr(module, "weight_mask")}
        for modules in modules_by_head
    ]


def head_overlap(masks: Sequence[Mapping[str, torch.Tensor]], reduce: Reduce = no_reduction) -> float | None:
    """Mean Jaccard overlap of the masks of every two heads, see [`masks_by_head`]; ``None`` if none can be compared.

    Masks of the same name and shape are compared. ``reduce`` sums counts over the processes that hold the other rows.
    """
    counts = []
    for first, second in combinations(masks, 2):
        pairs = [(mask, second[name]) for name, mask in first.items() if name in second]
        pairs = [(a, b) for a, b in pairs if a.shape == b.shape]
        counts.append([sum(count_active(a & b) for a, b in pairs), sum(count_active(a | b) for a, b in pairs)])
    if not any(masks):
        return None
    device = next(mask.device for head in masks for mask in head.values())
    overlaps = [both / either for both, either in reduce(torch.tensor(counts, device=device)).tolist() if either]
    return sum(overlaps) / len(overlaps) if overlaps else None


def gradient_norms(tensors: Sequence[TensorState], reduce: Reduce = no_reduction) -> tuple[float, float]:
    """Norms of the gradient of the active and of the inactive weights."""
    squares = []
    for tensor in tensors:
        grad, inactive = tensor.grad, tensor.inactive
        total_norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        inactive_norm = total_norm * 0
        if inactive is not None:
            inactive_norm = torch.linalg.vector_norm(grad.masked_fill(~inactive, 0), dtype=torch.float32)
        squares.append(torch.stack([total_norm, inactive_norm]).square())
    total, inactive = reduce(torch.stack(squares).sum(0)).tolist() if squares else (0.0, 0.0)
    return max(0.0, total - inactive) ** 0.5, inactive**0.5


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
