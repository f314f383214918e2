"""Tables and plots of a suite, made of its result files alone."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.suite import METRICS_FILE, RESULT_FILE, Arm, Suite, main_runs, read_result, tuned, tuning_runs
from nt_hf.models.configuration_neurotrails import ENSEMBLE_MODES
from nt_hf.text import markdown_table, pyplot, score_text
from nt_hf.training.metrics import read_metrics

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """An arm's finished runs, by seed."""

    arm: Arm
    by_seed: dict[int, Result]
    curves: list[list[Result]]

    def values(self, read: Callable[[Result], float | None]) -> list[float]:
        values = (read(result) for result in self.by_seed.values())
        return [value for value in values if value is not None]

    def mean(self, read: Callable[[Result], float | None]) -> float:
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
            arm.curves.append([r for r in read_metrics(results / run.name / METRICS_FILE) if r["event"] == "eval"])
    return arms


def perplexity_on(text: str) -> Callable[[Result], float]:
    return lambda result: own_mode(result["texts"][text]["ensemble_perplexities"], result)


def own_mode(by_mode: Mapping[str, float], result: Result) -> float:
    """The value of the model's own ensemble mode."""
    return by_mode[result["validation"]["ensemble_mode"]]


def head_mean(text: str) -> Callable[[Result], float]:
    return lambda result: statistics.fmean(result["texts"][text]["head_perplexities"])


def gain(result: Result) -> float | None:
    """What combining the heads gains, in nats a token; ``None`` of one head."""
    if len(result["diversity"]["heads"]) == 1:
        return None
    return result["diversity"]["gains"][result["validation"]["ensemble_mode"]]["diversity"]


def calibration(result: Result) -> float:
    return result["diversity"]["ensemble_scores"][result["validation"]["ensemble_mode"]]["calibration"]["error"]


def disagreement(result: Result) -> float | None:
    return result["diversity"]["disagreement"]["mean"]


def density(result: Result) -> float:
    return result["validation"]["density"]


def overlap(result: Result) -> float | None:
    overlaps = result["diversity"]["mask_overlap"]
    return overlaps and overlaps["overall"]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def paired_ratios(runs: Finished, others: Finished, read: Callable[[Result], float]) -> list[float]:
    """``runs / others`` for every seed that both have."""
    return [read(runs.by_seed[s]) / read(others.by_seed[s]) for s in runs.by_seed if s in others.by_seed]


# ------------------------------------------------------------------------------------------------------- tables


def quality_table(suite: Suite, arms: Mapping[str, Finished]) -> str:
    first = next(iter(suite.evaluation.texts))
    read = perplexity_on(first)
    rows = [
        [
            "arm", "seeds", f"perplexity, {first}", "mean head", f"/ {suite.arms[suite.baseline].label}",
            f"/ {suite.arms[suite.rival].label}", "gain (nats)", "disagreement", "mask overlap", "ECE",
        ]
    ]  # fmt: skip
    for runs in arms.values():
        ratios = [
            spread(paired_ratios(runs, arms[other], read), 3) if other in arms else ""
            for other in (suite.baseline, suite.rival)
        ]
        rows.append(
            [
                runs.arm.label, str(len(runs.by_seed)), spread(runs.values(read)),
                spread(runs.values(head_mean(first))),
                *ratios, spread(runs.values(gain), 3), spread(runs.values(disagreement), 3),
                spread(runs.values(overlap), 3), spread(runs.values(calibration), 3),
            ]
        )  # fmt: skip
    return markdown_table(rows)


