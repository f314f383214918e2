"""Colours each token of a text by how unsure the model was when it predicted it. nt_hf need not be installed.

python examples/uncertainty.py --model runs/demo/checkpoint-1400 --text "The best way to learn is to teach."
python examples/uncertainty.py --model runs/demo/checkpoint-1400 --prompt "The best way to" --html uncertainty.html
"""

import argparse
import html
import inspect
import itertools
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

UNITS = {"predictive_entropy": " nats", "mutual_information": " nats", "disagreement": ""}
LOW, HIGH = (255, 255, 255), (255, 90, 60)  # a background that black letters stay readable on

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{measure} of each token</title>
<style>
body {{ background: #fff; color: #000; font: 1.1rem/1.7 sans-serif; max-width: 50rem; margin: 2rem auto; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.context {{ color: #777; }}
.bar {{ display: inline-block; width: 10rem; height: .8em; border: 1px solid #999;
  background: linear-gradient(to right, {low}, {high}); }}
</style>
</head>
<body>
<p class="legend">{measure} of {count} tokens: {lowest} (lowest)
<span class="bar"></span> {highest} (highest)</p>
<div class="text"><span class="context">{context}</span>{tokens}</div>
</body>
</html>
"""


@dataclass
class Token:
    """A predicted token: the text that it adds, its probability and the measures of the prediction."""

    text: str
    probability: float
    measures: dict[str, float]


@torch.no_grad()
def score(model, tokenizer, text: str) -> tuple[str, list[Token]]:
    """The text of the first token, which nothing predicts, and the other tokens."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    check_length("--text", len(ids), 2, model.config.max_position_embeddings)
    # What lies between two tokens, such as spaces that the tokenizer drops, belongs to the second.
    stops = list(itertools.accumulate((stop for _, stop in encoding["offset_mapping"]), max))
    stops[-1] = len(text)
    first, *pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *stops])]
    ids = torch.tensor([ids])
    output = model(ids, output_uncertainty=True, use_cache=False)
    uncertainty = {name: values[:, :-1] for name, values in output.uncertainty.items()}
    return first, make_tokens(pieces, ids[:, 1:], output.logits[:, :-1], uncertainty)


def generate(model, tokenizer, prompt: str, max_new_tokens: int) -> tuple[str, list[Token]]:
    """The prompt, and the tokens that continue it."""
    limit = model.config.max_position_embeddings
    if not 1 <= max_new_tokens < limit:
        raise ValueError(f"--max_new_tokens {max_new_tokens}: accepted are 1 to {limit - 1}")
    ids = tokenizer(prompt)["input_ids"]
    check_length("--prompt", len(ids), 1, limit - max_new_tokens)
    width, ids = len(ids), torch.tensor([ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        top_k=40,
        temperature=0.8,
        output_uncertainty=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    pieces = decode_each(tokenizer, output.sequences[0].tolist(), width)
    return prompt, make_tokens(pieces, output.sequences[:, width:], torch.stack(output.logits, 1), output.uncertainty)


def check_length(name: str, length: int, least: int, most: int) -> None:
    if not least <= length <= most:
        raise ValueError(f"{name} has {length} tokens: accepted are {least} to {most}")


def decode_each(tokenizer, ids: list[int], start: int) -> list[str]:
    """The text that each token from ``start`` on adds; a character of several tokens comes with its last one."""
    shown, pieces = tokenizer.decode(ids[:start]), []
    for stop in range(start + 1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop])
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}") and stop < len(ids)
        pieces.append("" if incomplete else text[len(shown) :])
        shown = shown if incomplete else text
    return pieces


def make_tokens(pieces: Sequence[str], ids: torch.Tensor, logits: torch.Tensor, uncertainty) -> list[Token]:
    """Tokens from ids and measures ``[1, n]`` and logits ``[1, n, vocab]`` of their predictions."""
    probabilities = logits.float().softmax(-1).gather(-1, ids[..., None])[0, :, 0].tolist()
    names, columns = zip(*((name, values[0].tolist()) for name, values in uncertainty.items()))
    rows = [dict(zip(names, row)) for row in zip(*columns)]
    return [Token(*token) for token in zip(pieces, probabilities, rows, strict=True)]


