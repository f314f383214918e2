"""Compares zero-shot results item by item: differences that are real, and those that chance would give."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..text import markdown_table, pyplot, score_text, strict_json

METRICS = ("acc", "acc_norm")
DRAWS = 10_000
TABLE = 2**24  # counts that exist at one time, each of 8 bytes


@dataclass(frozen=True)
class Difference:
    """A difference of means with its 95 % interval and a two-sided p-value, all by the bootstrap."""

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], weights: Sequence[float] | None = None, seed: int = 0
) -> Difference:
    """The difference between two systems that were scored on the same items (Efron & Tibshirani 1993, ch. 13 and 16).

    Items are drawn with replacement, within each task; both systems keep their values on an item, so what makes
    it hard for both cancels. The interval is the percentile interval, and ``p`` is twice the share of draws on the far
    side of 0, at most 1.

    Args:
        pairs: for each task each item's value for the one and for the other system.
        weights: of the tasks in the difference of the means; equal by default.
        seed: of the draws.
    """
    weights = np.full(len(pairs), 1 / len(pairs)) if weights is None else np.asarray(weights) / np.sum(weights)
    generator = np.random.default_rng(seed)
    value, drawn = 0.0, np.zeros(DRAWS)
    for (first, second), weight in zip(pairs, weights):
        differences, counts = np.unique(np.asarray(first, float) - np.asarray(second, float), return_counts=True)
        size = counts.sum()
        # How often each value is among the items drawn: the same as drawing them one by one, and much faster. Many
        # different values, such as losses of images, take several rounds, for the sake of memory.
        for draws in np.array_split(drawn, -(-DRAWS * len(counts) // TABLE)):
            times = generator.multinomial(size, counts / size, size=len(draws))
            draws += weight * (times @ differences) / size  # a view
        value += float(weight * (counts @ differences) / size)
    low, high = np.quantile(drawn, [0.025, 0.975])
    # Rounding in sums over tasks must not turn a difference of 0 into a sign; 1 is added so that p is never 0.
    below, above = np.sum(drawn <= 1e-12), np.sum(drawn >= -1e-12)
    return Difference(value, float(low), float(high), float(min(1.0, 2 * (min(below, above) + 1) / (DRAWS + 1))))


@dataclass(frozen=True)
class Column:
    """One scorer of one result file."""

    name: str
    report: Mapping[str, Any]
    scorer: str

    def items(self, task: str, metric: str) -> list[float]:
        """Each item's value."""
        return [float(value) for value in self.report["tasks"][task]["per_item"][self.scorer][metric]]

    def score(self, name: str, metric: str) -> tuple[float, float | None] | None:
        """Value and standard error of a task or group, ``None`` where there is none."""
        score = self.report["results"].get(name, {}).get(self.scorer, {}).get(metric)
        return score and (score["value"], score["stderr"])


def read_columns(arguments: Sequence[str]) -> list[Column]:
    """The columns that ``FILE`` or ``FILE:SCORER`` arguments name.

    A file alone stands for its first scorer, the ensemble; if it is the only argument, for all of its scorers.

    Raises:
        ValueError: a file is missing or not of ``nt-hf evaluate zero-shot``, or has no such scorer.
    """
    columns = []
    parts = [(argument, "", "") if Path(argument).is_file() else argument.rpartition(":") for argument in arguments]
    paths = [Path(file or argument) for argument, (file, _, _) in zip(arguments, parts)]
    short = _short_names(paths)
    for path, (file, _, scorer) in zip(paths, parts):
        report = _read(path)
        scorers = list(report["scorers"])
        if scorer and scorer not in scorers:
            raise ValueError(f"{file}:{scorer}: accepted is one of its scorers {', '.join(scorers)}")
        chosen = [scorer] if scorer else scorers if len(arguments) == 1 else scorers[:1]
        for name in chosen:
            label = name if len(arguments) == 1 else f"{short[path]}: {name}"
            columns.append(Column(label, report, name))
    if len(columns) < 2:
        raise ValueError("results: one scorer compares to nothing; accepted are two files, or one with several scorers")
    twice = [column.name for column in columns if sum(other.name == column.name for other in columns) > 1]
    if twice:
        raise ValueError(f"results: two columns are called {twice[0]!r}; accepted is each scorer of a file once")
    return columns


def _short_names(paths: Collection[Path]) -> dict[Path, str]:
    """A name for each path without its extension: the file's, with as many of its folders as tell all apart."""
    parts = {path: Path(os.path.abspath(path)).with_suffix("").parts for path in paths}
    for count in range(1, max(map(len, parts.values())) + 1):
        names = {path: "/".join(folders[-count:]) for path, folders in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: str(path) for path in paths}


def _read(path: Path) -> dict[str, Any]:
    try:
        report = strict_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); accepted is a file of nt-hf evaluate zero-shot"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); accepted is a file of nt-hf evaluate zero-shot") from error
    if not isinstance(report, dict) or not {"scorers", "results", "tasks", "members"} <= report.keys():
        raise ValueError(f"{path}: accepted is a file of nt-hf evaluate zero-shot")
    return report


