"""Why a checkpoint's heads help each other on a text, or do not: figures and plots.

    nt-hf evaluate diversity --model runs/demo/checkpoint-1400 --data sample:validation --output diversity

Writes diversity.json and plots into the directory --output. Tokens are scored as by nt-hf evaluate perplexity.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.diversity import measure_diversity
from ..evaluation.perplexity import load_for_evaluation
from ..evaluation.plots import write_plots
from ..files import write_json
from .program import check_output, provenance
from .scored_text import add_text_arguments, open_text, text_record


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="nt-hf evaluate diversity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_text_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="the directory to write into")
    parser.add_argument("--heads", help="measure these only, as 0,2; default: all")
    args = parser.parse_args(argv)

    check_output(args.output, directory=True)
    config, windows = open_text(args)
    heads = parse_heads(args.heads, config.num_ensemble_heads)
    model = load_for_evaluation(args.model)
    result = measure_diversity(model, windows, heads=heads).to_dict() | {
        **text_record(args, windows),
        **provenance(),
    }
    print(table(result))
    write_json(args.output / "diversity.json", result)
    plots = write_plots(result, args.output)
    print(f"diversity.json{' and plots' if plots else ''} written to {args.output}")


def parse_heads(text: str | None, count: int) -> Sequence[int] | None:
    heads = text.split(",") if text is not None else []
    if not set(heads) <= {str(head) for head in range(count)} or len(set(heads)) < len(heads):
        raise ValueError(f"--heads {text}: accepted are different numbers of 0 to {count - 1}, joined by commas")
    return [int(head) for head in heads] or None


def table(result: Mapping[str, Any]) -> str:
    lines = [
        f"{result['documents']:,} documents, {result['tokens']:,} tokens, ensemble mode {result['ensemble_mode']}",
        "",
        f"{'':20}{'perplexity':>11}{'loss':>9}{'accuracy':>10}{'ECE':>8}",
    ]
    named = {f"head {head}": score for head, score in zip(result["heads"], result["head_scores"])}
    named |= {f"ensemble, {mode}": score for mode, score in result["ensemble_scores"].items()}
    for name, score in named.items():
        figures = f"{score['perplexity']:11.3f}{score['loss']:9.4f}{score['accuracy']:10.4f}"
        lines.append(f"  {name:<18}{figures}{score['calibration']['error']:8.4f}")
    if len(result["heads"]) == 1:
        return "\n".join(lines)
    for key, name in (("vote_accuracy", "majority vote"), ("oracle_accuracy", "any head right")):
        lines.append(f"  {name:<38}{result[key]:10.4f}")
    lines += ["", f"{'gain':20}{'mean head loss':>15} - {'diversity':>9} = {'ensemble loss':>13}{'residual':>11}"]
    for mode, gain in result["gains"].items():
        split = f"{gain['mean_head_loss']:15.4f} - {gain['diversity']:9.4f} = {gain['ensemble_loss']:13.4f}"
        lines.append(f"  {mode:<18}{split}{gain['residual']:11.1e}")
    lines += ["", f"{'heads used':20}{'perplexity':>11}{'lowest':>11}{'highest':>11}"]
    for row in result["heads_used"]:
        lines.append(f"  {row['heads']:<18}{row['mean']:11.3f}{row['lowest']:11.3f}{row['highest']:11.3f}")
    overlap = result["mask_overlap"]
    means = {
        "disagreement": result["disagreement"]["mean"],
        "KL, nats a token": result["kl"]["mean"],
        "correlation of errors": result["error_correlation"]["mean"],
        **{f"CKA after {depth}": pairs["mean"] for depth, pairs in result["similarity"].items()},
        "overlap (Jaccard) of masks": overlap and overlap["overall"],
    }
    lines += ["", "mean over pairs of heads"]
    lines += [f"  {name:<27}{'none' if value is None else f'{value:.4f}':>8}" for name, value in means.items()]
    return "\n".join(lines)