def colors(values: Sequence[float]) -> list[tuple[int, ...]]:
    """Red, green and blue (0 to 255) of each value, from ``LOW`` for the smallest to ``HIGH`` for the largest."""
    smallest, largest = min(values), max(values)
    shares = [(value - smallest) / (largest - smallest) if largest > smallest else 0.0 for value in values]
    return [tuple(round(low + share * (high - low)) for low, high in zip(LOW, HIGH)) for share in shares]


def printable(text: str) -> str:
    """Without control characters, which could command a terminal; newlines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def to_ansi(texts: Iterable[str], backgrounds: Iterable[tuple[int, ...]]) -> str:
    """The texts on 24-bit backgrounds; line by line, or a terminal would colour the rest of the line as well."""
    parts = []
    for text, background in zip(texts, backgrounds):
        start = "\x1b[38;2;0;0;0;48;2;{};{};{}m".format(*background)
        parts.append(re.sub(r"[^\n]+", lambda line, start=start: f"{start}{line[0]}\x1b[0m", text))
    return "".join(parts)


def to_html(context: str, tokens: Sequence[Token], measure: str) -> str:
    """A page of its own; a token's tooltip gives its probability and all measures."""
    values = [token.measures[measure] for token in tokens]
    spans = []
    for token, background in zip(tokens, colors(values)):
        measures = (f"{name} {value:.4g}{UNITS[name]}" for name, value in token.measures.items())
        title = html.escape("\n".join([f"probability {token.probability:.4g}", *measures]))
        text = html.escape(printable(token.text))
        spans.append(f'<span title="{title}" style="background: {to_hex(background)}">{text}</span>')
    return PAGE.format(
        measure=measure,
        count=len(tokens),
        lowest=f"{min(values):.4g}{UNITS[measure]}",
        highest=f"{max(values):.4g}{UNITS[measure]}",
        low=to_hex(LOW),
        high=to_hex(HIGH),
        context=html.escape(printable(context)),
        tokens="".join(spans),
    )


def to_hex(color: Sequence[int]) -> str:
    return "#" + bytes(color).hex()


def load(directory: Path):
    if not directory.is_dir():
        raise ValueError(f"--model {directory}: accepted is a checkpoint directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    except (ValueError, OSError) as error:
        raise ValueError(f"--model {directory} is no complete checkpoint: {error}") from error
    if "output_uncertainty" not in inspect.signature(model.forward).parameters:
        name = type(model).__name__
        raise ValueError(
            f"--model {directory}: its {name} has no output_uncertainty; accepted is a NeuroTrails with it"
        )
    if bad := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"--model {directory} has weights that are not finite, for example {bad[0]}")
    return model, tokenizer


def check_html(path: Path) -> None:
    """Finds out, before the work begins, whether the page can be written."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--html {path}: accepted is a file to write, in a directory that is there")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="a text to score")
    source.add_argument("--prompt", help="a text to continue; the new tokens are coloured")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="with --prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="with --prompt (%(default)s)")
    parser.add_argument("--measure", choices=UNITS, default="mutual_information", help="(%(default)s)")
    parser.add_argument("--html", type=Path, help="also write a page to this file")
    parser.add_argument("--color", action="store_true", help="colour even if NO_COLOR is set or this is no terminal")
    args = parser.parse_args(arguments)

    if args.html:
        check_html(args.html)
    model, tokenizer = load(args.model)
    torch.manual_seed(args.seed)
    if args.text is not None:
        context, tokens = score(model, tokenizer, args.text)
    else:
        context, tokens = generate(model, tokenizer, args.prompt, args.max_new_tokens)
    if not all(math.isfinite(value) for token in tokens for value in token.measures.values()):
        raise ValueError(f"--model {args.model}: measures are not finite, its activations overflow on this text")

    texts, values = [printable(token.text) for token in tokens], [token.measures[args.measure] for token in tokens]
    colored = args.color or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    print(printable(context) + (to_ansi(texts, colors(values)) if colored else "".join(texts)))
    legend = f"{min(values):.4g}", f"{max(values):.4g}"
    low, high = (to_ansi([text], [color]) for text, color in zip(legend, (LOW, HIGH))) if colored else legend
    print(f"\n{args.measure} of {len(tokens)} tokens: {low} (lowest) to {high}{UNITS[args.measure]} (highest)")
    if args.html:
        args.html.write_text(to_html(context, tokens, args.measure), encoding="utf-8")


if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
