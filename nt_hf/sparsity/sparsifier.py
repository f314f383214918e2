"""Dynamic sparse training of any module: binds the functions of `topology` to a model and its optimizer.

```python
config = SparsityConfig(density=0.9)
draw_masks(model, config)                                    # a fresh model; one from a checkpoint has its masks
optimizer = torch.optim.AdamW(model.parameters())
sparsifier = Sparsifier(model, optimizer, config, total_steps)
for batch in batches:
    model(batch).loss.backward()
    update = sparsifier.step()                               # after backward, before clipping
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # sees active weights only
    optimizer.step()
    optimizer.zero_grad()
```
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..checks import check, integer
from ..models.masks import (
    check_masks,
    check_structure,
    count_active,
    get_mask,
    group_count,
    is_transposed,
    local,
    masked_modules,
    pack_mask,
    set_mask,
)
from .config import SparsityConfig
from .density_report import DensityReport, DensityRow, group_of, total_row
from .first_masks import draw_masks, target_counts, warn_of_dense
from .schedules import last_update, linear, scheduled, update_due
from .selection import Reduce, count_set, whole
from .sharding import as_shard, first_row, sum_over_shards
from .topology import (
    DROP,
    SparseWeight,
    allocate,
    falling_counts,
    grow_weights,
    keep_weights,
    move_counts,
    redistribute,
)

__all__ = [
    "DensityReport",
    "DensityRow",
    "Sparsifier",
    "SparsityConfig",
    "TopologyUpdate",
    "draw_masks",
    "group_of",
    "head_overlap",
    "move_state",
    "target_counts",
]

logger = logging.getLogger(__name__)

# Their steps leave a weight at exactly 0 whose gradient and state are 0, weight decay included. After a step of any
# other optimizer the masks are re-applied.
_KEEPS_ZEROS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

_HOOKS: WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = WeakKeyDictionary()

# The state that optimizers keep of squared gradients: a grown weight starts with g**2 there (see `move_state`).
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")

# Decay of the averaged gradient by which "momentum" grows and redistributes (SNFS, Dettmers & Zettlemoyer 2019).
_MOMENTUM = 0.9

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


@dataclass
class _Masked:
    """A masked tensor while it trains; of a sharded one its tensors are this process's rows, its numbers of all."""

    module: nn.Module
    inactive: torch.Tensor | None  # bool, the weight's shape: unpacked once an update, not once a step; None if dense
    active: int
    target: int
    ever_active: torch.Tensor  # packed as the mask, as is last_grown
    last_grown: torch.Tensor
    momentum: torch.Tensor | None

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    @property
    def grad(self) -> torch.Tensor | None:
        return None if self.weight.grad is None else local(self.weight.grad)

    @property
    def packed(self) -> torch.Tensor:
        return local(self.module.weight_mask)


def head_overlap(masks: Mapping[str, torch.Tensor], reduce: Reduce = whole) -> float | None:
    """Mean Jaccard overlap of the masks of every two heads, from packed masks by weight name.

    Heads are the parts named ``…heads.<number>``; weights of the same name in two heads are compared. ``None`` where no
    two heads have one. ``reduce`` sums counts over the processes that hold the other rows.
    """
    heads: dict[str, dict[str, torch.Tensor]] = {}
    for name, packed in masks.items():
        if found := _HEAD.search(name):
            rest = name[: found.start(1)] + name[found.end(1) :]
            heads.setdefault(found.group(1), {})[rest] = packed
    counts = []
    for one, other in combinations(heads.values(), 2):
        pairs = [(one[name], other[name]) for name in one if name in other and one[name].shape == other[name].shape]
        counts.append([sum(count_active(a & b) for a, b in pairs), sum(count_active(a | b) for a, b in pairs)])
    if not counts:
        return None
    summed = reduce(torch.tensor(counts, device=next(iter(masks.values())).device)).tolist()
    overlaps = [both / either for both, either in summed if either]
    return sum(overlaps) / len(overlaps) if overlaps else None


