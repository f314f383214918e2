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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .masks import (
    attach_masks,
    check_masks,
    count_active,
    get_mask,
    maskable_modules,
    masked_modules,
    matches,
    set_mask,
)
from .schedules import SCHEDULES, scheduled, update_due
from .topology import DISTRIBUTIONS, DROP, GROW, REGROW, active_counts, look_up, move_counts, random_mask, update_mask

logger = logging.getLogger(__name__)

# Their steps leave a weight at exactly 0 whose gradient and state are 0, weight decay included. After a step of any
# other optimizer the masks are re-applied.
_KEEPS_ZEROS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)

# The state that optimizers keep of squared gradients: a grown weight starts with g**2 there (see `move_state`).
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg")


@dataclass
class SparsityConfig:
    """What is sparse, how sparse, and how the masks move.

    Attributes:
        density: share of active weights among all masked ones, in (0, 1]; 1 without ``densities`` means dense.
        distribution: of the active weights over the tensors: "uniform", "er" or "erk".
        densities: fixed densities by glob of weight names, such as ``{"lm_heads.*": 0.8}``, the last fitting glob
            decides; the other tensors share what ``density`` leaves.
        exclude: globs of weights that stay dense and carry no mask.
        drop: which weights an update keeps: "magnitude" or "soft_magnitude".
        grow: which positions it activates: "gradient" (RigL) or "random" (SET).
        regrow: "allow" lets a weight just dropped be grown again, unchanged; "forbid" does not.
        drop_exponent: of soft magnitude, above 0.
        drop_fraction: share of a tensor's active weights that an update moves, in [0, 1], when updates begin.
        drop_fraction_end: the same when updates end.
        drop_schedule: between the two: "constant", "linear" or "cosine".
        update_interval: optimizer steps between updates; 0 keeps the masks as they are (static sparsity).
        update_start: share of the run before the first update, in [0, 1).
        update_end: share of the run after which the masks are fixed, in (0, 1], above ``update_start``.
        seed: of the first masks and of all later noise.

    Raises:
        ValueError: a field is out of its range; the message names it, its value and what is accepted.
    """

    density: float = 1.0
    distribution: str = "erk"
    densities: dict[str, float] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    drop: str = "soft_magnitude"
    grow: str = "gradient"
    regrow: str = "allow"
    drop_exponent: float = 3.0
    drop_fraction: float = 0.5
    drop_fraction_end: float = 0.005
    drop_schedule: str = "cosine"
    update_interval: int = 50
    update_start: float = 0.0
    update_end: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(name: str, valid: Callable[[Any], bool], accepted: str) -> None:
            value = getattr(self, name)
            if not valid(value):
                raise ValueError(f"{name} is {value!r}; accepted: {accepted}")

        check("density", lambda x: _is_number(x) and 0 < x <= 1, "a number in (0, 1]")
        look_up(DISTRIBUTIONS, "distribution", self.distribution)
        check(
            "densities",
            lambda x: isinstance(x, dict) and all(_is_number(value) and 0 < value <= 1 for value in x.values()),
            "a mapping from globs of weight names to numbers in (0, 1]",
        )
        check(
            "exclude",
            lambda x: isinstance(x, list | tuple) and all(isinstance(glob, str) for glob in x),
            "a list of globs of weight names",
        )
        look_up(DROP, "drop", self.drop)
        look_up(GROW, "grow", self.grow)
        look_up(dict.fromkeys(REGROW), "regrow", self.regrow)
        check("drop_exponent", lambda x: _is_number(x) and x > 0, "a number above 0")
        for name in ("drop_fraction", "drop_fraction_end"):
            check(name, lambda x: _is_number(x) and 0 <= x <= 1, "a number in [0, 1]")
        look_up(SCHEDULES, "drop_schedule", self.drop_schedule)
        check("update_interval", lambda x: _is_integer(x) and x >= 0, "an integer from 0 (static masks)")
        check("update_start", lambda x: _is_number(x) and 0 <= x < 1, "a share of the run in [0, 1)")
        check(
            "update_end",
            lambda x: _is_number(x) and self.update_start < x <= 1,
            f"a share of the run above update_start ({self.update_start}), up to 1",
        )
        check("seed", _is_integer, "an integer")

    @property
    def is_sparse(self) -> bool:
        """Whether it asks for masks at all."""
        return self.density < 1 or bool(self.densities)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)


