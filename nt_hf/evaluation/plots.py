"""Plots of what the module `diversity` measures."""

import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from ..text import pyplot

Result = Mapping[str, Any]


def write_plots(result: Result, directory: Path) -> list[Path]:
    """Draws a `Diversity.to_dict()` as PNG and SVG; what compares heads is left out for a model of one head.

    Returns:
        The files written; none, with a warning, where matplotlib is not installed.
    """
    plt = pyplot()
    if plt is None:
        return []
    plots = {"calibration": _plot_calibration}
    if len(result["heads"]) > 1:
        plots |= {
            "gain": _plot_gain,
            "heads_used": _plot_heads_used,
            "similarity": _plot_similarity,
            "pairs": _plot_pairs,
        }
    files = []
    for name, plot in plots.items():
        figure = plot(plt, result)
        files += [directory / f"{name}.png", directory / f"{name}.svg"]
        for file in files[-2:]:
            figure.savefig(file, dpi=110)
        plt.close(figure)
    return files


def _plot_calibration(plt: Any, result: Result) -> Any:
    figure, (axis, below) = plt.subplots(
        2, 1, figsize=(6.5, 7.5), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    axis.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="perfect calibration")
    scores = [(f"head {head}", score, {}) for head, score in zip(result["heads"], result["head_scores"])]
    if len(scores) > 1:
        scores += [
            (
                f"ensemble, {mode}",
                score,
                {"color": "black", "linestyle": "-" if mode == result["ensemble_mode"] else "--"},
            )
            for mode, score in result["ensemble_scores"].items()
        ]
    for name, score, style in scores:
        bins = score["calibration"]
        filled = [b for b, count in enumerate(bins["counts"]) if count]
        confidences, accuracies = ([bins[key][b] for b in filled] for key in ("confidences", "accuracies"))
        shares = [bins["counts"][b] / result["tokens"] for b in filled]
        label = f"{name}, ECE {bins['error']:.4f}"
        axis.plot(confidences, accuracies, marker=".", linewidth=1.2, label=label, **style)
        below.plot(confidences, shares, marker=".", linewidth=1.2, **style)
    axis.set(ylabel="accuracy of the best guess", title="Calibration", xlim=(0, 1), ylim=(0, 1))
    axis.legend(frameon=False, loc="upper left")
    below.set(xlabel="probability of the best guess (mean of each bin)", ylabel="share of tokens", yscale="log")
    return figure


def _plot_gain(plt: Any, result: Result) -> Any:
    figure, axis = plt.subplots(figsize=(6.5, 4.6), layout="constrained")
    heads = [score["loss"] for score in result["head_scores"]]
    for position, gain in enumerate(result["gains"].values()):
        names = ["diversity", "mean of the heads", "ensemble", "each head"] if position == 0 else [None] * 4
        ensemble, mean = gain["ensemble_loss"], gain["mean_head_loss"]
        axis.bar(position, mean - ensemble, 0.5, ensemble, color="tab:green", alpha=0.35, label=names[0])
        axis.text(position, (ensemble + mean) / 2, f"{gain['diversity']:.4f}", ha="center", va="center")
        for value, color, name in ((mean, "tab:blue", names[1]), (ensemble, "black", names[2])):
            axis.hlines(value, position - 0.25, position + 0.25, color, linewidth=2, label=name)
            axis.text(position + 0.27, value, f"{value:.4f}", va="center", color=color)
        axis.plot([position - 0.32] * len(heads), heads, "o", color="tab:blue", markersize=4, label=names[3])
    losses = [*heads, *(gain["ensemble_loss"] for gain in result["gains"].values())]
    room = 0.1 * (max(losses) - min(losses)) or 0.01
    axis.set(
        xlim=(-0.6, len(result["gains"]) - 0.4),
        ylim=(min(losses) - room, max(losses) + room),
        ylabel="loss (nats a token)",
        title="Ensemble loss = mean head loss - diversity",
    )
    axis.set_xticks(range(len(result["gains"])), [f"ensemble mode {mode}" for mode in result["gains"]])
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=4)
    return figure


def _plot_heads_used(plt: Any, result: Result) -> Any:
    rows = result["heads_used"]
    counts, mean, lowest, highest = ([row[key] for row in rows] for key in ("heads", "mean", "lowest", "highest"))
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    axis.fill_between(
        counts, lowest, highest, color="tab:blue", alpha=0.2, label="lowest to highest window of neighbours"
    )
    axis.plot(counts, mean, color="tab:blue", marker="o", label="mean")
    axis.set(
        xlabel="heads used",
        ylabel="perplexity",
        title=f"Perplexity by heads used, ensemble mode {result['ensemble_mode']}",
    )
    axis.set_xticks(counts)
    axis.legend(frameon=False)
    return figure


def _plot_similarity(plt: Any, result: Result) -> Any:
    depths = list(result["similarity"])
    figure, axis = plt.subplots(figsize=(max(6.5, 0.8 * len(depths)), 4.2), layout="constrained")
    for first, second in combinations(range(len(result["heads"])), 2):
        values = [result["similarity"][depth]["matrix"][first][second] for depth in depths]
        label = f"heads {result['heads'][first]} and {result['heads'][second]}"
        axis.plot(depths, values, marker="o", linewidth=1.2, label=label)
    axis.set(xlabel="depth within the head", ylabel="linear CKA", title="Similarity of the heads' hidden states")
    axis.axhline(1, color="0.7", linestyle=":", label="equal up to rotation and scale")
    axis.legend(frameon=False, fontsize="small", ncols=1 + len(axis.get_lines()) // 8)
    return figure


def _plot_pairs(plt: Any, result: Result) -> Any:
    figures = {
        "disagreement": ("Disagreement\n(share of tokens)", None),
        "kl": ("KL(row || column)\n(nats a token)", None),
        "error_correlation": ("Correlation of errors", 1),
    }
    heads = range(len(result["heads"]))
    side = max(3.4, 0.7 * len(heads))
    figure, axes = plt.subplots(1, len(figures), figsize=(len(figures) * side, side + 0.6), layout="constrained")
    for axis, (key, (title, most)) in zip(axes, figures.items()):
        matrix = [[math.nan if value is None else value for value in row] for row in result[key]["matrix"]]
        for head in heads:
            matrix[head][head] = math.nan  # the same in every model, it would only flatten the colours of the others
        drawn = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=most)
        middle = sum(drawn.get_clim()) / 2
        for row in heads:
            for column in heads:
                value = matrix[row][column]
                if not math.isnan(value):
                    color = "white" if value > middle else "black"
                    axis.text(column, row, f"{value:.3f}", ha="center", va="center", color=color)
        axis.set_xticks(heads, map(str, result["heads"]))
        axis.set_yticks(heads, map(str, result["heads"]))
        axis.set(xlabel="head", ylabel="head", title=title)
    return figure
