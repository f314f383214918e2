"""Tables, plots and model cards from what a run wrote."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers import PreTrainedModel

from ..config import RunConfig
from ..models.model_card import model_card
from ..text import markdown_table, pyplot
from .metrics import last_record, read_metrics
from .tasks import Task

Record = Mapping[str, Any]

#: The figures of heads and ensembles that the table shows, by the ending of their keys: name and format. Evaluations of
#: images have accuracies, those of text have not.
OF_TEXT = {"perplexities": ("perplexity", ".2f")}
OF_IMAGES = {"accuracies": ("accuracy", ".4f"), "losses": ("NLL", ".4f"), "eces": ("ECE", ".4f")}
#: The keys that tables and plots need in the records of an event, beside these figures.
NEEDED = {
    "train": ("loss",),
    "eval": ("loss", "head_losses", "ensemble_mode", "disagreement", "density"),
    "update": ("density", "density_by_group", "ever_active", "head_overlap", "grown", "active"),
}  # fmt: skip


def _figures(evaluation: Record) -> dict[str, tuple[str, str]]:
    return OF_IMAGES if "accuracy" in evaluation else OF_TEXT


def _missing(record: Record) -> list[str]:
    needed = list(NEEDED.get(record["event"], ()))
    if record["event"] == "eval":
        needed[2:2] = [f"{scorer}_{key}" for key in _figures(record) for scorer in ("head", "ensemble")]
    return [key for key in dict.fromkeys(needed) if key not in record]


def results_table(records: Sequence[Record]) -> str:
    """A Markdown table of the last evaluation and of the sparsity at that time."""
    evaluation = last_record(records, "eval")
    if evaluation is None:
        return "no evaluation yet"
    rows = []
    for key, (figure, form) in _figures(evaluation).items():
        rows += [(f"{figure} of head {h}", f"{value:{form}}") for h, value in enumerate(evaluation[f"head_{key}"])]
        for mode, value in evaluation[f"ensemble_{key}"].items():
            default = ", the default" if mode == evaluation["ensemble_mode"] else ""
            rows.append((f"{figure} of the ensemble ({mode}{default})", f"{value:{form}}"))
    rows.append(("disagreement between heads", f"{evaluation['disagreement']:.3f}"))
    rows.append(("density of the masked weights", f"{evaluation['density']:.3f}"))
    if update := last_record(records, "update"):
        rows += [(f"density of {group}", f"{value:.3f}") for group, value in update["density_by_group"].items()]
        rows.append(("share of masked weights ever active", f"{update['ever_active']:.3f}"))
        if update["head_overlap"] is not None:
            rows.append(("overlap (Jaccard) of two heads' masks", f"{update['head_overlap']:.3f}"))
        rows.append(("topology updates", str(sum(record["event"] == "update" for record in records))))
    head = (f"validation, step {evaluation['step']}", "   value")
    return markdown_table([head, *rows], align="<>")


def write_report(run_dir: Path) -> tuple[str, list[Path]]:
    """Writes ``report/`` of a run: the table, and plots where matplotlib is installed.

    Returns:
        The table, and the files written.

    Raises:
        ValueError: a line of ``metrics.jsonl`` is not what a run writes; the message names it.
    """
    metrics = run_dir / "metrics.jsonl"
    records = read_metrics(metrics)
    for number, record in enumerate(records, 1):
        if missing := _missing(record):
            raise ValueError(f"{metrics}, line {number}: a record of {record['event']} lacks {', '.join(missing)}")
    report = run_dir / "report"
    report.mkdir(exist_ok=True)
    table, files = results_table(records), [report / "results.md"]
    files[0].write_text(table + "\n")
    if plt := pyplot():
        files.append(report / "training.png")
        _plot(plt, records, files[-1])
    return table, files


def _plot(plt: Any, records: Sequence[Record], path: Path) -> None:
    train = [r for r in records if r["event"] == "train"]
    evals = [r for r in records if r["event"] == "eval"]
    updates = [r for r in records if r["event"] == "update"]
    figure, axes = plt.subplots(1, 2 if updates else 1, figsize=(12 if updates else 7, 5.2), squeeze=False)
    axis = axes[0, 0]
    axis.plot([r["step"] for r in train], [r["loss"] for r in train], color="0.75", label="training, mean of heads")
    steps = [r["step"] for r in evals]
    for head in range(len(evals[-1]["head_losses"]) if evals else 0):
        axis.plot(steps, [r["head_losses"][head] for r in evals], marker=".", label=f"validation, head {head}")
    if evals:
        axis.plot(steps, [r["loss"] for r in evals], color="black", marker=".", label="validation, ensemble")
    unit = "image" if evals and _figures(evals[-1]) is OF_IMAGES else "token"
    axis.set(xlabel="step", ylabel=f"loss (nats a {unit})", title="Loss")
    _legend_below(axis, axis.get_lines())
    if updates:
        axis = axes[0, 1]
        steps = [r["step"] for r in updates]
        axis.plot(steps, [r["density"] for r in updates], color="black", label="density")
        axis.plot(steps, [r["ever_active"] for r in updates], color="tab:blue", label="ever active")
        for group in updates[-1]["density_by_group"]:
            values = [r["density_by_group"][group] for r in updates]
            axis.plot(steps, values, linestyle=":", label=f"density of {group}")
        axis.set(xlabel="step", ylabel="share of the masked weights", title="Topology", ylim=(0, 1.02))
        churn = axis.twinx()
        churn.plot(steps, [r["grown"] / r["active"] for r in updates], color="tab:red", marker=".", label="moved")
        churn.set(ylabel="share of the active weights moved by the update")
        churn.set_ylim(bottom=0)
        lines = [line for a in (axis, churn) for line in a.get_lines()]
        _legend_below(axis, lines)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _legend_below(axis: Any, lines: Sequence[Any]) -> None:
    names = [line.get_label() for line in lines]
    axis.legend(lines, names, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)


def training_card(model: PreTrainedModel, config: RunConfig, task: Task, step: int, records: Sequence[Record]) -> str:
    """The README of a run's checkpoint: that of the model, with what it was trained on and what was measured."""
    train, validation = (json.dumps(source) for source in (config.data.train, config.data.validation))
    start = f", which began with the weights of `{config.model['init_from']}`" if "init_from" in config.model else ""
    about = f"""\
## Training

Step {step} of {config.train.max_steps} on `{train}`{start}. Validation on `{validation}`:

{results_table(records)}

The run's whole configuration is in `run.yaml`, the densities in `sparsity.json`.
"""
    density = (last_record(records, "eval") or {}).get("density")
    return model_card(model, density, about, list(_indexed(records, task, str(config.data.validation))))


def _indexed(records: Sequence[Record], task: Task, validation: str) -> Iterator[EvalResult]:
    """The ensemble's figures in the last evaluation, for the hub."""
    if (evaluation := last_record(records, "eval")) is None:
        return
    mode = evaluation["ensemble_mode"]
    for key, (figure, _) in _figures(evaluation).items():
        if figure in ("perplexity", "accuracy"):
            yield EvalResult(
                task_type=task.pipeline, dataset_type=task.unit, dataset_name=validation, metric_type=figure,
                metric_value=evaluation[f"ensemble_{key}"][mode], metric_name=f"{figure} of the ensemble ({mode})",
            )  # fmt: skip
