"""Tables and plots of a suite, made of its result files alone."""

import json
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nt_hf.text import markdown_table, pyplot

from experiments import image_tables, text_tables
from experiments.finished import Finished, Read, density, finished
from experiments.motion import CONFIDENCE, comparisons, interval, is_static, updates_table
from experiments.suite import RESULT_FILE, Suite, main_runs, read_result, tuned, tuning_runs

# Of a plot: the figure along the x axis with its label, and the one along the y axis with its.
Panel = tuple[Read, str, Read, str]


def kind(suite: Suite) -> ModuleType:
    """The module of a suite's scores and tables."""
    return image_tables if suite.of_images else text_tables


# ------------------------------------------------------------------------------------------------------- tables


def budget_table(suite: Suite, arms: Mapping[str, Finished]) -> str:
    rows = [
        ["arm", "learning rate", "steps", f"{suite.unit} (M)", "PFLOP executed", "PFLOP sparse-counted", "stored (M)",
         "active (M)", "machine", "precision", "seconds"]
    ]  # fmt: skip
    for runs in arms.values():
        cost, result = runs.budget, next(iter(runs.by_seed.values()))
        machines = sorted({r["machine"]["gpu"] or f"{r['machine']['cores']} cores" for r in runs.by_seed.values()})
        precisions = sorted({r["config"]["train"]["precision"] for r in runs.by_seed.values()})
        rows.append(
            [
                runs.arm.label, f"{result['learning_rate']:g}", str(cost["steps"]), f"{cost[suite.unit] / 1e6:.2f}",
                f"{cost['flops'] / 1e15:.3f}", f"{cost['sparse_flops'] / 1e15:.3f}", f"{cost['stored'] / 1e6:.2f}",
                f"{cost['active'] / 1e6:.2f}", ", ".join(machines), ", ".join(precisions),
            ]
        )  # fmt: skip
        rows[-1].append(f"{runs.mean(lambda r: r['train_seconds']):.0f}")
    return markdown_table(rows)


def tuning_table(suite: Suite, results: Path) -> str:
    """The validation score of every learning rate; the chosen one is bold."""
    measure = kind(suite).VALIDATION
    chosen, rates = tuned(results, suite), suite.tuning.learning_rates
    rows = {}
    for run in tuning_runs(suite):
        row = rows.setdefault(run.arm.name, [run.arm.label] + [""] * len(rates))
        if result := read_result(results, suite, run):
            text = f"{measure.read(result['validation']):.{measure.digits}f}"
            best = run.learning_rate == chosen.get(run.arm.name)
            row[1 + rates.index(run.learning_rate)] = f"**{text}**" if best else text
    return markdown_table([["arm", *(f"{rate:g}" for rate in rates)], *rows.values()])


def tables(suite: Suite, results: Path) -> dict[str, str]:
    """All tables of the results there are, Markdown by title."""
    arms = finished(suite, results)
    by_title: dict[str, str | None] = {}
    if arms:
        first, *others = kind(suite).tables(suite, arms).items()
        by_title = dict([first, ("Budgets", budget_table(suite, arms)), *others])
        by_title["What updates do"] = updates_table(arms)
    label = kind(suite).VALIDATION.label
    by_title[f"Learning rates: validation {label} of the tuning runs"] = tuning_table(suite, results)
    return {title: table for title, table in by_title.items() if table}


def report_text(suite: Suite, results: Path) -> str:
    """A page of all tables."""
    runs = main_runs(suite, dict.fromkeys(suite.arms, 1.0))
    done = sum((results / run.name / RESULT_FILE).is_file() for run in runs)
    parts = [
        f"# {suite.name}",
        f"{done} of {len(runs)} runs are finished. `python experiments/run.py --suite "
        f"experiments/suites/{suite.name}.yaml --report` makes this page from the files beside "
        f"it. ± is the standard deviation over seeds; {kind(suite).COMPARED} of paired seeds.",
    ]
    for title, table in tables(suite, results).items():
        parts += [f"## {title}", table]
    return "\n\n".join(parts) + "\n"


def refreshed(document: str, suite: Suite, results: Path) -> str:
    """A document with the tables anew that it shows between ``<!-- suite: title -->`` and ``<!-- end -->``.

    Raises:
        ValueError: it asks for a table that there is not.
    """
    tables_by_title = tables(suite, results)

    def table(match: re.Match) -> str:
        titles = [title for title in tables_by_title if title.startswith(match["title"])]
        if len(titles) != 1:
            raise ValueError(f"{match[0].splitlines()[0]}: accepted are the titles {', '.join(tables_by_title)}")
        return f"{match['mark']}\n\n{tables_by_title[titles[0]]}\n\n<!-- end -->"

    mark = rf"(?P<mark><!-- {re.escape(suite.name)}: (?P<title>[^>]*?) -->).*?<!-- end -->"
    return re.sub(mark, table, document, flags=re.DOTALL)