def budget_table(suite: Suite, arms: Mapping[str, Finished]) -> str:
    rows = [
        ["arm", "learning rate", "steps", "tokens (M)", "PFLOP executed", "PFLOP sparse-counted", "stored (M)",
         "active (M)", "machine", "seconds"]
    ]  # fmt: skip
    for runs in arms.values():
        cost, result = runs.budget, next(iter(runs.by_seed.values()))
        machines = sorted({r["machine"]["gpu"] or f"{r['machine']['cores']} cores" for r in runs.by_seed.values()})
        rows.append(
            [
                runs.arm.label, f"{result['learning_rate']:g}", str(cost["steps"]), f"{cost['tokens'] / 1e6:.2f}",
                f"{cost['flops'] / 1e15:.3f}", f"{cost['sparse_flops'] / 1e15:.3f}", f"{cost['stored'] / 1e6:.2f}",
                f"{cost['active'] / 1e6:.2f}", ", ".join(machines),
            ]
        )  # fmt: skip
        rows[-1].append(f"{runs.mean(lambda r: r['train_seconds']):.0f}")
    return markdown_table(rows)


def texts_table(suite: Suite, arms: Mapping[str, Finished]) -> str:
    rows = [["arm"]]
    for name in suite.evaluation.texts:
        rows[0] += [f"{name}: perplexity", f"{name}: bits per byte"]
    for runs in arms.values():
        cells = [runs.arm.label]
        for name in suite.evaluation.texts:
            cells += [
                spread(runs.values(perplexity_on(name))),
                spread(runs.values(lambda r, name=name: r["texts"][name]["bits_per_byte"]), 4),
            ]
        rows.append(cells)
    return markdown_table(rows)


def effects_table(suite: Suite, arms: Mapping[str, Finished]) -> str | None:
    """What one change does: each arm that takes its learning rate from another, against that one, seed by seed."""
    read = perplexity_on(first := next(iter(suite.evaluation.texts)))
    rows = [["arm", "against", "seeds", f"ratio, {first}", "ratio, mean head", "gain (nats) more"]]
    for runs in arms.values():
        if runs.arm.learning_rate_of in arms:
            source = arms[runs.arm.learning_rate_of]
            ratios = paired_ratios(runs, source, read)
            pairs = [(gain(runs.by_seed[s]), gain(source.by_seed[s])) for s in runs.by_seed if s in source.by_seed]
            gains = [new - old for new, old in pairs if None not in (new, old)]
            heads = paired_ratios(runs, source, head_mean(first))
            cells = [spread(ratios, 3), spread(heads, 3), spread(gains, 3)]
            rows.append([runs.arm.label, source.arm.label, str(len(ratios)), *cells])
    return markdown_table(rows) if len(rows) > 1 else None


def averaging_table(suite: Suite, arms: Mapping[str, Finished]) -> str | None:
    """The same models with the mean of the heads' logits and with the mean of their probabilities."""
    first = next(iter(suite.evaluation.texts))
    rows = [["arm", *(f"mean of {mode}" for mode in ENSEMBLE_MODES)]]
    for runs in arms.values():
        if runs.values(gain):
            scores = runs.values(lambda result: result["texts"][first]["ensemble_perplexities"])
            rows.append([runs.arm.label, *(spread([score[mode] for score in scores]) for mode in ENSEMBLE_MODES)])
    return markdown_table(rows) if len(rows) > 1 else None


def tuning_table(suite: Suite, results: Path) -> str:
    """Validation perplexity of every learning rate; the chosen one is bold."""
    chosen, rates = tuned(results, suite), suite.tuning.learning_rates
    rows = {}
    for run in tuning_runs(suite):
        row = rows.setdefault(run.arm.name, [run.arm.label] + [""] * len(rates))
        if result := read_result(results, suite, run):
            text = f"{result['validation']['perplexity']:.2f}"
            best = run.learning_rate == chosen.get(run.arm.name)
            row[1 + rates.index(run.learning_rate)] = f"**{text}**" if best else text
    return markdown_table([["arm", *(f"{rate:g}" for rate in rates)], *rows.values()])


