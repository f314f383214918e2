"""Tries every decoder of the installed Transformers: python docs/make_families.py writes docs/families.md.

Takes about a minute on one core. Each family is a tiny model of random weights, whose trails are held against their
own stock models: logits, losses, greedy tokens with and without a cache, padded and single (tests/models/families.py).
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))
from families import Parity, all_families, outcome  # noqa: E402

PAGE = """# Families of models

NeuroTrails models are made of any decoder of Transformers whose base model is an embedding, a stack of blocks and a
norm. No family has code of its own (the mechanism is described in [design.md](design.md)). This page is written by
`python docs/make_families.py`, here with Transformers {version}.

Each family was tried as a tiny model of random weights: three heads of two of five blocks, with sliding windows shorter
than the text and left padding. A family **works** where every trail's logits are those of the extracted stock model
(bit for bit), its losses agree to 3e-6 of about 10, and greedy tokens are the same with a growing cache, a static cache
and none, of one trail and of its stock model, in a padded batch and alone.

Of mixtures of experts, the experts' weights are fused tensors: they stay dense, and a warning says so when masks are
drawn. No router loss is added; `output_router_logits=True` is refused.

## {count} families work

{works}

## {refused_count} are refused

A refusal is an error of one line before any weight exists.

| family | the line |
|---|---|
{refused}

## {failed_count} were not tried

The settings that make other families tiny do not fit their configuration.

| family | what happened |
|---|---|
{failed}
"""


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    works, refused, failed = [], [], []
    for family in all_families():
        try:
            result = outcome(family)
        except Exception as error:
            failed.append((family, f"{type(error).__name__}: {' '.join(str(error).split())}"))
            continue
        if isinstance(result, Parity):
            assert result.exact, f"{family}: {result}"
            works.append(f"`{family}`")
        else:
            refused.append((family, result))

    def rows(pairs):
        return "\n".join(f"| `{family}` | {line.replace('|', '/')[:200]} |" for family, line in pairs)

    page = PAGE.format(
        version=transformers.__version__, count=len(works), works=", ".join(works), refused_count=len(refused),
        refused=rows(refused), failed_count=len(failed), failed=rows(failed),
    )  # fmt: skip
    (ROOT / "docs" / "families.md").write_text(page)


if __name__ == "__main__":
    main()
