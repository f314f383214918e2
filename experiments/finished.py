"""The finished runs of a suite, and how their scores are read, averaged over seeds and compared seed by seed."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nt_hf.training.metrics import read_metrics

from experiments.suite import METRICS_FILE, Arm, Suite, main_runs, read_result, tuned

Result = Mapping[str, Any]
Read = Callable[[Result], float | None]


@dataclass(frozen=True)
class Measure:
    """A figure of a result.

    Attributes:
        label: its name in tables and plots.
        read: the figure of a result; ``None`` where there is none, such as the gain of one head.
        digits: that tables show behind the point.
        log: plots show it on a logarithmic scale.
    """

    label: str
    read: Read
    digits: int = 3
    log: bool = False


@dataclass(frozen=True)
class Finished:
    """An arm's finished runs, by seed.

    Attributes:
        arm: what was trained.
        by_seed: their results.
        curves: the evaluations in training, a list for each seed.
        updates: what the updates of the masks did, a list for each seed.
    """

    arm: Arm
    by_seed: dict[int, Result]
    curves: list[list[Result]]
    updates: list[list[Result]] = field(default_factory=list)

    def values(self, read: Read) -> list[float]:
        values = (read(result) for result in self.by_seed.values())
        return [value for value in values if value is not None]

    def mean(self, read: Read) -> float:
        return statistics.fmean(self.values(read))

    @property
    def budget(self) -> Mapping[str, float]:
        return next(iter(self.by_seed.values()))["budget"]


def finished(suite: Suite, results: Path) -> dict[str, Finished]:
    """The arms that have a finished run, in the suite's order."""
    arms: dict[str, Finished] = {}
    for run in sorted(main_runs(suite, tuned(results, suite)), key=lambda run: list(suite.arms).index(run.arm.name)):
        if result := read_result(results, suite, run):
            arm = arms.setdefault(run.arm.name, Finished(run.arm, {}, []))
            arm.by_seed[run.seed] = result
            records = read_metrics(results / run.name / METRICS_FILE)
            for event, kept in (("eval", arm.curves), ("update", arm.updates)):
                kept.append([record for record in records if record["event"] == event])
    return arms


def density(result: Result) -> float:
    """Of the masked weights."""
    return result["validation"]["density"]


def with_diagonal(pairs_of_heads: Mapping[str, Any]) -> float | None:
    """The mean of a matrix of disagreements with its diagonal of zeros, as the reference code averages it.

    For M heads it is (M - 1) / M of the mean over pairs of different heads. ``None`` of one head.
    """
    if pairs_of_heads["mean"] is None:
        return None
    return statistics.fmean(value for row in pairs_of_heads["matrix"] for value in row)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def pairs(runs: Finished, others: Finished, read: Read) -> list[tuple[float, float]]:
    """The figures of both for every seed that both have."""
    values = [(read(runs.by_seed[seed]), read(others.by_seed[seed])) for seed in runs.by_seed if seed in others.by_seed]
    return [pair for pair in values if None not in pair]


def paired_ratios(runs: Finished, others: Finished, read: Read) -> list[float]:
    """``runs / others`` for every seed that both have."""
    return [value / other for value, other in pairs(runs, others, read)]


def paired_differences(runs: Finished, others: Finished, read: Read) -> list[float]:
    """``runs - others`` for every seed that both have."""
    return [value - other for value, other in pairs(runs, others, read)]


def measured(measures: Iterable[Measure], runs: Finished) -> list[str]:
    """A cell of a table for each measure."""
    return [spread(runs.values(measure.read), measure.digits) for measure in measures]