# --------------------------------------------------------------------------------------------- the first masks


def target_counts(model: nn.Module, config: SparsityConfig) -> dict[str, int]:
    """Number of active weights that ``config`` gives each masked tensor of ``model``, by weight name.

    Raises:
        ValueError: a glob of ``densities`` fits no masked weight, or they leave an impossible remainder.
    """
    shapes = {name: tuple(module.weight.shape) for name, module in masked_modules(model).items()}
    fixed = {}
    for pattern, density in config.densities.items():
        fixed |= dict.fromkeys(_fitting("densities", pattern, shapes), density)
    return active_counts(shapes, config.density, config.distribution, fixed)


def _fitting(field: str, pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if fitting := [name for name in names if fnmatchcase(name, pattern)]:
        return fitting
    raise ValueError(
        f"{field}: the pattern {pattern!r} fits none of the {len(names)} weights that can carry a mask; "
        f"accepted: globs of names such as {', '.join(names[:3]) or 'none'}"
    )


def draw_masks(model: nn.Module, config: SparsityConfig) -> None:
    """Gives a fresh model its first masks, random ones at the densities of ``config``, and zeros what they exclude.

    A model that already carries masks, such as one whose config lists ``masked_modules``, keeps the choice of masked
    weights; any other gets masks on every linear, embedding and convolution weight. ``config.exclude`` is taken off
    in both cases, and the result is noted in ``model.config.masked_modules`` where there is such a field, so that a
    checkpoint declares its masks. Call it before the optimizer is built. A dense ``config`` attaches nothing.

    Raises:
        ValueError: a glob fits no weight, or the group densities leave an impossible remainder.
    """
    if not config.is_sparse and not masked_modules(model):
        return
    for pattern in config.exclude:
        _fitting("exclude", pattern, maskable_modules(model))
    declared = getattr(getattr(model, "config", None), "masked_modules", None)
    patterns = [*(declared or masked_modules(model) or ["*"]), *(f"!{pattern}" for pattern in config.exclude)]
    attach_masks(model, patterns)
    for name, module in masked_modules(model).items():
        if not matches(name, patterns):
            del module.weight_mask
    if declared is not None:
        model.config.masked_modules = list(dict.fromkeys(patterns))
    counts = target_counts(model, config)
    for name, module in masked_modules(model).items():
        weight = module.weight
        set_mask(module, random_mask(weight.shape, counts[name], seed=config.seed, name=name, device=weight.device))


# ------------------------------------------------------------------------------------------------- the sparsifier


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
        density: share of active weights.
        density_by_group: the same of each group of tensors, see [`group_of`].
        ever_active: share of weights that were active at any time, ITOP's exploration rate R (Liu et al. 2021).
    """

    step: int
    drop_fraction: float
    requested: int
    dropped: int
    grown: int
    density: float
    density_by_group: dict[str, float]
    ever_active: float


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


def group_of(name: str) -> str:
    """Group of a weight, for reports: its name up to the first number.

    "model.layers.3.mlp.up_proj.weight" → "model.layers", "lm_heads.0.weight" → "lm_heads"; without a number the
    module's name, "model.embed_tokens.weight" → "model.embed_tokens".
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0]] if numbers else parts[:-1]) or name


@dataclass
class _Masked:
    """A masked tensor while it trains."""

    module: nn.Module
    inactive: torch.Tensor | None  # bool, the weight's shape: unpacked once an update, not once a step; None if dense
    active: int
    target: int
    ever_active: torch.Tensor  # packed as the mask

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight


