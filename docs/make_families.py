"""Tries every decoder and image classifier of the installed Transformers: python docs/make_families.py.

Writes docs/families.md; takes about a minute of CPU time. Each family is a tiny model of random weights, whose trails
are held against their own stock models: decoders' logits, losses, greedy tokens with and without a cache, padded and
single (tests/models/families.py); classifiers' logits, losses and checkpoints (tests/images/image_families.py).
"""

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "models"), str(ROOT / "tests" / "images")]
from families import all_families, outcome  # noqa: E402
from image_families import all_image_families, image_outcome  # noqa: E402

PAGE = """# Families of models

NeuroTrails models are made of any decoder of Transformers whose base model is an embedding, a stack of blocks and a
norm, and of any image classifier whose base model has one stack of blocks, or stages of them. No family has code of its
own (the mechanism is described in [design.md](design.md)). This page is written by `python docs/make_families.py`, here
with Transformers {version}.

Each family was tried as a tiny model of random weights. A refusal is an error of one line before any weight exists.

## Decoders

Three heads of two of five blocks, with sliding windows shorter than the text and left padding. A family **works** where
every trail's logits are those of the extracted stock model (bit for bit), its losses agree to 3e-6 of about 10, and
greedy tokens are the same with a growing cache, a static cache and none, of one trail and of its stock model, in a
padded batch and alone.

Of mixtures of experts, the experts' weights are fused tensors: they stay dense, and a warning says so when masks are
drawn. No router loss is added; `output_router_logits=True` is refused.

{decoders}

## Image classifiers

Three heads of three of six blocks, half of their weights masked. A family **works** where every trail's logits are
those of the extracted stock model (bit for bit), its losses agree to a millionth, a model made of a stock model has its
logits in every head, and a sparse checkpoint brings logits and masks back.

{classifiers}
"""

SECTION = """### {count} families work

{works}

### {refused_count} are refused

| family | the line |
|---|---|
{refused}

### Not tried: {failed_count}

The settings that make other families tiny do not fit their configuration, or a package is not installed.

| family | what happened |
|---|---|
{failed}"""


def section(families: Iterable[str], outcome: Callable[[str], Any]) -> str:
    """What became of some families, by a function that returns the line that refuses one, or how far off it is."""
    works, refused, failed = [], [], []
    for family in families:
        try:
            result = outcome(family)
        except Exception as error:
            failed.append((family, f"{type(error).__name__}: {' '.join(str(error).split())}"))
            continue
        if isinstance(result, str):
            refused.append((family, result))
        else:
            assert result.exact, f"{family}: {result}"
            works.append(f"`{family}`")

    def rows(pairs):
        return "\n".join(f"| `{family}` | {line.replace('|', '/')[:300]} |" for family, line in pairs)

    return SECTION.format(
        count=len(works), works=", ".join(works), refused_count=len(refused), refused=rows(refused),
        failed_count=len(failed), failed=rows(failed),
    )  # fmt: skip


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    page = PAGE.format(
        version=transformers.__version__,
        decoders=section(all_families(), outcome),
        classifiers=section(all_image_families(), image_outcome),
    )
    (ROOT / "docs" / "families.md").write_text(page)


if __name__ == "__main__":
    main()
