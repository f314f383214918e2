"""Looks into a trained model for what may hold its heads back: gradients that disagree, masks that are uneven.

    python benchmarks/explain.py --model CHECKPOINT [CHECKPOINT …] --data FILE

Gradients: of each head's own loss on the same rows, with respect to what the heads share. A cosine of 1 means that the
heads want the same of it, 0 that they want unrelated things. Masks: the active weights of a tensor's rows (what an
output sees) and columns (what uses an input), their standard deviation over that of masks drawn at random at the same
density: 1 is as even as chance.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.cli.program import run
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.models.masks import get_mask, masked_modules
from nt_hf.text import markdown_table

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="checkpoint directories")
    parser.add_argument("--data", nargs="+", required=True, help="text that they were not trained on")
    parser.add_argument("--rows", type=int, default=64, help="sequences to take gradients of (%(default)s)")
    args = parser.parse_args()
    rows = [["model", "cosine, embedding", "cosine, backbone", "rows", "columns"]]
    for path in args.model:
        model = NeuroTrailsLlamaForCausalLM.from_pretrained(path).train()
        length = model.config.max_position_embeddings
        batches = TokenBatches(args.data, load_tokenizer(str(path)), batch_size=8, sequence_length=length)
        ids = [batch["input_ids"] for batch in itertools.islice(batches, max(1, args.rows // 8))]
        embedding = getattr(model.model, "embed_tokens", torch.nn.ModuleList())  # which a full ensemble does not share
        cosines = [head_cosine(model, ids, module) for module in (embedding, model.model.layers)]
        cells = [*cosines, *unevenness(model)]
        rows.append([str(path), *("" if cell is None else f"{cell:.3f}" for cell in cells)])
    print(markdown_table(rows))


def head_cosine(
    model: NeuroTrailsLlamaForCausalLM, ids: Iterable[torch.LongTensor], shared: torch.nn.Module
) -> float | None:
    """Mean cosine between two heads' gradients of the weights of ``shared``; ``None`` without weights or other heads.

    Args:
        ids: batches ``[batch, seq]`` of tokens, whose gradients are summed.
    """
    parameters, heads = list(shared.parameters()), range(model.config.num_ensemble_heads)
    if not parameters or len(heads) == 1:
        return None
    gradients = []
    for head in heads:
        total = torch.zeros(sum(p.numel() for p in parameters))
        for batch in ids:
            loss = model(batch, labels=batch, active_heads=[head], use_cache=False).loss
            total += torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])
        gradients.append(total)
    pairs = itertools.combinations(gradients, 2)
    return statistics.fmean(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)


def unevenness(model: torch.nn.Module) -> tuple[float | None, float | None]:
    """Spread of the active weights of rows and of columns over that of random masks, the mean of all sparse tensors."""
    masks = [get_mask(module).float() for module in masked_modules(model).values()]
    sparse = [mask for mask in masks if 0 < mask.mean() < 1]
    if not sparse:
        return None, None

    def spread(mask: torch.Tensor, dim: int) -> float:
        density, others = mask.mean(), mask.shape[dim]
        return float(mask.sum(dim).std() / (others * density * (1 - density)).sqrt())

    return tuple(statistics.fmean(spread(mask, dim) for mask in sparse) for dim in (1, 0))


if __name__ == "__main__":
    run(main)
