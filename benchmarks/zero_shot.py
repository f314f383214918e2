"""What zero-shot evaluation costs: against stock Llamas of the same blocks, and every trail against the ensemble alone.

    python benchmarks/zero_shot.py --data_root DIR        # json lines as eval/zero_shot.py reads them

The model is of the 20M size (recipes/configs/20m.yaml), its weights random, which costs the same. The sides take turns
within one run; figures are medians of several rounds.

The bound is what the blocks and LM heads that the ensemble executes take in stock `LlamaForCausalLM`s under lm-eval:
the whole pass of a Llama with backbone and one head, plus the time within the forward calls alone of Llamas with the
blocks of each further head. So tokenizing, requests and scores count once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.cli.program import provenance
from nt_hf.config import load_run_config
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.evaluation.zero_shot import TrailsLM, choose_scorers, score_task
from nt_hf.evaluation.zero_shot_tasks import Tasks, quiet
from nt_hf.text import markdown_table

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge")


class Timed(HFLM):
    """lm-eval's own model, which also counts the time within the forward calls."""

    calls = 0.0

    def _model_call(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return super()._model_call(*args, **kwargs)
        finally:
            self.calls += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200, help="items a task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8, help="of lm-eval's own passes")
    args = parser.parse_args()

    torch.manual_seed(0)
    run = load_run_config(["recipes/configs/20m.yaml"])
    tokenizer = load_tokenizer("sample")
    length = run.data.sequence_length
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    config = run.model_config(max_position_embeddings=length, **special)
    model = NeuroTrailsLlamaForCausalLM(config).eval()
    trail = config.to_stock_config()
    head = config.to_stock_config()
    head.num_hidden_layers = config.blocks_in_head
    trail, head = LlamaForCausalLM(trail).eval(), LlamaForCausalLM(head).eval()
    tasks = Tasks(args.data_root)

    def stock(model: torch.nn.Module) -> tuple[float, float]:
        """Seconds of a whole pass of lm-eval's own model, and of its forward calls."""
        with quiet():
            lm = Timed(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
            start = time.perf_counter()
            for name in TASKS:
                task = {"tasks": {name: tasks.load(name, args.limit)}, "groups": {}}
                lm_eval.evaluate(lm, task, limit=args.limit, bootstrap_iters=0)
            return time.perf_counter() - start, lm.calls

    def nt_hf(heads: str) -> float:
        lm = TrailsLM(model, tokenizer, choose_scorers(model.config, heads))
        start = time.perf_counter()
        for name in TASKS:
            score_task(lm, tasks.load(name, args.limit), args.limit)
        return time.perf_counter() - start

    sides: dict[str, Callable[[], float]] = {
        "bound": lambda: stock(trail)[0] + (config.num_ensemble_heads - 1) * stock(head)[1],
        "lm_eval --model hf": lambda: stock(model)[0],
        "eval/zero_shot.py, ensemble": lambda: nt_hf("ensemble"),
        "eval/zero_shot.py, each": lambda: nt_hf("each"),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            times[name].append(side())
            print(f"{name}: {times[name][-1]:.1f} s", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [
        ("lm_eval --model hf", "bound"),
        ("eval/zero_shot.py, ensemble", "bound"),
        ("eval/zero_shot.py, each", "eval/zero_shot.py, ensemble"),
    ]
    print(
        f"{args.limit} items a task, {len(TASKS)} tasks, {torch.get_num_threads()} threads, {provenance('lm_eval')}\n"
    )
    print(markdown_table([["pass", "seconds"], *([name, f"{value:.1f}"] for name, value in medians.items())]), "\n")
    rows = [[f"{name} / {reference}", f"{medians[name] / medians[reference]:.2f}"] for name, reference in ratios]
    print(markdown_table([["ratio", "value"], *rows]), "\n")
    rows = [[str(count), f"{peak_of(model, tokenizer, args, count) / 2**20:.0f}"] for count in (1, 2, 4, 6)]
    print(markdown_table([["tasks in one run, the largest first", "peak memory (MiB)"], *rows]))


def peak_of(model, tokenizer, args: argparse.Namespace, count: int) -> int:
    """Bytes that eval/zero_shot.py needs for the first ``count`` tasks, longest first."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        output = Path(directory) / "scores.json"
        command = [sys.executable, "eval/zero_shot.py", "--model", directory, "--data_root", args.data_root]
        command += ["--tasks", ",".join(TASKS[:count]), "--limit", str(args.limit), "--output", output]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads(output.read_text())["peak_memory_bytes"]


if __name__ == "__main__":
    main()