class Sparsifier:
    """Keeps a model sparse while it trains, and moves its masks.

    Call [`step`] between ``backward`` and clipping, once for each real optimizer step (not for accumulated
    micro-batches; with a gradient scaler after ``unscale_``). Nothing else is needed: after steps of an optimizer that
    is not known to leave zeros at zero the masks are re-applied by a hook.

    Masks change here only. They depend on the weights, the gradients, the seed, the step and the names alone, so
    ranks with equal gradients have equal masks. Unless the density is scheduled or redistributed, each tensor keeps the
    number of active weights that it has now: a model loaded from a checkpoint keeps its masks whatever
    ``config.density`` says.

    Of a model that FSDP2 shards (see [`shard_model`]) every process keeps its rows, and all must call the same methods;
    equal gradients give the masks of the unsharded model bit for bit.

    Build it when the model lies on its device and its masks are there (see [`draw_masks`]).

    Args:
        model: any module that carries masks, wrapped or not. Without masks and with a dense ``config`` a `Sparsifier`
            does nothing, so that one loop trains dense models too.
        optimizer: the optimizer of its weights, wrapped by Accelerate or not.
        config: how the masks move.
        total_steps: optimizer steps of the whole run, of which ``config.update_start`` and ``update_end`` are shares.

    Raises:
        ValueError: ``config`` asks for a sparse model and ``model`` has no masks, a masked weight that trains is not
            the optimizer's, a weight is not 0 outside its mask, a mask has not the structure, or weights are sharded in
            a way that is not [`shard_model`]'s.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: SparsityConfig, total_steps: int
    ) -> None:
        check("total_steps", total_steps, integer(1))
        # Accelerate's wrapper has no hooks of its own.
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        self.model, self.optimizer, self.config, self.total_steps = model, optimizer, config, total_steps
        self.steps = 0  #: optimizer steps so far
        self._told_of_state = False
        self._reduce = _sum_of_shards(model, config.structure)
        self._tensors = self._read_masks()
        if config.is_sparse and not self._tensors:
            raise ValueError(
                f"density is {config.density:g} and the model carries no masks; accepted: a model whose masks "
                "draw_masks(model, config) or a checkpoint has set"
            )
        if self._tensors:
            warn_of_dense(model, config.exclude)
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        foreign = [
            name
            for name, tensor in self._tensors.items()
            if tensor.weight.requires_grad and id(tensor.weight) not in owned
        ]
        if foreign:
            raise ValueError(
                f"the optimizer does not own the masked weights {', '.join(foreign)}; accepted: one that does"
            )
        density = self.report().overall.density
        tolerance = 0.001 if config.structure == "unstructured" else 0.01  # whole weights a group
        if config.is_sparse and config.density_start is None and abs(density - config.density) > tolerance:
            logger.warning("the model's masks have density %.4g, not %.4g: they stand", density, config.density)
        self._first_counts = self._last_counts = None
        if config.density_start is not None:
            self._first_counts = target_counts(model, config, config.density_start)
            self._last_counts = target_counts(model, config)
        if type(optimizer) not in _KEEPS_ZEROS:
            if optimizer in _HOOKS:  # an earlier run's, whose masks are no longer true
                _HOOKS[optimizer].remove()
            _HOOKS[optimizer] = optimizer.register_step_post_hook(self._apply_masks)

    @property
    def _window(self) -> tuple[float, float]:
        """First and last step of the updates."""
        return self.config.update_start * self.total_steps, self.config.update_end * self.total_steps

    @property
    def update_is_next(self) -> bool:
        """Whether the next [`step`] updates the masks, and so needs the gradients of all weights to be finite."""
        return bool(self._tensors) and update_due(self.steps + 1, self.config.update_interval, *self._window)

    @torch.no_grad()
    def step(self) -> TopologyUpdate | None:
        """Updates the masks if an update is due, and zeros the gradients of inactive weights.

        An update needs the gradients of all weights, so it comes before the masking, and both before clipping. A
        frozen tensor keeps its mask.

        Returns:
            What the update did, or ``None`` when none was due.

        Raises:
            ValueError: at an update a weight or gradient is not finite, or a gradient is missing; all masks are then
                as before.
        """
        due = self.update_is_next
        self.steps += 1
        config = self.config
        update = None
        if config.needs_momentum:
            self._average_gradients()
        if due:
            drop_fraction = scheduled(
                config.drop_schedule, self.steps, *self._window, config.drop_fraction, config.drop_fraction_end
            )
            update = self._update(drop_fraction)
        for tensor in self._tensors.values():
            if tensor.inactive is not None and tensor.grad is not None:
                tensor.grad.masked_fill_(tensor.inactive, 0)
        return update

    def _average_gradients(self) -> None:
        pairs = [(tensor.momentum, tensor.grad) for tensor in self._tensors.values() if tensor.grad is not None]
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs)), weight=1 - _MOMENTUM)

    def _update(self, drop_fraction: float) -> TopologyUpdate:
        config = self.config
        targets = self._next_targets()
        moving = {
            name: tensor
            for name, tensor in self._tensors.items()
            if tensor.weight.requires_grad and min(tensor.active, targets[name]) < tensor.weight.numel()
        }
        for name, tensor in moving.items():
            if tensor.grad is None:
                raise ValueError(
                    f"step {self.steps}: {name} has no gradient at a topology update; accepted: backward before step, "
                    "and requires_grad=False for weights that take no part"
                )
        # All new masks before the first change, so that an error leaves everything as it was.
        weights = {name: self._as_weight(name, tensor) for name, tensor in moving.items()}
        together = [list(moving)] if DROP[config.drop].over_all else [[name] for name in moving]
        kept = {
            name: mask
            for names in filter(None, together)
            for name, mask in zip(
                names,
                keep_weights(
                    [weights[name] for name in names],
                    [targets[name] for name in names],
                    drop_fraction=drop_fraction,
                    drop=config.drop,
                    regrow=config.regrow,
                ),
            )
        }
        requested = sum(
            move_counts(tensor.active, tensor.weight.numel(), drop_fraction, target=targets[name])[1]
            for name, tensor in moving.items()
        )
        if config.redistribute != "none":
            targets |= self._redistributed(weights, kept, sum(targets[name] for name in moving))
        new_masks = {}
        for name, weight in weights.items():
            target = targets[name]
            new_masks[name] = grow_weights(weight, kept.pop(name), target, grow=config.grow, regrow=config.regrow)

        norms = self._gradient_norms(moving)
        counts = []
        for name, tensor in moving.items():
            mask, weight, old = new_masks.pop(name), tensor.weight, weights.pop(name).mask
            gone, come = old & ~mask, mask & ~old
            set_mask(tensor.module, mask)
            self._tell_of_state(name, move_state(self.optimizer.state.get(weight, {}), tensor.grad, gone, come))
            still = count_active(tensor.last_grown & tensor.packed)
            counts.append([int(count_set(gone)), int(count_set(come)), still, count_active(tensor.last_grown)])
            tensor.last_grown = pack_mask(come)
            tensor.active = tensor.target = targets[name]
            tensor.inactive = None if tensor.active == weight.numel() else ~mask
            tensor.ever_active |= tensor.packed
        dropped, grown, grown_kept, were_grown = self._sum([sum(column) for column in zip(*counts)] or [0] * 4)
        if config.regrow == "forbid" and dropped < requested:
            logger.info("step %d: %d of %d weights moved, for want of inactive ones", self.steps, dropped, requested)
        report = self.report()
        dead_rows, dead_columns = self._dead_units()
        return TopologyUpdate(
            step=self.steps,
            drop_fraction=drop_fraction,
            requested=requested,
            dropped=dropped,
            grown=grown,
            grown_kept=grown_kept / were_grown if were_grown else None,
            density=report.overall.density,
            density_by_group={row.name: row.density for row in report.groups},
            ever_active=self.ever_active(),
            dead_rows=dead_rows,
            dead_columns=dead_columns,
            head_overlap=head_overlap({name: each.packed for name, each in self._tensors.items()}, self._reduce),
            grad_norm_active=norms[0],
            grad_norm_inactive=norms[1],
        )

    def _next_targets(self) -> dict[str, int]:
        """Active weights of each tensor after this update, unless they are redistributed."""
        now = {name: tensor.target for name, tensor in self._tensors.items()}
        if self._first_counts is None:
            return now
        start, end = self._window
        # The last update reaches the final density, however far it lies before the end.
        end = last_update(self.config.update_interval, start, end)
        progress = scheduled(self.config.density_schedule, self.steps, start, end, 0.0, 1.0)
        first, last = self._first_counts, self._last_counts
        if self.config.redistribute != "none":
            total = sum(first.values()) + progress * (sum(last.values()) - sum(first.values()))
            return allocate(round(total), now, {name: each.weight.numel() for name, each in self._tensors.items()})
        if self.config.structure == "unstructured":
            return falling_counts(now, first, last, progress)
        targets = {}
        for name, tensor in self._tensors.items():
            groups = group_count(tensor.weight.shape, self.config.structure, is_transposed(tensor.module))
            targets[name] = round((first[name] + progress * (last[name] - first[name])) / groups) * groups
        return targets

    def _as_weight(self, name: str, tensor: _Masked) -> SparseWeight:
        config = self.config
        weight, first = local(tensor.weight), config.drop_exponent
        last = first if config.drop_exponent_end is None else config.drop_exponent_end
        return SparseWeight(
            mask=torch.ones_like(weight, dtype=torch.bool) if tensor.inactive is None else ~tensor.inactive,
            weight=weight,
            grad=tensor.grad,
            momentum=tensor.momentum,
            name=name,
            seed=config.seed,
            step=self.steps,
            exponent=linear(self.steps, *self._window, first, last),
            mest_lambda=config.mest_lambda,
            random_share=config.random_share,
            structure=config.structure,
            transposed=is_transposed(tensor.module),
            offset=first_row(tensor.weight) * weight[:1].numel(),
            reduce=self._reduce,
        )

    def _redistributed(
        self, weights: Mapping[str, SparseWeight], kept: Mapping[str, torch.Tensor], total: int
    ) -> dict[str, int]:
        """Targets when what grows goes where the active weights' gradients are large."""
        shares, room = {}, {}
        counts = dict(zip(kept, self._sum([int(count_set(mask)) for mask in kept.values()])))
        for name, weight in weights.items():
            values = weight.momentum if self.config.redistribute == "momentum" else weight.grad
            # Row by row, in the order of the whole tensor: the sum does not depend on how it is sharded.
            rows = values.new_zeros(self._tensors[name].weight.shape[0], dtype=torch.float64)
            first = first_row(self._tensors[name].weight)
            active = values.abs().masked_fill_(~weight.mask, 0)
            rows[first : first + len(active)] = active.flatten(1).sum(1, dtype=torch.float64)
            shares[name] = float(self._reduce(rows).sum()) / max(1, weight.active)
            room[name] = weight.size - (counts[name] if self.config.regrow == "allow" else weight.active)
        return redistribute(counts, room, total, shares)

    def _gradient_norms(self, tensors: Mapping[str, _Masked]) -> tuple[float, float]:
        """Norms of the gradient of the active and of the inactive weights."""
        squares = []
        for tensor in tensors.values():
            grad, inactive = tensor.grad, tensor.inactive
            everywhere = torch.linalg.vector_norm(grad, dtype=torch.float32)
            outside = everywhere * 0
            if inactive is not None:
                outside = torch.linalg.vector_norm(grad.masked_fill(~inactive, 0), dtype=torch.float32)
            squares.append(torch.stack([everywhere, outside]).square())
        everywhere, outside = self._reduce(torch.stack(squares).sum(0)).tolist() if squares else (0.0, 0.0)
        return max(0.0, everywhere - outside) ** 0.5, outside**0.5

    def _dead_units(self) -> tuple[int, int]:
        """Output and input units of all masked tensors that have no active weight."""
        dead = [0, 0]
        for tensor in self._tensors.values():
            if tensor.inactive is None:
                continue
            # Units of the first dimension lie in one process each, those of the second are spread over all.
            active = ~tensor.inactive
            first = active.flatten(1).any(1)
            second = self._reduce(active.transpose(0, 1).flatten(1).sum(1))
            (alive,) = self._sum([int(count_set(first))])
            units = [tensor.weight.shape[0] - alive, int(torch.count_nonzero(second == 0))]
            for side, number in enumerate(reversed(units) if is_transposed(tensor.module) else units):
                dead[side] += number
        return dead[0], dead[1]

    def _tell_of_state(self, name: str, keys: list[str]) -> None:
        if keys and not self._told_of_state:
            self._told_of_state = True
            logger.warning(
                "%s keeps %s of %s in another shape than the weight's: it stays as it is when weights move",
                type(self.optimizer).__name__,
                ", ".join(keys),
                name,
            )

    @torch.no_grad()
    def _apply_masks(self, *_) -> None:
        for tensor in self._tensors.values():
            if tensor.inactive is not None:
                local(tensor.weight).masked_fill_(tensor.inactive, 0)

    @torch.no_grad()
    def _read_masks(self) -> dict[str, _Masked]:
        if violations := check_masks(self.model):
            raise ValueError(
                f"weights outside their mask are not 0 in {', '.join(violations)}; accepted: zeros, as "
                "nt_hf.apply_masks(model) writes them"
            )
        tensors = {}
        for name, module in masked_modules(self.model).items():
            try:
                check_structure(get_mask(module), self.config.structure, is_transposed(module))
            except ValueError as error:
                raise ValueError(f"the mask of {name}: {error}") from None
            if getattr(module, "sparse", False):
                raise ValueError(f"{name} has sparse gradients; accepted: an embedding with sparse=False")
            packed = local(module.weight_mask)
            (active,) = self._sum([count_active(packed)])
            inactive = None if active == module.weight.numel() else ~get_mask(module)
            if inactive is not None:  # an optimizer that ran before may hold moments of weights that are now dead
                nothing = torch.zeros_like(inactive)
                move_state(self.optimizer.state.get(module.weight, {}), None, inactive, nothing)
            momentum = torch.zeros_like(local(module.weight)) if self.config.needs_momentum else None
            tensors[name] = _Masked(
                module, inactive, active, active, packed.clone(), torch.zeros_like(packed), momentum
            )
        return tensors

    def _sum(self, counts: list[int]) -> list[int]:
        """Counts of this process's rows, summed over all rows."""
        if self._reduce is whole:
            return counts
        return self._reduce(torch.tensor(counts, device=self._device)).tolist()

    @property
    def _device(self) -> torch.device:
        return next(module.weight.device for module in masked_modules(self.model).values())

    def ever_active(self) -> float:
        """Share of the masked weights that were active at any time so far; 1.0 without masks."""
        size = sum(tensor.weight.numel() for tensor in self._tensors.values())
        (ever,) = self._sum([sum(count_active(tensor.ever_active) for tensor in self._tensors.values())])
        return ever / size if size else 1.0

    def report(self) -> DensityReport:
        """Target and actual number of active weights of each masked tensor, each group, and overall.

        The actual numbers are counted in the model's packed masks.
        """
        tensors = []
        counts = self._sum([count_active(tensor.packed) for tensor in self._tensors.values()])
        for (name, tensor), active in zip(self._tensors.items(), counts):
            size = tensor.weight.numel()
            shape = tuple(tensor.weight.shape)
            tensors.append(DensityRow(name, shape, size, tensor.target, active, active / size if size else 1.0))
        groups = dict.fromkeys(group_of(row.name) for row in tensors)
        return DensityReport(
            tensors,
            [total_row(group, [row for row in tensors if group_of(row.name) == group]) for group in groups],
            total_row("overall", tensors),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs beside the model and the optimizer, tensors only (so safetensors can hold it).

        ``steps`` int64 []; of each masked tensor ``target.<name>`` int64 [], ``ever_active.<name>`` and
        ``last_grown.<name>`` uint8, packed as its mask, and where updates need it ``momentum.<name>``, of the weight's
        shape and type. Of a sharded weight they are sharded alike.
        """
        state = {"steps": torch.tensor(self.steps)}
        for name, tensor in self._tensors.items():
            state[f"target.{name}"] = torch.tensor(tensor.target)
            state |= {
                f"{kind}.{name}": as_shard(value.clone(memory_format=torch.contiguous_format), tensor.weight)
                for kind, value in _saved(tensor).items()
            }
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from `state_dict`. Load the model and the optimizer first: the masks are read from the model.

        Raises:
            ValueError: the state belongs to other masks: other tensors, other shapes, or other numbers of active
                weights.
        """
        tensors = self._read_masks()
        wanted = {"steps"} | {f"{kind}.{name}" for name in tensors for kind in ("target", *_saved(tensors[name]))}
        if differing := sorted(wanted.symmetric_difference(state)):
            raise ValueError(
                f"the sparsifier's state does not fit the model's masks: {differing[0]} is "
                f"{'missing' if differing[0] in wanted else 'unknown'} ({len(differing)} such entries)"
            )
        for name, tensor in tensors.items():
            target, ours = int(state[f"target.{name}"]), _saved(tensor)
            theirs = {kind: local(state[f"{kind}.{name}"]) for kind in ours}
            differing = [kind for kind in ours if theirs[kind].shape != ours[kind].shape]
            if target != tensor.active or differing:
                raise ValueError(
                    f"the sparsifier's state does not fit the mask of {name}: it is for {target} active weights, the "
                    f"model has {tensor.active}"
                    + "".join(
                        f"; {kind} {list(theirs[kind].shape)}, not {list(ours[kind].shape)}" for kind in differing
                    )
                )
            if (tensor.packed & ~theirs["ever_active"].to(tensor.ever_active.device)).any():
                raise ValueError(f"the sparsifier's state is of another run: its mask of {name} had other weights")
            for kind, value in ours.items():
                value.copy_(theirs[kind])
        self.steps, self._tensors = int(state["steps"]), tensors


def _sum_of_shards(model: nn.Module, structure: str) -> Reduce:
    """How to sum over the processes that share the masked weights of a model."""
    weights = {name: module.weight for name, module in masked_modules(model).items()}
    sharded = [name for name, weight in weights.items() if hasattr(weight, "device_mesh")]
    if not sharded:
        return whole
    if len(sharded) < len(weights):
        raise ValueError("some masked weights are sharded and others are not; accepted: all of them, or none")
    first = weights[sharded[0]]
    for name, module in masked_modules(model).items():
        first_row(weights[name])  # refuses what is not split by rows
        if weights[name].device_mesh != first.device_mesh or not hasattr(module.weight_mask, "device_mesh"):
            raise ValueError(f"the mask of {name} is not sharded as its weight; accepted: models from shard_model")
        if structure != "unstructured" and is_transposed(module):
            raise ValueError(f"structure is {structure} and {name} has its inputs first; accepted when sharded: linear")
    return partial(sum_over_shards, weight=first)


def _saved(tensor: _Masked) -> dict[str, torch.Tensor]:
    """The tensors of a masked tensor that a resumed run needs."""
    momentum = {} if tensor.momentum is None else {"momentum": tensor.momentum}
    return {"ever_active": tensor.ever_active, "last_grown": tensor.last_grown, **momentum}


@torch.no_grad()
def move_state(
    state: dict[str, object], grad: torch.Tensor | None, dropped: torch.Tensor, grown: torch.Tensor
) -> list[str]:
    """Adapts the optimizer's state of one weight, in place, to weights that moved.

    All per-element state of moved weights becomes 0, but the second moment of grown ones, which starts at ``g**2``.
    With both moments 0 and a bias correction long past, Adam's first step of a grown weight would be several times the
    learning rate, and noise alone would make it large enough to survive the next drop.

    Args:
        state: the optimizer's state of the weight, such as ``{"step": …, "exp_avg": …, "exp_avg_sq": …}``.
        grad: the dense gradient of this step; may be ``None`` when nothing grows.
        dropped, grown: bool, of the weight's shape.

    Returns:
        Keys of tensors of another shape (a factored second moment, for example), left as they are.
    """
    other_shape = []
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.dim() < dropped.dim()):
            continue  # counters
        value = local(value)
        if value.shape != dropped.shape:
            other_shape.append(key)
            continue
        value.masked_fill_(dropped | grown, 0)
        if grad is not None and key in _SECOND_MOMENTS:
            value.copy_(torch.where(grown, grad.square().to(value.dtype), value))
    return other_shape
