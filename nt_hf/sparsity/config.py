"""What is sparse, how sparse, and how the masks move: one dataclass, every field checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.masks import parse_structure
from .schedules import SCHEDULES
from .topology import DISTRIBUTIONS, DROP, GROW, REDISTRIBUTE, REGROW, look_up

SALIENCY = ("snip", "grasp")


@dataclass
class SparsityConfig:
    """What is sparse, how sparse, and how the masks move. ``docs/sparsify-your-model.md`` compares the named choices.

    Attributes:
        density: share of active weights among all masked ones, in (0, 1]; 1 without ``densities`` means dense.
        density_start: density of the first masks, from which it falls to ``density`` over the update window; 1 prunes
            a dense model gradually. ``None``: ``density`` all along.
        density_schedule: between the two: "constant", "linear", "cosine" or "cubic".
        distribution: of the active weights over the tensors: "uniform", "er", "erk" or "flops".
        densities: fixed densities by glob of weight names, such as ``{"lm_heads.*": 0.8}``, the last fitting glob
            decides; the other tensors share what ``density`` leaves.
        exclude: globs of weights that stay dense and carry no mask.
        structure: "unstructured", "constant_fan_in" or "N:M" such as "2:4".
        initial_masks: "random", "snip" or "grasp" (both need the loss of a batch, see [`draw_masks`]), or the path of
            a checkpoint whose masks are taken.
        drop: which weights an update keeps: "magnitude", "soft_magnitude", "set", "taylor", "mest" or
            "global_magnitude".
        drop_exponent: of soft magnitude, above 0, when updates begin.
        drop_exponent_end: the same when updates end, approached linearly. ``None``: ``drop_exponent`` all along.
        mest_lambda: weight of the gradient in "mest", at least 0.
        grow: which positions it activates: "gradient" (RigL), "random" (SET), "momentum" (SNFS) or "gradient_random".
        random_share: share of "gradient_random" that grows at random, in [0, 1].
        regrow: "allow" lets a weight just dropped be grown again, unchanged; "forbid" does not.
        redistribute: whether what grows is divided anew among the tensors: "none", or in proportion to the mean
            "gradient" or "momentum" of their active weights.
        drop_fraction: share of a tensor's active weights that an update moves, in [0, 1], when updates begin.
        drop_fraction_end: the same when updates end.
        drop_schedule: between the two: "constant", "linear", "cosine" or "cubic".
        update_interval: optimizer steps between updates; 0 keeps the masks as they are (static sparsity).
        update_start: share of the run before the first update, in [0, 1).
        update_end: share of the run after which the masks are fixed, in (0, 1], above ``update_start``.
        seed: of the first masks and of all later noise.

    Raises:
        ValueError: a field is out of its range; the message names it, its value and what is accepted.
    """

    density: float = 1.0
    density_start: float | None = None
    density_schedule: str = "cubic"
    distribution: str = "erk"
    densities: dict[str, float] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    structure: str = "unstructured"
    initial_masks: str = "random"
    drop: str = "soft_magnitude"
    drop_exponent: float = 3.0
    drop_exponent_end: float | None = None
    mest_lambda: float = 1.0
    grow: str = "gradient"
    random_share: float = 0.5
    regrow: str = "allow"
    redistribute: str = "none"
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
        if self.density_start is not None:
            check(
                "density_start", lambda x: _is_number(x) and self.density <= x <= 1, f"density ({self.density:g}) to 1"
            )
        parse_structure(self.structure)
        if not isinstance(self.initial_masks, str) or not Path(self.initial_masks).exists():
            choices = dict.fromkeys(["random", *SALIENCY, "the path of a checkpoint"])
            look_up(choices, "initial_masks", self.initial_masks)
        if self.density_start is not None and self.initial_masks != "random":
            raise ValueError(f"initial_masks is {self.initial_masks!r}; accepted with density_start: random")
        look_up(DROP, "drop", self.drop)
        look_up(GROW, "grow", self.grow)
        look_up(dict.fromkeys(REGROW), "regrow", self.regrow)
        look_up(dict.fromkeys(REDISTRIBUTE), "redistribute", self.redistribute)
        if self.redistribute != "none" and self.structure != "unstructured":
            raise ValueError(f"redistribute is {self.redistribute!r}; accepted with structure {self.structure}: none")
        check("drop_exponent", lambda x: _is_number(x) and x > 0, "a number above 0")
        check("drop_exponent_end", lambda x: x is None or (_is_number(x) and x > 0), "a number above 0, or None")
        check("mest_lambda", lambda x: _is_number(x) and x >= 0, "a number from 0")
        for name in ("drop_fraction", "drop_fraction_end", "random_share"):
            check(name, lambda x: _is_number(x) and 0 <= x <= 1, "a number in [0, 1]")
        for name in ("drop_schedule", "density_schedule"):
            look_up(SCHEDULES, name, getattr(self, name))
        check("update_interval", lambda x: is_integer(x) and x >= 0, "an integer from 0 (static masks)")
        check("update_start", lambda x: _is_number(x) and 0 <= x < 1, "a share of the run in [0, 1)")
        check(
            "update_end",
            lambda x: _is_number(x) and self.update_start < x <= 1,
            f"a share of the run above update_start ({self.update_start}), up to 1",
        )
        check("seed", is_integer, "an integer")

    @property
    def is_sparse(self) -> bool:
        """Whether it asks for masks at all."""
        return self.density < 1 or bool(self.densities)

    @property
    def needs_momentum(self) -> bool:
        """Whether updates look at averaged gradients."""
        return "momentum" in (self.grow, self.redistribute)


def is_integer(value: object) -> bool:
    """Whether it is a whole number, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return is_integer(value) or isinstance(value, float)