def zero_shot_table(arms: Mapping[str, Finished]) -> str | None:
    scored = {
        runs.arm.label: [r["zero_shot"] for r in runs.by_seed.values() if "zero_shot" in r] for runs in arms.values()
    }
    scored = {label: scores[0] for label, scores in scored.items() if scores}
    if not scored:
        return None
    tasks = list(next(iter(scored.values()))["results"])
    rows = [["arm", *tasks, "mean"]]
    for label, scores in scored.items():
        # The first scorer is the ensemble, or the only head.
        accuracies = [next(iter(scores["results"][task].values()))["acc"] for task in tasks]
        cells = [score_text(accuracy["value"], accuracy["stderr"]) for accuracy in accuracies]
        rows.append([label, *cells, f"{statistics.fmean(accuracy['value'] for accuracy in accuracies):.3f}"])
    return markdown_table(rows)


def heads_table(arms: Mapping[str, Finished]) -> str | None:
    """Perplexity of the ensemble of some of the heads."""
    most = max(len(r["diversity"]["heads_used"]) for runs in arms.values() for r in runs.by_seed.values())
    rows = [["arm", *(f"{n} head{'s' * (n > 1)}" for n in range(1, most + 1))]]
    for runs in arms.values():
        used = [r["diversity"]["heads_used"] for r in runs.by_seed.values()]
        if len(used[0]) > 1:
            cells = [spread([seed[n]["mean"] for seed in used]) for n in range(len(used[0]))]
            rows.append([runs.arm.label, *cells, *[""] * (most - len(cells))])
    return markdown_table(rows) if len(rows) > 1 else None


def tables(suite: Suite, results: Path) -> dict[str, str]:
    """All tables of the results there are, Markdown by title."""
    arms = finished(suite, results)
    tables_by_title = {}
    if arms:
        tables_by_title = {
            "Quality": quality_table(suite, arms),
            "Budgets": budget_table(suite, arms),
            "One change": effects_table(suite, arms),
            "Texts": texts_table(suite, arms),
            "Heads used": heads_table(arms),
            "Averaging": averaging_table(suite, arms),
            "Zero-shot accuracy, ± standard error over items": zero_shot_table(arms),
        }
    tables_by_title["Learning rates: validation perplexity of the tuning runs"] = tuning_table(suite, results)
    return {title: table for title, table in tables_by_title.items() if table}