def write_report(suite: Suite, results: Path) -> str:
    """Writes ``report.md`` and plots beside the results; returns the text."""
    arms, text = finished(suite, results), report_text(suite, results)
    results.mkdir(parents=True, exist_ok=True)
    (results / "report.md").write_text(text, encoding="utf-8")
    if arms and (plt := pyplot()):
        # Arms from one seed would bury the others; their places are in the tables.
        main = {name: runs for name, runs in arms.items() if len(runs.by_seed) > 1} or arms
        plot_curves(plt, suite, main, results / "curves.png")
        plot_quality(plt, suite, main, results / "quality.png")
        plot_diversity(plt, suite, arms, results / "diversity.png")
        plot_goldilocks(plt, suite, arms, results / "goldilocks.png")
        plot_motion(plt, suite, main, results / "motion.png")
    return text


# -------------------------------------------------------------------------------------------------------- plots


def style(plt: Any, arms: Mapping[str, Finished]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each arm, the same in all plots."""
    markers, pairs = "osD^v<>Pp*Xhd8", plt.get_cmap("tab20").colors  # each colour, then a lighter one
    colours = pairs[::2] + pairs[1::2]
    looks = [{"color": colours[i % 20], "marker": markers[i % len(markers)]} for i in range(len(arms))]
    return dict(zip(arms, looks))


def plot_curves(plt: Any, suite: Suite, arms: Mapping[str, Finished], path: Path) -> None:
    """The validation score in training against tokens or images and both counts of FLOPs, the mean over seeds."""
    measure, unit = kind(suite).VALIDATION, suite.unit
    axes_of = {
        unit: f"training {unit} (M)",
        "flops": "training PFLOP, executed",
        "sparse_flops": "training PFLOP, active weights alone",
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for axis, (key, label) in zip(axes, axes_of.items()):
        for (_name, runs), look in zip(arms.items(), style(plt, arms).values()):
            scale = runs.budget[key] / runs.budget[unit] / (1e6 if key == unit else 1e15)
            points = list(zip(*runs.curves))[1:]  # not of the untrained model
            x = [point[0][f"training_{unit}"] * scale for point in points]
            y = [statistics.fmean(map(measure.read, point)) for point in points]
            axis.plot(x, y, label=runs.arm.label if axis is axes[0] else None, markersize=4, **look)
        axis.set(xlabel=label, yscale="log" if measure.log else "linear")
        axis.grid(color="0.9", which="both")
    axes[0].set_ylabel(f"validation {measure.label}, mean of seeds")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(plt, figure, path)


def plot_quality(plt: Any, suite: Suite, arms: Mapping[str, Finished], path: Path) -> None:
    """The main score against what a model costs: active parameters, training FLOPs, the file of its checkpoint."""
    measure = kind(suite).quality(suite)
    costs = {
        "active parameters (M)": lambda runs: runs.budget["active"] / 1e6,
        "training PFLOP, executed": lambda runs: runs.budget["flops"] / 1e15,
        "sparse checkpoint in bf16 (MB, computed)": lambda runs: sparse_bytes(runs) / 1e6,
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for (_name, runs), look in zip(arms.items(), style(plt, arms).values()):
        values = runs.values(measure.read)
        error = statistics.stdev(values) if len(values) > 1 else None
        for axis, cost in zip(axes, costs.values()):
            label = runs.arm.label if axis is axes[0] else None
            axis.errorbar(
                cost(runs), statistics.fmean(values), yerr=error, capsize=3, linestyle="", label=label, **look
            )
    for axis, label in zip(axes, costs):
        axis.set_xlabel(label)
        axis.grid(color="0.9")
    axes[0].set_ylabel(f"{measure.label} (bar: ± sd over seeds)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(plt, figure, path)


def sparse_bytes(runs: Finished) -> float:
    """Of a sparse checkpoint in bf16: two bytes an active weight, and one bit for each that a mask covers."""
    stored, active, share = runs.budget["stored"], runs.budget["active"], runs.mean(density)
    covered = (stored - active) / (1 - share) if share < 1 else 0
    return 2 * active + covered / 8


def series(
    arms: Mapping[str, Finished], along: Callable[[Finished], float], free: Collection[str] = ()
) -> list[list[str]]:
    """Arms whose configurations differ in the keys `free` alone, by growing `along`; of two at one place the first."""
    lines: dict[str, dict[float, str]] = {}
    for name, runs in arms.items():
        lines.setdefault(settings(runs, free), {}).setdefault(along(runs), name)
    return [[names[place] for place in sorted(names)] for names in lines.values()]


def settings(runs: Finished, free: Collection[str] = ()) -> str:
    """What an arm sets, without the keys and the sections that are `free`."""
    set_here = {
        f"{section}.{key}": value
        for section, values in runs.arm.config.items()
        for key, value in values.items()
        if not {section, key} & set(free)
    }
    return json.dumps(set_here, sort_keys=True)


def density_series(arms: Mapping[str, Finished]) -> list[list[str]]:
    """Arms that differ from each other in density alone, and in the rate that follows from it; the sparsest first.

    A dense arm ends every line of two sparse ones or more: how masks are spread and moved is no difference where
    nothing is masked.
    """
    sparse = {name: runs for name, runs in arms.items() if runs.mean(density) < 1}
    dense = [name for name in arms if name not in sparse]
    lines = series(sparse, lambda runs: round(runs.mean(density), 3), ("density", "learning_rate_factors"))
    rest = ("sparsity", "learning_rate_factors")

    def ends(line: list[str]) -> list[str]:
        return [name for name in dense if len(line) > 1 and settings(arms[name], rest) == settings(arms[line[0]], rest)]

    return [line + ends(line)[:1] for line in lines] + [[name] for name in dense]


def line_label(names: Sequence[str], arms: Mapping[str, Finished]) -> str:
    return " to ".join(dict.fromkeys(arms[name].arm.label for name in (names[0], names[-1])))


def plot_diversity(plt: Any, suite: Suite, arms: Mapping[str, Finished], path: Path) -> None:
    """Diversity, and what the ensemble makes of it, against the density of the masked weights."""
    scores, measure = kind(suite), kind(suite).quality(suite)
    panels = [
        (density, "density of the masked weights", read, label)
        for read, label in (
            (scores.disagreement, "disagreement between heads"),
            (scores.gain, scores.PLOTTED_GAIN),
            (measure.read, measure.label),
        )
    ]
    plot_ensembles(plt, suite, arms, panels, path)


def plot_goldilocks(plt: Any, suite: Suite, arms: Mapping[str, Finished], path: Path) -> None:
    """The score of the ensemble, and of its heads alone, against how often two heads disagree."""
    scores, measure = kind(suite), kind(suite).quality(suite)
    label = "disagreement between heads"
    panels = [
        (scores.disagreement, label, measure.read, f"{measure.label}, ensemble"),
        (scores.disagreement, label, scores.head_quality(suite).read, f"{measure.label}, mean of the heads"),
    ]
    plot_ensembles(plt, suite, arms, panels, path)


def plot_ensembles(plt: Any, suite: Suite, arms: Mapping[str, Finished], panels: Sequence[Panel], path: Path) -> None:
    """Panels, each a figure of the arms of several heads against another.

    Arms that differ in density alone are a line; the others from one seed are grey.
    """
    several = {n: runs for n, runs in arms.items() if runs.values(kind(suite).gain) and not runs.arm.has_own_length}
    if not several:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 5), layout="constrained")
    looks = style(plt, arms)
    lines, points = [names for names in density_series(several) if len(names) > 1], {"linestyle": ""}
    drawn = [(line_label(names, several), names, looks[names[0]]) for names in lines]
    rest = [name for name in several if not any(name in names for names in lines)]
    main = [name for name in rest if len(several[name].by_seed) > 1]
    drawn += [(several[name].arm.label, [name], looks[name] | points) for name in main]
    if others := [name for name in rest if name not in main]:
        drawn.append(("other arms", others, {"color": "0.7", "marker": "."} | points))
    for axis, (read_x, x_label, read_y, y_label) in zip(axes, panels):
        for label, names, look in drawn:
            x, y = ([several[name].mean(read) for name in names] for read in (read_x, read_y))
            axis.plot(x, y, label=label if axis is axes[0] else None, **look)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=4 if len(panels) > 2 else 2, frameon=False)
    save(plt, figure, path)


def plot_motion(plt: Any, suite: Suite, arms: Mapping[str, Finished], path: Path) -> None:
    """What moving masks bring, with the confidence interval, against density and against the length of training.

    A line joins arms that differ in that alone. There is no plot where no two arms do.
    """
    unit, gain = next(iter(kind(suite).gains_of_motion(suite).items()))
    found = {each.moving.arm.name: each for each in comparisons(arms) if is_static(each.source)}
    moving = {name: each.moving for name, each in found.items()}
    as_long = {name: runs for name, runs in moving.items() if not runs.arm.has_own_length}

    def amount(runs: Finished) -> float:
        return runs.budget[suite.unit] / 1e6

    panels = [
        ("density of the masked weights", lambda runs: runs.mean(density), density_series(as_long)),
        (f"training {suite.unit} (M)", amount, [names for names in series(moving, amount) if len(names) > 1]),
    ]
    panels = [panel for panel in panels if any(len(names) > 1 for names in panel[2])]
    if not panels:
        return
    looks = style(plt, moving)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 5), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (label, place, lines) in zip(axes[0], panels):
        for shift, names in enumerate(lines):  # beside each other, so that no bar hides another
            gains = [found[name].gains(gain) for name in names]
            means = [statistics.fmean(values) for values in gains]
            margins = [(interval(values) or (mean, mean))[1] - mean for values, mean in zip(gains, means)]
            x = [place(moving[name]) * 1.03**shift for name in names]
            axis.errorbar(x, means, yerr=margins, capsize=3, label=line_label(names, moving), **looks[names[0]])
        axis.axhline(0, color="0.5", linewidth=1)
        ticks = sorted({round(place(moving[name]), 2) for names in lines for name in names})
        axis.set(xlabel=label, xscale="log")
        axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(color="0.9")
        axis.legend(frameon=False, fontsize="small")
    axes[0][0].set_ylabel(f"gain over static masks: {unit} (bar: {CONFIDENCE:.0%} interval)")
    save(plt, figure, path)


def save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100)
    plt.close(figure)
