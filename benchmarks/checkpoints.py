"""What sparse checkpoints save, and what loading them costs.

    python benchmarks/checkpoints.py [--dtype float32]

Both forms of one model are loaded by turns, by ``from_pretrained``, from files that the system has in memory: so the
times are those of the work, and a slow disk is in favour of the smaller file.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_hf.models.masks import masked_modules, set_mask

import torch
from common import Figure, ratio, table, take_turns
from transformers.utils import logging

DENSITIES = (0.1, 0.5, 0.9)
ROUNDS = 5
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 5,
    "blocks_in_head": 4,
}


def measure(dtype: torch.dtype = torch.bfloat16) -> list[Figure]:
    """Bytes and load times of a model of 105 million weights, all masked but the norms."""
    torch.manual_seed(0)
    logging.disable_progress_bar()
    model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**SIZES, masked_modules=["*"])).to(dtype)
    figures = []
    for density in DENSITIES:
        for module in masked_modules(model).values():
            module.weight.data.fill_(1)  # no time depends on the values
            set_mask(module, torch.rand(module.weight.shape) < density)
        with tempfile.TemporaryDirectory() as folder:
            figures += _of_one_density(model, density, Path(folder))
    return figures


def _of_one_density(model: NeuroTrailsLlamaForCausalLM, density: float, folder: Path) -> list[Figure]:
    name = f"density {density:g}, {str(model.dtype).removeprefix('torch.')}"
    model.save_pretrained(folder / "dense")
    model.save_pretrained(folder / "sparse", sparse=True)
    masked = sum(module.weight.numel() for module in masked_modules(model).values())
    others = sum(p.numel() for p in model.parameters()) - masked
    width = model.dtype.itemsize
    size = (folder / "sparse" / "model.safetensors").stat().st_size - others * width
    bound = (width * density + 1 / 8) * 1.01
    times = take_turns(
        {
            "dense": _load(folder / "dense"),
            "sparse": _load(folder / "sparse"),
            "one head": _load(folder / "sparse", heads=[0]),
        },
        rounds=ROUNDS,
    )
    seconds = {side: f"{min(values):.2f} s" for side, values in times.items()}
    return [
        Figure(
            9,
            f"sparse file, bytes a weight over {width}d + 1/8 + 1 %, {name}",
            size / masked / bound,
            at_most=1,
            note=f"{size / masked:.3f} bytes, dense {width + 1 / 8:.3f}; {masked / 1e6:.0f} million weights",
        ),
        Figure(
            9,
            f"load time, sparse / dense, {name}",
            ratio(times, "sparse", "dense"),
            at_most=2,
            note=f"fastest: {seconds['sparse']}, dense {seconds['dense']}",
        ),
        Figure(
            9,
            f"load time, one head / all three, sparse, {name}",
            ratio(times, "one head", "sparse"),
            note=f"fastest: {seconds['one head']}",
        ),
    ]


def _load(path: Path, **options) -> Callable[[], object]:
    return lambda: NeuroTrailsLlamaForCausalLM.from_pretrained(path, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    print(table(measure(getattr(torch, parser.parse_args().dtype))))
