"""What it brings that masks move, and what their updates do."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nt_hf.text import markdown_table

from scipy.stats import t

from experiments.finished import Finished, Measure, Result, density, spread
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


class Comparison(NamedTuple):
    """An arm of moving masks, and one that it is a change of."""

    moving: Finished
    source: Finished

    def gains(self, gain: Gain) -> list[float]:
        """What each seed that both have gains."""
        source, moving = self.source.by_seed, self.moving.by_seed
        return [gain.of(source[seed], moving[seed]) for seed in moving if seed in source]


def motion_table(suite: Suite, arms: Mapping[str, Finished], gains: Mapping[str, Gain]) -> str | None:
    """Arms of moving masks against their `sources`; a column for each unit."""
    rows = []
    for each in comparisons(arms):
        share, amount = each.moving.mean(density), each.moving.budget[suite.unit] / 1e6
        seeds = len(each.moving.by_seed.keys() & each.source.by_seed.keys())
        cells = [f"{share:.2g}", f"{amount:.2f}", each.moving.arm.label, each.source.arm.label, str(seeds)]
        cells += [with_interval(each.gains(gain), gain.digits) for gain in gains.values()]
        rows.append(((-share, amount), cells))
    first = ["density", f"{suite.unit} (M)", "masks that move", "against", "seeds", *gains]
    return markdown_table([first, *(cells for _, cells in sorted(rows, key=lambda row: row[0]))]) if rows else None


def comparisons(arms: Mapping[str, Finished]) -> list[Comparison]:
    """Arms of moving masks against their `sources`."""
    return [Comparison(runs, source) for runs in arms.values() for source in sources(runs, arms)]


def sources(runs: Finished, arms: Mapping[str, Finished]) -> list[Finished]:
    """The arm that this one is a change of, the one that that is a change of, and so on to the first with static masks.

    Empty where one of them has no result or is not as long.
    """
    found = [runs]
    while not is_static(found[-1]):
        source = arms.get(found[-1].arm.changed)
        if not source or source.budget["steps"] != runs.budget["steps"]:
            return []
        found.append(source)
    return found[1:]


def updates_table(arms: Mapping[str, Finished]) -> str | None:
    """What the updates of moving masks did: the mean over a run, its first update, the state after the last one."""
    measures = [
        Measure("grown weights that the next update keeps", lambda updates: mean_of(updates, "grown_kept")),
        Measure("of the first update's", lambda updates: mean_of(updates[:2], "grown_kept")),
        Measure("weights ever active", lambda updates: updates[-1]["ever_active"]),
        Measure("rows without weights in the end", lambda updates: updates[-1]["dead_rows"], 1),
        Measure("columns without", lambda updates: updates[-1]["dead_columns"], 1),
    ]
    rows = []
    for runs in arms.values():
        several = [updates for updates in runs.updates if mean_of(updates, "grown_kept") is not None]
        if several:
            cells = [spread([measure.read(updates) for updates in several], measure.digits) for measure in measures]
            rows.append([runs.arm.label, str(len(several[0])), *cells])
    return markdown_table([["arm", "updates", *(measure.label for measure in measures)], *rows]) if rows else None


def mean_of(updates: Sequence[Result], key: str) -> float | None:
    """Of the updates that have the figure; ``None`` where none has."""
    values = [update[key] for update in updates if update.get(key) is not None]
    return statistics.fmean(values) if values else None


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
