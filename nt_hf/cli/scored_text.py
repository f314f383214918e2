"""The options, the windows and the record of a program that scores a model on a text."""

import argparse
from pathlib import Path
from typing import Any

from ..data.sources import read_texts
from ..data.tokenizers import check_vocabulary, load_tokenizer
from ..evaluation.perplexity import DocumentWindows, load_config
from ..models.configuration_neurotrails import MultiHeadConfig


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of programs that score a model on a text."""
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint directory, of a multi-head or a stock model"
    )
    parser.add_argument("--data", nargs="+", required=True, help="files, globs, sample:validation, hub:…")
    parser.add_argument("--batch_size", type=int, default=8, help="windows a batch")
    parser.add_argument("--stride", type=int, help="tokens from window to window; default: half a window")
    parser.add_argument("--sequence_length", type=int, help="tokens a window; default: the model's trained length")
    parser.add_argument("--max_tokens", type=int, help="stop after the document that reaches so many; default: all")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--on_bad_line", default="error", choices=["error", "skip"])


def open_text(args: argparse.Namespace) -> tuple[MultiHeadConfig, DocumentWindows]:
    """The model's configuration and the windows that [`add_text_arguments`] describe.

    All arguments are checked here; the model, which takes longer, is loaded afterwards.
    """
    config = load_config(args.model)
    trained_length = config.max_position_embeddings
    length = trained_length if args.sequence_length is None else args.sequence_length
    if not 2 <= length <= trained_length:
        raise ValueError(f"--sequence_length {length}: accepted are 2 to {trained_length}, the model's trained length")
    tokenizer = load_tokenizer(str(args.model))
    check_vocabulary(tokenizer, config.vocab_size)
    texts = read_texts(args.data, args.text_field, args.on_bad_line)
    return config, DocumentWindows(
        texts, tokenizer, length=length, stride=args.stride, batch_size=args.batch_size, max_tokens=args.max_tokens
    )


def text_record(args: argparse.Namespace, windows: DocumentWindows) -> dict[str, Any]:
    """What of [`open_text`] belongs into a result, once the windows were scored."""
    return {
        "model": str(args.model),
        "data": args.data,
        "sequence_length": windows.length,
        "stride": windows.stride,
        "batch_size": windows.batch_size,
        "max_tokens": windows.max_tokens,
        "documents": windows.documents,
        "bad_lines": windows.texts.bad_lines,
    }
