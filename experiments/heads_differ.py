"""What makes copies of one trained head an ensemble: noise, own data order, own masks, dropout, own learning rates.

    python experiments/heads_differ.py

A small single network is trained on the embedded sample. Three heads then start from it and are trained on, in one way
after another, on the same tokens as the single network in its own continuation. All are scored on the sample's held-out
rows. Finished runs are skipped. --report makes the page from the results alone.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from nt_hf import NeuroTrailsForCausalLM
from nt_hf.cli import program
from nt_hf.cli.program import machine, provenance
from nt_hf.data.sources import read_texts
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.evaluation.diversity import measure_diversity
from nt_hf.evaluation.perplexity import DocumentWindows, load_for_evaluation
from nt_hf.files import write_json, write_text
from nt_hf.text import markdown_table

from experiments.finished import spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "heads-differ"
TEST_TOKENS = 30_000
# Of the rate at which the single network was trained, a quarter.
CONTINUED = {"train.learning_rate": 0.006, "train.eval_steps": 400, "data.validation_tokens": 2000}
SINGLE = {"model.num_ensemble_heads": 1, "model.blocks_in_head": 1, "sparsity.density": 1.0}
HEADS = {"model.num_ensemble_heads": 3, "model.blocks_in_head": 2, "sparsity.density": 1.0}
SPARSE = {"sparsity.density": 0.5, "sparsity.initial_masks": "magnitude"}
SPARSE_SINGLE = SINGLE | SPARSE | {"sparsity.update_interval": 0}
# By label, the settings of an arm; all are compared with the first one.
ARMS: dict[str, dict[str, Any]] = {
    "single, trained on": SINGLE,
    "noise 0.02": HEADS | {"train.head_noise": 0.02},
    "noise 0.1": HEADS | {"train.head_noise": 0.1},
    "noise 0.5": HEADS | {"train.head_noise": 0.5},
    "dropout 0.1 of attention": HEADS | {"model.attention_dropout": 0.1},
    "own learning rates, 0.5, 1 and 2": HEADS
    | {"train.learning_rate_factors": {"*.layers.*": 0.1, "*heads.0.layers.*": 0.05, "*heads.2.layers.*": 0.2}},
    "own order": HEADS | {"data.order_per_head": True},
    "own order, noise 0.1": HEADS | {"data.order_per_head": True, "train.head_noise": 0.1},
    "single at density 0.5, trained on": SPARSE_SINGLE,
    "density 0.5, noise 0.1, masks that stay": HEADS
    | SPARSE
    | {"train.head_noise": 0.1, "sparsity.update_interval": 0},
    "density 0.5, masks that move": HEADS | SPARSE | {"sparsity.update_interval": 25},
    "density 0.5, own order, masks that move": HEADS
    | SPARSE
    | {"sparsity.update_interval": 25, "data.order_per_head": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/heads-differ"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--base_steps", type=int, default=1400, help="of the single network that all start from")
    parser.add_argument("--steps", type=int, default=400, help="of the runs that start from it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="write the page of the results there are, only")
    args = parser.parse_args()
    for seed in () if args.report else range(args.seeds):
        stock = stock_model(args, seed)
        for label, arm in ARMS.items():
            name = f"{label.replace(', ', '-').replace(' ', '-')}/seed-{seed}"
            result = args.results / f"{name}.json"
            if not result.is_file():
                keys = {"model.init_from": stock, "train.max_steps": args.steps, "train.seed": 100 + seed}
                score(train(args, name, keys | CONTINUED | arm), label, result)
    page = report(args.results)
    write_text(args.results / "README.md", page)
    print(page)


def stock_model(args: argparse.Namespace, seed: int) -> Path:
    """A single network, trained by the demo's configuration, as a stock checkpoint."""
    folder = args.runs / f"stock-{seed}"
    if not (folder / "config.json").is_file():
        keys = {"train.max_steps": args.base_steps, "train.seed": seed}
        model = NeuroTrailsForCausalLM.from_pretrained(train(args, f"base/seed-{seed}", keys | SINGLE))
        model.extract_trail(0).save_pretrained(folder)
    return folder


def train(args: argparse.Namespace, name: str, keys: dict[str, Any]) -> Path:
    """Trains, or continues, a run by the recipe; returns its last checkpoint."""
    tokenizer = args.runs / "tokenizer"
    if not tokenizer.is_dir():
        recipe("train_tokenizer.py", "--data", "sample:train", "--vocab_size", 2048, "--output", tokenizer)
    keys = {"data.tokenizer": tokenizer, "train.save_steps": 200, "train.keep": 1} | keys
    options = [value for key, value in keys.items() for value in (f"--{key}", value)]
    recipe("pretrain_c4.py", "--config", "demo", "--output_dir", args.runs / name, *options)
    return args.runs / name / f"checkpoint-{keys['train.max_steps']}"


def recipe(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / "recipes" / name, *map(str, arguments)], check=True)


def score(checkpoint: Path, label: str, result: Path) -> None:
    """Writes the figures of a checkpoint on held-out rows of the sample."""
    model = load_for_evaluation(checkpoint)
    documents = list(read_texts("sample:validation"))
    windows = DocumentWindows(
        documents, load_tokenizer(str(checkpoint)), length=128, batch_size=16, max_tokens=TEST_TOKENS
    )
    found = measure_diversity(model, windows).to_dict()
    mode = found["ensemble_mode"]
    losses = [head["loss"] for head in found["head_scores"]]
    figures = {
        "loss": found["ensemble_scores"][mode]["loss"],
        "mean_head_loss": sum(losses) / len(losses),
        "disagreement": found["disagreement"]["mean"] if len(losses) > 1 else None,
        "mask_overlap": found["mask_overlap"] and found["mask_overlap"]["overall"],
    }
    write_json(result, {"label": label, "tokens": found["tokens"], **figures, **provenance(), "machine": machine()})


def report(results: Path) -> str:
    """The page of the results there are."""
    found: dict[str, dict[str, dict[str, Any]]] = {label: {} for label in ARMS}
    for path in sorted(results.glob("*/seed-*.json")):
        result = json.loads(path.read_text())
        found[result["label"]][path.stem] = result
    baseline = found[next(iter(ARMS))]
    rows = [["arm", "seeds", "perplexity", "/ single, trained on", "mean head", "disagreement", "mask overlap"]]
    for label, by_seed in found.items():
        if by_seed:
            paired = [math.exp(r["loss"] - baseline[seed]["loss"]) for seed, r in by_seed.items() if seed in baseline]
            several = list(by_seed.values())
            of_heads = [[r[key] for r in several if r[key] is not None] for key in ("disagreement", "mask_overlap")]
            rows.append([
                label, str(len(several)), spread([math.exp(r["loss"]) for r in several], 2), spread(paired, 3),
                spread([math.exp(r["mean_head_loss"]) for r in several], 2),
                *(spread(values, 3) for values in of_heads),
            ])  # fmt: skip
    return "\n\n".join(
        [
            "# What makes copies of one trained head an ensemble",
            "`python experiments/heads_differ.py` trains and scores what is below; `--report` makes this page from the "
            "files beside it. Mean and standard deviation over paired seeds.",
            markdown_table(rows),
        ]
    ) + "\n"  # fmt: skip


if __name__ == "__main__":
    program.run(main)
