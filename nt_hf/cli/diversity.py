"""Why a checkpoint's heads help each other on a text, or do not: figures and plots.

    nt-hf evaluate diversity --model runs/demo/checkpoint-1400 --data sample:validation --output diversity

Writes diversity.json and plots into the directory --output. Tokens are scored as by nt-hf evaluate perplexity.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.diversity import measure_diversity
from ..evaluation.perplexity import load_for_evaluation
from ..evaluation.plots import write_plots
from ..files import write_json
from ..text import plain_table
from .program import check_output, provenance, verb_parser
from .scored_text import add_text_arguments, open_text, text_record


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb_parser("evaluate diversity", __doc__)
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
    """What is printed: the figures of ``result`` but for those of single pairs, bins and modules."""
    scores = {f"head {head}": score for head, score in zip(result["heads"], result["head_scores"])}
    scores |= {f"ensemble, {mode}": score for mode, score in result["ensemble_scores"].items()}
    rows = [["", "perplexity", "loss", "accuracy", "ECE"]]
    for name, score in scores.items():
        loss, accuracy, error = score["loss"], score["accuracy"], score["calibration"]["error"]
        rows.append([name, f"{score['perplexity']:.3f}", f"{loss:.4f}", f"{accuracy:.4f}", f"{error:.4f}"])
    title = f"{result['documents']:,} documents, {result['tokens']:,} tokens, ensemble mode {result['ensemble_mode']}"
    if len(result["heads"]) == 1:
        return f"{title}\n\n{plain_table(rows)}"
    for key, name in (("vote_accuracy", "majority vote"), ("oracle_accuracy", "any head right")):
        rows.append([name, "", "", f"{result[key]:.4f}"])
    gains = [["gain", "mean head loss", "- diversity", "= ensemble loss", "residual"]]
    for mode, gain in result["gains"].items():
        split = (f"{gain['mean_head_loss']:.4f}", f"- {gain['diversity']:.4f}", f"= {gain['ensemble_loss']:.4f}")
        gains.append([mode, *split, f"{gain['residual']:.1e}"])
    used = [["heads used", "perplexity", "lowest", "highest"]]
    for row in result["heads_used"]:
        used.append([str(row["heads"]), *(f"{row[key]:.3f}" for key in ("mean", "lowest", "highest"))])
    overlap = result["mask_overlap"]
    means = {
        "disagreement": result["disagreement"]["mean"],
        "KL, nats per token": result["kl"]["mean"],
        "correlation of errors": result["error_correlation"]["mean"],
        **{f"CKA after {depth}": pairs["mean"] for depth, pairs in result["similarity"].items()},
        "overlap (Jaccard) of masks": overlap and overlap["overall"],
    }
    pairs = [["mean over pairs of heads"]]
    pairs += [[name, "none" if value is None else f"{value:.4f}"] for name, value in means.items()]
    return "\n\n".join([title, *map(plain_table, (rows, gains, used, pairs))])
