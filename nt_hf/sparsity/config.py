"""What is sparse, how sparse, and how the masks move: one dataclass, every field checked."""

from dataclasses import dataclass
from pathlib import Path

from ..checks import (
    TEXT,
    Rule,
    check,
    check_fields,
    choice,
    integer,
    list_of,
    look_up,
    mapping_to,
    number,
    optional,
    setting,
)
from ..models.masks import parse_structure
from .criteria import DROP, GROW, REDISTRIBUTE, REGROW
from .densities import DISTRIBUTIONS
from .optimizer_state import SECOND_MOMENTS
from .pruning import PRUNERS
from .saliency import SALIENCY
from .schedules import SCHEDULES

# Looked up when a configuration is made, because users add methods of their own.
INITIAL_MASKS = ("random", *SALIENCY, *PRUNERS)
REGISTRIES = {"distribution": DISTRIBUTIONS, "drop": DROP, "grow": GROW}


@dataclass
class SparsityConfig:
    """What is sparse, how sparse, and how the masks move. ``docs/sparsify-your-model.md`` compares the named choices.

    Attributes:
        density: share of active weights among all masked ones, in (0, 1]; 1 without ``densities`` means dense.
        density_start: density of the first masks, from which it falls to ``density`` over the update window; 1 prunes
            a dense model gradually. ``None``: ``density`` all along.
        density_schedule: curve between the two: "constant", "linear", "cosine" or "cubic".
        distribution: how active weights are divided among the tensors: "uniform", "er", "erk", "flops" or, for a
            trained model, "owl".
        densities: fixed densities by glob of weight names, such as ``{"lm_heads.*": 0.8}``, the last fitting glob
            decides; the other tensors share what ``density`` leaves.
        exclude: globs of weights that stay dense and carry no mask.
        structure: "unstructured", "constant_fan_in" or "N:M" such as "2:4".
        initial_masks: of a new model "random", "snip" or "grasp" (both need the loss of a batch, see [`draw_masks`]);
            of a trained one "magnitude", "wanda" or "sparsegpt" (both need some batches); or the path of a checkpoint
            whose masks are taken.
        first_weights: of a new model, whose first masks are drawn: "dense", as they were drawn for a dense network, or
            "fan_in", the weights of each output unit times ``(inputs / active inputs) ** 0.5``.
        calibration_rows: rows of training data that "wanda", "sparsegpt" and "owl" look at.
        drop: which weights an update keeps: "magnitude", "soft_magnitude", "set", "taylor", "mest" or
            "global_magnitude".
        drop_exponent: exponent of soft magnitude when updates begin, above 0.
        drop_exponent_end: the same when updates end, approached linearly. ``None``: ``drop_exponent`` all along.
        mest_lambda: weight of the gradient in "mest", at least 0.
        grow: which positions it activates: "gradient" (RigL), "random" (SET), "momentum" (SNFS) or "gradient_random".
        random_share: share of "gradient_random" that grows at random, in [0, 1].
        regrow: "allow" lets a weight just dropped be grown again, unchanged; "forbid" does not.
        redistribute: whether growth is divided among all tensors: "none", or in proportion to the mean
            "gradient" or "momentum" of their active weights.
        second_moments: what the optimizer's second moment of a grown weight begins with: "gradient", the square of its
            gradient when it grows, or "dense", the average of its dense gradient's squares since the first step, which
            asks for Adam, AdamW, NAdam, RAdam or RMSprop.
        drop_fraction: share of a tensor's active weights that an update moves, in [0, 1], when updates begin.
        drop_fraction_end: the same when updates end.
        drop_schedule: curve between the two: "constant", "linear", "cosine" or "cubic".
        update_interval: optimizer steps between updates; 0 keeps the masks as they are (static sparsity).
        update_start: share of the run before the first update, in [0, 1).
        update_end: share of the run after which the masks are fixed, in (0, 1], above ``update_start``.
        seed: seed of the first masks and of all later noise.

    Raises:
        ValueError: a field is out of its range; the message names it, its value and what is accepted.
    """

    density: float = setting(1.0, number("(0, 1]"))
    density_start: float | None = setting(None, optional(number("(0, 1]")))
    density_schedule: str = setting("cubic", choice(SCHEDULES))
    distribution: str = "erk"
    densities: dict[str, float] = setting(
        {}, mapping_to(number("(0, 1]"), "a mapping from globs of weight names to numbers in (0, 1]")
    )
    exclude: list[str] = setting([], list_of(TEXT, "a list of globs of weight names"))
    structure: str = "unstructured"
    initial_masks: str = setting(
        "random",
        Rule(
            lambda value: isinstance(value, str) and (value in INITIAL_MASKS or Path(value).exists()),
            f"{', '.join(INITIAL_MASKS)}, the path of a checkpoint",
            INITIAL_MASKS,
        ),
    )
    first_weights: str = setting("dense", choice(["dense", "fan_in"]))
    calibration_rows: int = setting(128, integer(1))
    drop: str = "soft_magnitude"
    drop_exponent: float = setting(3.0, number("(0, inf)"))
    drop_exponent_end: float | None = setting(None, optional(number("(0, inf)")))
    mest_lambda: float = setting(1.0, number("[0, inf)"))
    grow: str = "gradient"
    random_share: float = setting(0.5, number("[0, 1]"))
    regrow: str = setting("allow", choice(REGROW))
    redistribute: str = setting("none", choice(REDISTRIBUTE))
    second_moments: str = setting("gradient", choice(SECOND_MOMENTS))
    drop_fraction: float = setting(0.5, number("[0, 1]"))
    drop_fraction_end: float = setting(0.005, number("[0, 1]"))
    drop_schedule: str = setting("cosine", choice(SCHEDULES))
    update_interval: int = setting(50, integer(0))
    update_start: float = setting(0.0, number("[0, 1)", "a share of the run"))
    update_end: float = setting(1.0, number("(0, 1]", "a share of the run"))
    seed: int = setting(0, integer())

    def __post_init__(self) -> None:
        check_fields(self)
        for name, registry in REGISTRIES.items():
            look_up(registry, name, getattr(self, name))
        parse_structure(self.structure)
        start = Rule(lambda density: density is None or density >= self.density, f"density ({self.density:g}) to 1")
        check("density_start", self.density_start, start)
        if self.density_start is not None:
            check("initial_masks", self.initial_masks, choice(["random"], when="with density_start"))
            uniform = Rule(lambda name: name != "owl", "another one with density_start")
            check("distribution", self.distribution, uniform)
        for name in ("initial_masks", "distribution"):
            if getattr(self, name) in (*PRUNERS, "owl"):  # of trained models
                check("first_weights", self.first_weights, choice(["dense"], when=f"with {name}={getattr(self, name)}"))
        if self.structure != "unstructured":
            check("redistribute", self.redistribute, choice(["none"], when=f"with structure={self.structure}"))
        end = f"a share of the run above update_start ({self.update_start}), up to 1"
        check("update_end", self.update_end, Rule(lambda share: share > self.update_start, end))

    @property
    def is_sparse(self) -> bool:
        """Whether it asks for masks at all."""
        return self.density < 1 or bool(self.densities)

    @property
    def needs_calibration(self) -> bool:
        """Whether the first masks need batches of data."""
        return (self.initial_masks in PRUNERS and self.initial_masks != "magnitude") or self.distribution == "owl"

    @property
    def needs_momentum(self) -> bool:
        """Whether updates look at averaged gradients."""
        return "momentum" in (self.grow, self.redistribute)