def report_text(suite: Suite, results: Path) -> str:
    """A page of all tables."""
    runs = main_runs(suite, dict.fromkeys(suite.arms, 1.0))
    done = sum((results / run.name / RESULT_FILE).is_file() for run in runs)
    parts = [
        f"# {suite.name}",
        f"{done} of {len(runs)} runs are finished. `python experiments/run.py --suite "
        f"experiments/suites/{suite.name}.yaml --report` makes this page from the files beside "
        "it. ± is the standard deviation over seeds; ratios are of paired seeds.",
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
        plot_curves(plt, main, results / "curves.png")
        plot_quality(plt, suite, main, results / "quality.png")
        plot_diversity(plt, suite, arms, results / "diversity.png")
    return text


# -------------------------------------------------------------------------------------------------------- plots


def style(arms: Mapping[str, Finished]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each arm, the same in all plots."""
    markers = "osD^v<>Pp*Xhd8"
    return {name: {"color": f"C{i % 10}", "marker": markers[i % len(markers)]} for i, name in enumerate(arms)}


def plot_curves(plt: Any, arms: Mapping[str, Finished], path: Path) -> None:
    """Validation perplexity in training against tokens and both counts of FLOPs, the mean over seeds."""
    axes_of = {
        "tokens": "training tokens (M)",
        "flops": "training PFLOP, executed",
        "sparse_flops": "training PFLOP, active weights alone",
    }
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for axis, (key, label) in zip(axes, axes_of.items()):
        for (_name, runs), look in zip(arms.items(), style(arms).values()):
            scale = runs.budget[key] / runs.budget["tokens"] / (1e6 if key == "tokens" else 1e15)
            points = list(zip(*runs.curves))[1:]  # not of the untrained model
            x = [point[0]["training_tokens"] * scale for point in points]
            y = [statistics.fmean(record["perplexity"] for record in point) for point in points]
            axis.plot(x, y, label=runs.arm.label if axis is axes[0] else None, markersize=4, **look)
        axis.set(xlabel=label, yscale="log")
        axis.grid(color="0.9", which="both")
    axes[0].set_ylabel("validation perplexity, mean of seeds")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(plt, figure, path)


def plot_quality(plt: Any, suite: Suite, arms: Mapping[str, Finished], path: Path) -> None:
    """In-domain perplexity against active parameters, training FLOPs and the number of heads."""
    text = next(iter(suite.evaluation.texts))
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharey=True, layout="constrained")
    for (_name, runs), look in zip(arms.items(), style(arms).values()):
        values = runs.values(perplexity_on(text))
        for axis, x in zip(axes, (runs.budget["active"] / 1e6, runs.budget["flops"] / 1e15)):
            error = statistics.stdev(values) if len(values) > 1 else None
            label = runs.arm.label if axis is axes[0] else None
            axis.errorbar(x, statistics.fmean(values), yerr=error, capsize=3, linestyle="", label=label, **look)
        used = [result["diversity"]["heads_used"] for result in runs.by_seed.values()]
        heads = range(1, len(used[0]) + 1)
        axes[2].plot(heads, [statistics.fmean(seed[n - 1]["mean"] for seed in used) for n in heads], **look)
    for axis, label in zip(axes, ("active parameters (M)", "training PFLOP, executed", "heads of the model in use")):
        axis.set_xlabel(label)
        axis.grid(color="0.9")
    axes[2].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel(f"perplexity, {text} (bar: ± sd over seeds)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(plt, figure, path)


def density_series(arms: Mapping[str, Finished]) -> list[list[str]]:
    """Arms that differ from each other in density alone, and in the rate that follows from it; the sparsest first."""
    series: dict[str, dict[float, str]] = {}
    for name, runs in arms.items():
        rest = {
            f"{section}.{key}": value
            for section, values in runs.arm.config.items()
            for key, value in values.items()
            if key not in ("density", "learning_rate_factors")
        }
        # The first arm of a density: a later one differs in its rates alone.
        series.setdefault(json.dumps(rest, sort_keys=True), {}).setdefault(round(runs.mean(density), 3), name)
    return [[names[value] for value in sorted(names)] for names in series.values() if len(names) > 1]


def plot_diversity(plt: Any, suite: Suite, arms: Mapping[str, Finished], path: Path) -> None:
    """Diversity, and what the ensemble makes of it, against the density of the masked weights.

    Arms that differ in density alone are a line; the others from one seed are grey.
    """
    text = next(iter(suite.evaluation.texts))
    several = {name: runs for name, runs in arms.items() if runs.values(gain) and not runs.arm.longer}
    if not several:
        return
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    looks = style(arms)
    series, points = density_series(several), {"linestyle": ""}
    drawn = [(f"{several[s[0]].arm.label} to {several[s[-1]].arm.label}", s, looks[s[0]]) for s in series]
    rest = [name for name in several if not any(name in names for names in series)]
    main = [name for name in rest if len(several[name].by_seed) > 1]
    drawn += [(several[name].arm.label, [name], looks[name] | points) for name in main]
    if others := [name for name in rest if name not in main]:
        drawn.append(("other arms", others, {"color": "0.7", "marker": "."} | points))
    for label, names, look in drawn:
        x = [several[name].mean(density) for name in names]
        for axis, read in zip(axes, (disagreement, gain, perplexity_on(text))):
            axis.plot(x, [several[name].mean(read) for name in names], label=label if axis is axes[0] else None, **look)
    titles = (
        "disagreement between heads",
        "gain of the ensemble (nats a token)",
        f"perplexity of the ensemble, {text}",
    )
    for axis, title in zip(axes, titles):
        axis.set(xlabel="density of the masked weights", ylabel=title)
        axis.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(plt, figure, path)


def save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100)
    plt.close(figure)
