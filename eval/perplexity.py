"""Perplexity of a checkpoint's heads and of their ensemble on any text.

    python eval/perplexity.py --model runs/demo/checkpoint-1400 --data sample:validation --output perplexity.json

Every token weighs the same. The text is packed: documents joined by the end-of-sequence token, cut into rows of the
model's trained length; the first token of a row is context only.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from nt_hf import __version__
from nt_hf._cli import run
from nt_hf.data import TokenBatches, check_vocabulary, load_tokenizer
from nt_hf.evaluation import evaluate
from nt_hf.masks import overall_density
from nt_hf.training import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory")
    parser.add_argument("--data", nargs="+", required=True, help="files, globs, sample:validation, hub:…")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--batch_size", type=int, default=8, help="rows a batch")
    parser.add_argument("--sequence_length", type=int, help="tokens a row; default: the model's trained length")
    parser.add_argument("--max_tokens", type=int, help="stop after about so many tokens; default: all")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--on_bad_line", default="error", choices=["error", "skip"])
    args = parser.parse_args()

    if not args.model.is_dir():
        raise ValueError(f"--model {args.model}: accepted is a checkpoint directory")
    model = load_model(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(str(args.model))
    check_vocabulary(tokenizer, model.config.vocab_size)
    batches = TokenBatches(
        args.data,
        tokenizer,
        batch_size=args.batch_size,
        sequence_length=args.sequence_length or model.config.max_position_embeddings,
        epochs=1,
        text_field=args.text_field,
        on_bad_line=args.on_bad_line,
    )
    result = evaluate(model, batches, max_tokens=args.max_tokens).to_dict()
    result |= {
        "model": str(args.model),
        "data": args.data,
        "sequence_length": batches.sequence_length,
        "density": overall_density(model),
        "documents": batches.documents,
        "bad_lines": batches.bad_lines,
        "versions": {"nt_hf": __version__, "torch": torch.__version__},
        "command": " ".join(["python", *sys.argv]),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")

    print(f"perplexity on {result['tokens']:,} tokens")
    for head, value in enumerate(result["head_perplexities"]):
        print(f"  head {head:<12} {value:10.3f}")
    for mode, value in result["ensemble_perplexities"].items():
        print(f"  ensemble, {mode:<7} {value:10.3f}")
    print(f"disagreement between heads {result['disagreement']:.3f}; written to {args.output}")


if __name__ == "__main__":
    run(main)
