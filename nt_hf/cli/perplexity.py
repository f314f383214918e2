"""Perplexity and bits per byte of a checkpoint's heads and of their ensemble on any text.

    nt-hf evaluate perplexity --model runs/demo/checkpoint-1400 --data sample:validation --output perplexity.json

Every token of every document is scored once and weighs the same. A document that is longer than a window of
--sequence_length tokens is scored by a sliding one, which moves on by --stride tokens.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.perplexity import evaluate, load_for_evaluation
from ..files import write_json
from ..models.masks import overall_density
from ..text import plain_table
from .program import check_output, provenance, verb_parser
from .scored_text import add_text_arguments, open_text, text_record


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb_parser("evaluate perplexity", __doc__)
    add_text_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args(argv)

    check_output(args.output)
    _, windows = open_text(args)
    model = load_for_evaluation(args.model)
    result = evaluate(model, windows)
    result = dataclasses.replace(result, bytes=windows.bytes).to_dict() | {
        **text_record(args, windows),
        "density": overall_density(model),
        "unknown_share": windows.unknown / windows.tokens,
        **provenance(),
    }
    print(f"{result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes")
    scores = [
        (f"head {head}", *values)
        for head, values in enumerate(zip(result["head_perplexities"], result["head_bits_per_byte"]))
    ]
    for mode, value in result["ensemble_perplexities"].items():
        scores.append((f"ensemble, {mode}", value, result["ensemble_bits_per_byte"][mode]))
    rows = [(name, f"{value:.3f}", f"{bits:.4f}") for name, value, bits in scores]
    print(plain_table([("", "perplexity", "bits per byte"), *rows]))
    print(f"disagreement between heads {result['disagreement']:.3f}, unknown tokens {result['unknown_share']:.2%}")
    write_json(args.output, result)
    print(f"written to {args.output}")