@dataclass(frozen=True)
class Row:
    """One task or group and metric: every column's score, and its difference from the first column."""

    task: str
    metric: str
    items: int
    scores: list[tuple[float, float | None]]
    differences: list[Difference]


def compare_columns(columns: Sequence[Column]) -> tuple[list[Row], list[str]]:
    """The rows of the tasks that every column has, then the mean accuracy over them.

    Returns:
        Rows, and lines that say which tasks were left out and why.
    """
    base, rows, notes = columns[0], [], []
    for column in columns:
        if not column.report["complete"]:
            notes.append(f"{column.name}: its file is of an incomplete run.")
    shared = []  # for each task in the mean: its (tasks, weights)
    names = list(dict.fromkeys(name for column in columns for name in column.report["results"]))
    for name in names:
        missing = [column.name for column in columns if name not in column.report["results"]]
        if missing:
            notes.append(f"{name}: left out, {', '.join(missing)} lacks it.")
            continue
        members, weights = base.report["members"][name]["tasks"], base.report["members"][name]["weights"]
        if any(_fingerprints(column, members) != _fingerprints(base, members) for column in columns):
            notes.append(f"{name}: left out, the runs scored different items.")
            continue
        for metric in METRICS:
            if all(column.score(name, metric) for column in columns):
                scores = [column.score(name, metric) for column in columns]
                rows.append(_row(columns, name, metric, scores, members, weights))
        if rows and rows[-1].task == name:
            shared.append((members, np.asarray(weights) / np.sum(weights)))
    if not rows:
        raise ValueError(f"results: share no task; {' '.join(notes)}")
    if len(shared) > 1:
        means = []
        for column in columns:
            scores = [column.score(row.task, "acc") for row in rows if row.metric == "acc"]
            errors = [error for _, error in scores]
            error = None if None in errors else float(np.sqrt(np.sum(np.square(errors))) / len(errors))
            means.append((float(np.mean([value for value, _ in scores])), error))
        members = [member for tasks, _ in shared for member in tasks]
        weights = [float(weight) for _, shares in shared for weight in shares]
        rows.append(_row(columns, f"mean of {len(shared)}", "acc", means, members, weights))
    return rows, notes


def _row(columns, name, metric, scores, members, weights) -> Row:
    base = columns[0]
    differences = [
        paired_bootstrap([(column.items(m, metric), base.items(m, metric)) for m in members], weights)
        for column in columns[1:]
    ]
    return Row(name, metric, sum(len(base.items(m, metric)) for m in members), scores, differences)


def _fingerprints(column: Column, members: Sequence[str]) -> list[str | None]:
    return [column.report["tasks"].get(member, {}).get("fingerprint") for member in members]


def comparison_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Markdown; differences are from the first column, with 95 % intervals, ``*`` where 0 lies outside."""
    head = ["task", "metric", "items", columns[0].name]
    for column in columns[1:]:
        head += [column.name, "difference (95 %)", "p"]
    table = [head]
    for row in rows:
        cells = [row.task, row.metric, str(row.items), score_text(*row.scores[0])]
        for score, gap in zip(row.scores[1:], row.differences):
            star = "*" if gap.low > 0 or gap.high < 0 else ""
            cells += [score_text(*score), f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}){star}", f"{gap.p:.3f}"]
        table.append(cells)
    return markdown_table(table)


def plot_comparison(columns: Sequence[Column], rows: Sequence[Row], path: Path) -> None:
    """Draws the scores with their standard errors, and the differences from the first column with their intervals."""
    plt = pyplot()
    if plt is None:
        return
    labels = [f"{row.task}, {row.metric}" for row in rows]
    height = 1.8 + 0.32 * len(rows) + 0.12 * len(rows) * len(columns)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    heights = np.arange(len(rows))[::-1]
    for number, column in enumerate(columns):
        offset = 0.6 * ((len(columns) - 1) / 2 - number) / len(columns)
        values = [row.scores[number][0] for row in rows]
        errors = [row.scores[number][1] or 0 for row in rows]
        color = f"C{number}"
        left.errorbar(values, heights + offset, xerr=errors, fmt="o", color=color, capsize=2, label=column.name)
        if number:
            gaps = [row.differences[number - 1] for row in rows]
            spans = [[gap.value - gap.low for gap in gaps], [gap.high - gap.value for gap in gaps]]
            right.errorbar(
                [gap.value for gap in gaps], heights + offset, xerr=spans, fmt="o", color=color, capsize=2,
            )  # fmt: skip
    left.set(yticks=heights, yticklabels=labels, xlabel="score (bar: standard error)", title="Scores")
    right.axvline(0, color="0.5", linewidth=1)
    right.set(xlabel=f"difference from {columns[0].name} (bar: 95 %)", title="Differences on the same items")
    figure.legend(loc="outside lower center", ncols=min(4, len(columns)), frameon=False)
    for axis in (left, right):
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
    for extension in (".png", ".svg"):
        figure.savefig(path.with_suffix(extension), dpi=110)
    plt.close(figure)
