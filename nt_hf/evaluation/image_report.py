"""How the result of ``nt-hf evaluate images`` is shown: tables, a reliability diagram, accuracy by severity."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..text import plain_table, pyplot

Result = Mapping[str, Any]
CORRUPTED = {"corruptions": "corruptions", "cifar_c": "published arrays"}


def corruption_means(scores: Mapping[str, Mapping[str, Result]], scorer: str) -> dict[str, float]:
    """Every figure of a scorer, as a mean over corruptions and severities, which all weigh the same."""
    cells = [by_scorer[scorer] for by_severity in scores.values() for by_scorer in by_severity.values()]
    return {figure: sum(cell[figure] for cell in cells) / len(cells) for figure in cells[0]}


def tables(result: Result) -> str:
    """What is printed: every figure but those of single bins, pairs and images."""
    heads = f"{result['heads']} heads, ensemble mode {result['ensemble_mode']}" if result["heads"] > 1 else "one head"
    title = f"{result['images']:,} images, {result['classes']} classes, {heads}"
    figures = {"accuracy": "accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE"}
    if result["calibration"]:
        figures |= {
            "temperature": "T",
            "scaled_nll": "NLL at T",
            "scaled_brier": "Brier at T",
            "scaled_ece": "ECE at T",
        }
    rows = [["", *figures.values()]]
    rows += [[name, *(f"{score[key]:.4f}" for key in figures)] for name, score in result["scores"].items()]
    parts = [title, plain_table(rows)]
    if result["gains"]:
        rows = [["gain over the mean head", "accuracy", "NLL", "Brier"]]
        rows += [[name, *(f"{value:+.4f}" for value in gain.values())] for name, gain in result["gains"].items()]
        parts.append(plain_table(rows))
    means = {"disagreement of two heads": result["disagreement"]["mean"], "overlap of masks": result["mask_overlap"]}
    if result["ood"]:
        means |= {f"AUROC by {name.replace('_', ' ')}": value for name, value in result["ood"]["auroc"].items()}
    rows = [[name, f"{value:.4f}"] for name, value in means.items() if value is not None]
    parts += [plain_table(rows)] if rows else []
    parts += [_severity_table(result, key, label) for key, label in CORRUPTED.items() if result[key]]
    if against := result["against"]:
        rows = [[f"less {against['file']}", "difference", "95 %", "p"]]
        for name, gap in against["differences"].items():
            rows.append([name, f"{gap['value']:+.4f}", f"{gap['low']:+.4f} to {gap['high']:+.4f}", f"{gap['p']:.4f}"])
        parts.append(plain_table(rows))
    return "\n\n".join(parts)


def _severity_table(result: Result, key: str, label: str) -> str:
    scorer = result["main_scorer"]
    severities = list(next(iter(result[key].values())))
    rows = [[f"{label}: accuracy", *severities, "mean"]]
    for name, by_severity in result[key].items():
        values = [by_severity[severity][scorer]["accuracy"] for severity in severities]
        rows.append([name, *(f"{value:.4f}" for value in values), f"{sum(values) / len(values):.4f}"])
    means = corruption_means(result[key], scorer)
    rows.append(["mean of all", *[""] * len(severities), f"{means['accuracy']:.4f}"])
    rows += [[f"mean {figure.upper()}", *[""] * len(severities), f"{means[figure]:.4f}"] for figure in ("nll", "ece")]
    return plain_table(rows)


def write_plots(result: Result, output: Path) -> list[Path]:
    """Draws ``<output's stem>_calibration.png`` and, with corruptions, ``_severity.png`` beside ``output``.

    Returns:
        The files written; none, with a warning, where matplotlib is not installed.
    """
    plt = pyplot()
    if plt is None:
        return []
    figures = {"calibration": _reliability(plt, result)}
    if any(result[key] for key in CORRUPTED):
        figures["severity"] = _accuracy_by_severity(plt, result)
    files = []
    for name, figure in figures.items():
        files.append(output.with_name(f"{output.stem}_{name}.png"))
        figure.savefig(files[-1], dpi=110)
        plt.close(figure)
    return files


def _styles(result: Result, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Line styles: the main scorer is black and wide."""
    return {n: {"color": "black", "linewidth": 2} if n == result["main_scorer"] else {"linewidth": 1} for n in names}


def _reliability(plt: Any, result: Result) -> Any:
    figure, axis = plt.subplots(figsize=(6, 5.6), layout="constrained")
    axis.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="perfect calibration")
    for name, style in _styles(result, list(result["scores"])).items():
        bins = result["reliability"][name]
        filled = [b for b, count in enumerate(bins["counts"]) if count]
        confidences, accuracies = ([bins[key][b] for b in filled] for key in ("confidences", "accuracies"))
        axis.plot(confidences, accuracies, marker=".", label=f"{name}, ECE {bins['error']:.4f}", **style)
    axis.set(xlabel="probability of the best guess (mean of each bin)", ylabel="accuracy of the best guess")
    axis.set(title=f"Reliability, {result['images']:,} images", xlim=(0, 1), ylim=(0, 1))
    axis.legend(frameon=False)
    return figure


def _accuracy_by_severity(plt: Any, result: Result) -> Any:
    """The mean over corruptions of every scorer; severity 0 are the images without corruption."""
    shown = [(key, label) for key, label in CORRUPTED.items() if result[key]]
    figure, axes = plt.subplots(1, len(shown), figsize=(6 * len(shown), 4.6), squeeze=False, layout="constrained")
    for axis, (key, label) in zip(axes[0], shown):
        scores = list(result[key].values())
        for name, style in _styles(result, list(result["scores"])).items():
            points = {0: result["scores"][name]["accuracy"]}
            for severity in scores[0]:
                points[int(severity)] = sum(by[severity][name]["accuracy"] for by in scores) / len(scores)
            axis.plot(list(points), list(points.values()), marker="o", label=name, **style)
        axis.set(xlabel="severity", ylabel="accuracy", title=f"Mean of {len(scores)} {label}", xticks=range(6))
        axis.legend(frameon=False)
    return figure