class Sparsifier:
    """Keeps a model sparse while it trains, and moves its masks.

    Call [`step`] between ``backward`` and clipping, once for each real optimizer step (not for accumulated
    micro-batches; with a gradient scaler after ``unscale_``). Nothing else is needed: after steps of an optimizer that
    is not known to leave zeros at zero the masks are re-applied by a hook.

    Masks change here only. They depend on the weights, the gradients, the seed, the step and the names alone, so
    ranks with equal gradients have equal masks. Each tensor keeps the number of active weights that it has now: a
    model loaded from a checkpoint keeps its masks whatever ``config.density`` says.

    Build it when the model lies on its device and its masks are there (see [`draw_masks`]).

    Args:
        model: any module that carries masks, wrapped or not. Without masks and with a dense ``config`` a `Sparsifier`
            does nothing, so that one loop trains dense models too.
        optimizer: the optimizer of its weights, wrapped by Accelerate or not.
        config: how the masks move.
        total_steps: optimizer steps of the whole run, of which ``config.update_start`` and ``update_end`` are shares.

    Raises:
        ValueError: ``config`` asks for a sparse model and ``model`` has no masks, a masked weight that trains is not
            the optimizer's, or a weight is not 0 outside its mask.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: SparsityConfig, total_steps: int
    ) -> None:
        if not _is_integer(total_steps) or total_steps < 1:
            raise ValueError(f"total_steps is {total_steps!r}; accepted: an integer from 1")
        # Accelerate's wrapper has no hooks of its own.
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        self.model, self.optimizer, self.config, self.total_steps = model, optimizer, config, total_steps
        self.steps = 0  #: optimizer steps so far
        self._told_of_state = False
        self._tensors = self._read_masks()
        if config.is_sparse and not self._tensors:
            raise ValueError(
                f"density is {config.density:g} and the model carries no masks; accepted: a model whose masks "
                "draw_masks(model, config) or a checkpoint has set"
            )
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
        if config.is_sparse and abs(density - config.density) > 0.001:
            logger.warning("the model's masks have density %.4g, not %.4g: they stand", density, config.density)
        if type(optimizer) not in _KEEPS_ZEROS:
            optimizer.register_step_post_hook(self._apply_masks)

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
        tensor without a gradient (a frozen one) keeps its mask.

        Returns:
            What the update did, or ``None`` when none was due.

        Raises:
            ValueError: a weight or gradient is not finite at an update; all masks are then as before.
        """
        due = self.update_is_next
        self.steps += 1
        config = self.config
        update = None
        if due:
            drop_fraction = scheduled(
                config.drop_schedule, self.steps, *self._window, config.drop_fraction, config.drop_fraction_end
            )
            update = self._update(drop_fraction)
        for tensor in self._tensors.values():
            if tensor.inactive is not None and tensor.weight.grad is not None:
                tensor.weight.grad.masked_fill_(tensor.inactive, 0)
        return update

    def _update(self, drop_fraction: float) -> TopologyUpdate:
        config = self.config
        moving = {
            name: tensor
            for name, tensor in self._tensors.items()
            if tensor.inactive is not None and tensor.weight.grad is not None
        }
        # All new masks before the first change, so that an error leaves everything as it was.
        new_masks = {
            name: update_mask(
                ~tensor.inactive,
                tensor.weight,
                tensor.weight.grad,
                drop_fraction=drop_fraction,
                drop=config.drop,
                grow=config.grow,
                seed=config.seed,
                step=self.steps,
                name=name,
                regrow=config.regrow,
                exponent=config.drop_exponent,
                target=tensor.target,
            )
            for name, tensor in moving.items()
        }
        requested = total_dropped = total_grown = 0
        for name, tensor in moving.items():
            mask, weight = new_masks.pop(name), tensor.weight
            dropped, grown = ~(mask | tensor.inactive), mask & tensor.inactive
            _, wanted = move_counts(tensor.active, weight.numel(), drop_fraction, target=tensor.target)
            requested += wanted
            total_dropped += int(torch.count_nonzero(dropped))
            total_grown += int(torch.count_nonzero(grown))
            set_mask(tensor.module, mask)
            self._tell_of_state(name, move_state(self.optimizer.state.get(weight, {}), weight.grad, dropped, grown))
            tensor.inactive, tensor.active = ~mask, tensor.target
            tensor.ever_active |= tensor.module.weight_mask
        if config.regrow == "forbid" and total_dropped < requested:
            logger.info(
                "step %d: %d of %d weights moved, for want of inactive ones", self.steps, total_dropped, requested
            )
        report = self.report()
        return TopologyUpdate(
            step=self.steps,
            drop_fraction=drop_fraction,
            requested=requested,
            dropped=total_dropped,
            grown=total_grown,
            density=report.overall.density,
            density_by_group={row.name: row.density for row in report.groups},
            ever_active=self.ever_active(),
        )

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
                tensor.weight.masked_fill_(tensor.inactive, 0)

    @torch.no_grad()
    def _read_masks(self) -> dict[str, _Masked]:
        if violations := check_masks(self.model):
            raise ValueError(
                f"weights outside their mask are not 0 in {', '.join(violations)}; accepted: zeros, as "
                "nt_hf.masks.apply_masks(model) writes them"
            )
        tensors = {}
        for name, module in masked_modules(self.model).items():
            if getattr(module, "sparse", False):
                raise ValueError(f"{name} has sparse gradients; accepted: an embedding with sparse=False")
            active = count_active(module.weight_mask)
            inactive = None if active == module.weight.numel() else ~get_mask(module)
            if inactive is not None:  # an optimizer that ran before may hold moments of weights that are now dead
                nothing = torch.zeros_like(inactive)
                move_state(self.optimizer.state.get(module.weight, {}), None, inactive, nothing)
            tensors[name] = _Masked(module, inactive, active, active, module.weight_mask.clone())
        return tensors

    def ever_active(self) -> float:
        """Share of the masked weights that were active at any time so far; 1.0 without masks."""
        size = sum(tensor.weight.numel() for tensor in self._tensors.values())
        return sum(count_active(tensor.ever_active) for tensor in self._tensors.values()) / size if size else 1.0

    def report(self) -> DensityReport:
        """Target and actual number of active weights of each masked tensor, each group, and overall.

        The actual numbers are counted in the model's packed masks.
        """
        tensors = []
        for name, tensor in self._tensors.items():
            size, active = tensor.weight.numel(), count_active(tensor.module.weight_mask)
            shape = tuple(tensor.weight.shape)
            tensors.append(DensityRow(name, shape, size, tensor.target, active, active / size if size else 1.0))
        groups = dict.fromkeys(group_of(row.name) for row in tensors)
        return DensityReport(
            tensors,
            [_total(group, [row for row in tensors if group_of(row.name) == group]) for group in groups],
            _total("overall", tensors),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs beside the model and the optimizer, tensors only (so safetensors can hold it).

        ``steps`` int64 []; of each masked tensor ``target.<name>`` int64 [] and ``ever_active.<name>`` uint8, packed
        as its mask.
        """
        state = {"steps": torch.tensor(self.steps)}
        for name, tensor in self._tensors.items():
            state[f"target.{name}"] = torch.tensor(tensor.target)
            state[f"ever_active.{name}"] = tensor.ever_active.clone()
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from `state_dict`. Load the model and the optimizer first: the masks are read from the model.

        Raises:
            ValueError: the state belongs to other masks: other tensors, other shapes, or other numbers of active
                weights.
        """
        tensors = self._read_masks()
        wanted = {"steps"} | {f"{kind}.{name}" for name in tensors for kind in ("target", "ever_active")}
        if differing := sorted(wanted.symmetric_difference(state)):
            raise ValueError(
                f"the sparsifier's state does not fit the model's masks: {differing[0]} is "
                f"{'missing' if differing[0] in wanted else 'unknown'} ({len(differing)} such entries)"
            )
        for name, tensor in tensors.items():
            target, ever_active = int(state[f"target.{name}"]), state[f"ever_active.{name}"]
            if target != tensor.active or ever_active.shape != tensor.ever_active.shape:
                raise ValueError(
                    f"the sparsifier's state does not fit the mask of {name}: it is for {target} active weights "
                    f"and a packed mask {list(ever_active.shape)}; the model has {tensor.active} and "
                    f"{list(tensor.ever_active.shape)}"
                )
            tensor.ever_active.copy_(ever_active)
        self.steps, self._tensors = int(state["steps"]), tensors


def _total(name: str, rows: list[DensityRow]) -> DensityRow:
    size, target, active = (sum(getattr(row, key) for row in rows) for key in ("size", "target", "active"))
    return DensityRow(name, None, size, target, active, active / size if size else 1.0)


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
        if not isinstance(value, torch.Tensor) or (value.numel() == 1 and dropped.numel() != 1):
            continue  # counters
        if value.shape != dropped.shape:
            other_shape.append(key)
            continue
        value.masked_fill_(dropped | grown, 0)
        if grad is not None and key in _SECOND_MOMENTS:
            value.copy_(torch.where(grown, grad.square().to(value.dtype), value))
    return other_shape
