"""What it brings that masks move: arms of moving masks against the static ones that they are a change of."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nt_hf.text import markdown_table

from scipy.stats import t

from experiments.finished import Finished, Result, density
from experiments.suite import Suite

# The share of cases in which an interval holds the true mean, if differences of seeds are normally distributed.
CONFIDENCE = 0.95
MOTION = f"What moving masks bring, with the {CONFIDENCE:.0%} confidence interval"


class Gain(NamedTuple):
    """A unit of what moving masks bring.

    Attributes:
        of: the gain of a seed, from its results with static and with moving masks; above 0 moving masks are better.
        digits: that the table shows behind the point.
    """

    of: Callable[[Result, Result], float]
    digits: int


def motion_table(suite: Suite, arms: Mapping[str, Finished], gains: Mapping[str, Gain]) -> str | None:
    """Arms that are a change of an arm of static masks, as long and as dense as it; a column for each unit."""
    rows = []
    for runs in arms.values():
        source = arms.get(runs.arm.changed)
        if source and is_static(source) and not is_static(runs) and source.budget["steps"] == runs.budget["steps"]:
            pairs = [(source.by_seed[seed], runs.by_seed[seed]) for seed in runs.by_seed if seed in source.by_seed]
            share, amount = runs.mean(density), runs.budget[suite.unit] / 1e6
            cells = [f"{share:.2g}", f"{amount:.2f}", runs.arm.label, source.arm.label, str(len(pairs))]
            cells += [with_interval([gain.of(*pair) for pair in pairs], gain.digits) for gain in gains.values()]
            rows.append(((-share, amount), cells))
    first = ["density", f"{suite.unit} (M)", "masks that move", "static masks", "seeds", *gains]
    return markdown_table([first, *(cells for _, cells in sorted(rows, key=lambda row: row[0]))]) if rows else None


def is_static(runs: Finished) -> bool:
    """Whether an arm's masks never move."""
    return next(iter(runs.by_seed.values()))["config"]["sparsity"].get("update_interval") == 0


def with_interval(values: Sequence[float], digits: int) -> str:
    """The mean of a sample and its confidence interval, both with their signs; no interval of a single value."""
    text = f"{statistics.fmean(values):+.{digits}f}" if values else ""
    bounds = interval(values)
    return text if bounds is None else f"{text} [{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The confidence interval of the mean of a sample, by Student's t; ``None`` of less than two values."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / len(values) ** 0.5
    return t.interval(CONFIDENCE, len(values) - 1, statistics.fmean(values), error)
