"""Perplexity and bits per byte of a checkpoint's heads and of their ensemble on any text.

    python eval/perplexity.py --model runs/demo/checkpoint-1400 --data sample:validation --output perplexity.json

Every token of every document is scored once and weighs the same. A document that is longer than a window of
--sequence_length tokens is scored by a sliding one, which moves on by --stride tokens.
"""

import argparse
import dataclasses
from pathlib import Path

from nt_hf._cli import provenance, run, write_json
from nt_hf.data import check_vocabulary, load_tokenizer, read_texts
from nt_hf.evaluation import DocumentWindows, evaluate, load_for_evaluation
from nt_hf.masks import overall_density


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, of NeuroTrails or a Llama")
    parser.add_argument("--data", nargs="+", required=True, help="files, globs, sample:validation, hub:…")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--batch_size", type=int, default=8, help="windows a batch")
    parser.add_argument("--stride", type=int, help="tokens from window to window; default: half a window")
    parser.add_argument("--sequence_length", type=int, help="tokens a window; default: the model's trained length")
    parser.add_argument("--max_tokens", type=int, help="stop after the document that reaches so many; default: all")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--on_bad_line", default="error", choices=["error", "skip"])
    args = parser.parse_args()

    model = load_for_evaluation(args.model)
    trained_length = model.config.max_position_embeddings
    length = trained_length if args.sequence_length is None else args.sequence_length
    if not 2 <= length <= trained_length:
        raise ValueError(f"--sequence_length {length}: accepted are 2 to {trained_length}, the model's trained length")
    tokenizer = load_tokenizer(str(args.model))
    check_vocabulary(tokenizer, model.config.vocab_size)
    texts = read_texts(args.data, args.text_field, args.on_bad_line)
    windows = DocumentWindows(
        texts, tokenizer, length=length, stride=args.stride, batch_size=args.batch_size, max_tokens=args.max_tokens
    )
    result = evaluate(model, windows)
    result = dataclasses.replace(result, bytes=windows.bytes).to_dict() | {
        "model": str(args.model),
        "data": args.data,
        "sequence_length": windows.length,
        "stride": windows.stride,
        "batch_size": windows.batch_size,
        "max_tokens": windows.max_tokens,
        "density": overall_density(model),
        "documents": windows.documents,
        "unknown_share": windows.unknown / windows.tokens,
        "bad_lines": texts.bad_lines,
        **provenance(),
    }
    write_json(args.output, result)

    print(f"{result['documents']:,} documents, {result['tokens']:,} tokens, {result['bytes']:,} bytes")
    print(f"{'':20}{'perplexity':>10} {'bits per byte':>15}")
    for head, values in enumerate(zip(result["head_perplexities"], result["head_bits_per_byte"])):
        print("  head {:<12} {:10.3f} {:15.4f}".format(head, *values))
    for mode, value in result["ensemble_perplexities"].items():
        print(f"  ensemble, {mode:<7} {value:10.3f} {result['ensemble_bits_per_byte'][mode]:15.4f}")
    print(f"disagreement between heads {result['disagreement']:.3f}, unknown tokens {result['unknown_share']:.2%}")
    print(f"written to {args.output}")


if __name__ == "__main__":
    run(main)
