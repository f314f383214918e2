"""Dynamic sparse training of any module: binds the functions of `update` to a model and its optimizer.

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
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..checks import check, integer
from ..models.masks import count_active, group_count, is_transposed, local, pack_mask, set_mask
from .config import SparsityConfig
from .criteria import DROP, MaskedWeight
from .densities import allocate, falling_counts, redistribute
from .first_masks import target_counts, warn_of_dense
from .measures import (
    DensityReport,
    TopologyUpdate,
    dead_units,
    density_report,
    gradient_norms,
    head_overlap,
    masks_by_head,
)
from .optimizer_state import DenseSecondMoments, move_state
from .schedules import SCHEDULES, last_update, linear, update_due
from .selection import count_set, no_reduction
from .sharding import as_shard, first_row
from .tensor_state import TensorState, read_masks, sum_of_shards
from .update import grow_weights, keep_weights, move_counts

logger = logging.getLogger(__name__)

# Their steps leave a weight at exactly 0 whose gradient and state are 0, weight decay included. After a step of any
# other optimizer the masks are re-applied.
_KEEPS_ZEROS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

_HOOKS: WeakKeyDictionary[torch.optim.Optimizer, RemovableHandle] = WeakKeyDictionary()

# Decay of the averaged gradient by which "momentum" grows and redistributes (SNFS, Dettmers & Zettlemoyer 2019).
_MOMENTUM = 0.9


class Sparsifier:
    """Keeps a model sparse while it trains, and moves its masks.

    Call [`step`] between ``backward`` and clipping, once for each real optimizer step (not for accumulated
    micro-batches; with a gradient scaler after ``unscale_``). Nothing else is needed: after steps of an optimizer that
    is not known to leave zeros at zero the masks are re-applied by a hook, and another brings dense second moments on
    (``config.second_moments``).

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
            the optimizer's, a weight is not 0 outside its mask, a mask has not the structure, weights are sharded in a
            way that is not [`shard_model`]'s, or the optimizer has no second moments that could be dense.
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
        self._warned_of_state = False
        self._reduce = sum_of_shards(model, config.structure)
        self._tensors = read_masks(model, optimizer, config, self._reduce)
        if config.is_sparse and not self._tensors:
            raise ValueError(
                f"density={config.density:g}: the model carries no masks; accepted is a model whose masks "
                "draw_masks(model, config) or a checkpoint has set"
            )
        if self._tensors:
            warn_of_dense(model, config.exclude)
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        not_owned = [
            name
            for name, tensor in self._tensors.items()
            if tensor.weight.requires_grad and id(tensor.weight) not in owned
        ]
        if not_owned:
            raise ValueError(
                f"optimizer: does not own the masked weights {', '.join(not_owned)}; accepted is one that does"
            )
        density = self.report().overall.density
        tolerance = 0.001 if config.structure == "unstructured" else 0.01  # a group's count is a whole number
        if config.is_sparse and config.density_start is None and abs(density - config.density) > tolerance:
            logger.warning("the model's masks have density %.4g, not %.4g: they stand", density, config.density)
        self._first_counts = self._last_counts = None
        if config.density_start is not None:
            self._first_counts = target_counts(model, config, config.density_start)
            self._last_counts = target_counts(model, config)
        self._second_moments: DenseSecondMoments | None = None
        if config.second_moments == "dense" and self._tensors:
            self._second_moments = DenseSecondMoments(optimizer)
        if optimizer in _HOOKS:  # an earlier run's, whose masks are no longer true
            _HOOKS.pop(optimizer).remove()
        if type(optimizer) not in _KEEPS_ZEROS or self._second_moments:
            _HOOKS[optimizer] = optimizer.register_step_post_hook(self._after_optimizer_step)

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
            schedule = SCHEDULES[config.drop_schedule]
            drop_fraction = schedule(self.steps, *self._window, config.drop_fraction, config.drop_fraction_end)
            update = self._update(drop_fraction)
        masked = [t for t in self._tensors.values() if t.inactive is not None and t.grad is not None]
        if self._second_moments:
            self._second_moments.mask([(tensor.weight, tensor.inactive) for tensor in masked])
        else:
            for tensor in masked:
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
                    f"step {self.steps}: {name} has no gradient at a topology update; accepted is backward before "
                    "step, and requires_grad=False for weights that take no part"
                )
        requested = sum(
            move_counts(tensor.active, tensor.weight.numel(), drop_fraction, target=targets[name])[1]
            for name, tensor in moving.items()
        )
        # All new masks before the first change, so that an error leaves everything as it was.
        weights = {name: self._as_weight(name, tensor) for name, tensor in moving.items()}
        new_masks = self._new_masks(weights, targets, drop_fraction)
        norm_active, norm_inactive = gradient_norms(list(moving.values()), self._reduce)
        counts = []
        for name, tensor in moving.items():
            mask, weight, old = new_masks.pop(name), tensor.weight, weights.pop(name).mask
            dropped, grown = old & ~mask, mask & ~old
            set_mask(tensor.module, mask)
            state = self.optimizer.state.get(weight, {})
            self._warn_of_state(name, move_state(state, tensor.grad, dropped, grown, config.second_moments))
            moved = [int(count_set(dropped)), int(count_set(grown))]
            counts.append([*moved, count_active(tensor.last_grown & tensor.packed), count_active(tensor.last_grown)])
            tensor.last_grown = pack_mask(grown)
            tensor.active = tensor.target = targets[name]
            tensor.inactive = None if tensor.active == weight.numel() else ~mask
            tensor.ever_active |= tensor.packed
        dropped, grown, grown_kept, grown_before = self._sum([sum(column) for column in zip(*counts)] or [0] * 4)
        if config.regrow == "forbid" and dropped < requested:
            logger.info("step %d: %d of %d weights moved, for want of inactive ones", self.steps, dropped, requested)
        report = self.report()
        dead_rows, dead_columns = dead_units(list(self._tensors.values()), self._reduce)
        return TopologyUpdate(
            step=self.steps,
            drop_fraction=drop_fraction,
            requested=requested,
            dropped=dropped,
            grown=grown,
            grown_kept=grown_kept / grown_before if grown_before else None,
            density=report.overall.density,
            density_by_group={row.name: row.density for row in report.groups},
            ever_active=self.ever_active(),
            dead_rows=dead_rows,
            dead_columns=dead_columns,
            head_overlap=head_overlap(masks_by_head(self.model), self._reduce),
            grad_norm_active=norm_active,
            grad_norm_inactive=norm_inactive,
        )

    def _new_masks(
        self, weights: Mapping[str, MaskedWeight], targets: dict[str, int], drop_fraction: float
    ) -> dict[str, torch.Tensor]:
        """The masks after this update; where active weights are redistributed, ``targets`` is changed to match."""
        config, kept = self.config, {}
        for names in [list(weights)] if DROP[config.drop].over_all else [[name] for name in weights]:
            methods = {"drop_fraction": drop_fraction, "drop": config.drop, "regrow": config.regrow}
            masks = keep_weights([weights[name] for name in names], [targets[name] for name in names], **methods)
            kept |= zip(names, masks)
        if config.redistribute != "none":
            targets |= self._redistributed(weights, kept, sum(targets[name] for name in weights))
        return {
            name: grow_weights(weight, kept.pop(name), targets[name], grow=config.grow, regrow=config.regrow)
            for name, weight in weights.items()
        }

    def _next_targets(self) -> dict[str, int]:
        """Active weights of each tensor after this update, unless they are redistributed."""
        current = {name: tensor.target for name, tensor in self._tensors.items()}
        if self._first_counts is None:
            return current
        start, end = self._window
        # The last update reaches the final density, however far it lies before the end.
        end = last_update(self.config.update_interval, start, end)
        progress = SCHEDULES[self.config.density_schedule](self.steps, start, end, 0.0, 1.0)
        first, last = self._first_counts, self._last_counts
        if self.config.redistribute != "none":
            total = sum(first.values()) + progress * (sum(last.values()) - sum(first.values()))
            room = {name: tensor.weight.numel() for name, tensor in self._tensors.items()}
            return allocate(round(total), current, room)
        if self.config.structure == "unstructured":
            return falling_counts(current, first, last, progress)
        targets = {}
        for name, tensor in self._tensors.items():
            groups = group_count(tensor.weight.shape, self.config.structure, is_transposed(tensor.module))
            targets[name] = round((first[name] + progress * (last[name] - first[name])) / groups) * groups
        return targets

    def _as_weight(self, name: str, tensor: TensorState) -> MaskedWeight:
        config = self.config
        weight, first = local(tensor.weight), config.drop_exponent
        last = first if config.drop_exponent_end is None else config.drop_exponent_end
        return MaskedWeight(
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
        self, weights: Mapping[str, MaskedWeight], kept: Mapping[str, torch.Tensor], total: int
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

    def _warn_of_state(self, name: str, keys: list[str]) -> None:
        if keys and not self._warned_of_state:
            self._warned_of_state = True
            logger.warning(
                "%s keeps %s of %s in another shape than the weight's: it stays as it is when weights move",
                type(self.optimizer).__name__,
                ", ".join(keys),
                name,
            )

    @torch.no_grad()
    def _after_optimizer_step(self, *_) -> None:
        if type(self.optimizer) not in _KEEPS_ZEROS:
            for tensor in self._tensors.values():
                if tensor.inactive is not None:
                    local(tensor.weight).masked_fill_(tensor.inactive, 0)
        if self._second_moments:
            self._second_moments.average()

    def _sum(self, counts: list[int]) -> list[int]:
        """Counts of this process's rows, summed over all rows."""
        if self._reduce is no_reduction:
            return counts
        device = next(iter(self._tensors.values())).weight.device
        return self._reduce(torch.tensor(counts, device=device)).tolist()

    def ever_active(self) -> float:
        """Share of the masked weights that were active at any time so far; 1.0 without masks."""
        size = sum(tensor.weight.numel() for tensor in self._tensors.values())
        (ever,) = self._sum([sum(count_active(tensor.ever_active) for tensor in self._tensors.values())])
        return ever / size if size else 1.0

    def report(self) -> DensityReport:
        """Target and actual number of active weights of each masked tensor, each group, and overall.

        The actual numbers are counted in the model's packed masks.
        """
        counts = self._sum([count_active(tensor.packed) for tensor in self._tensors.values()])
        return density_report(self._tensors, counts)

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
                for kind, value in tensor.saved().items()
            }
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from `state_dict`. Load the model and the optimizer first: the masks are read from the model.

        Raises:
            ValueError: the state belongs to other masks: other tensors, other shapes, or other numbers of active
                weights.
        """
        tensors = read_masks(self.model, self.optimizer, self.config, self._reduce)
        keys = {"steps"} | {f"{kind}.{name}" for name in tensors for kind in ("target", *tensors[name].saved())}
        if differing := sorted(keys.symmetric_difference(state)):
            raise ValueError(
                f"the sparsifier's state does not fit the model's masks: {differing[0]} is "
                f"{'missing' if differing[0] in keys else 'unknown'} ({len(differing)} such entries)"
            )
        for name, tensor in tensors.items():
            target, current = int(state[f"target.{name}"]), tensor.saved()
            loaded = {kind: local(state[f"{kind}.{name}"]) for kind in current}
            differing = [kind for kind in current if loaded[kind].shape != current[kind].shape]
            if target != tensor.active or differing:
                raise ValueError(
                    f"the sparsifier's state does not fit the mask of {name}: it is for {target} active weights, the "
                    f"model has {tensor.active}"
                    + "".join(
                        f"; {kind} {list(loaded[kind].shape)}, not {list(current[kind].shape)}" for kind in differing
                    )
                )
            if (tensor.packed & ~loaded["ever_active"].to(tensor.ever_active.device)).any():
                raise ValueError(f"the sparsifier's state is of another run: its mask of {name} had other weights")
            for kind, value in current.items():
                value.copy_(loaded[kind])
        self.steps, self._tensors = int(state["steps"]), tensors
        if self._second_moments:
            self._second_moments.forget()
