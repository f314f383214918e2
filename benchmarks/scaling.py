"""Tokens per second on 1, 2 and 4 processes of one CPU machine, time spent waiting for data, and the start of a run.

    python benchmarks/scaling.py [--config recipes/configs/9m.yaml] [--steps 12]

The text is that of the sample, prepared once.

Each process has one thread. Four processes on two cores share them, so their row says what more processes cost, not
what more cores gain.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from nt_hf.cli.program import run
from nt_hf.config import load_run_config
from nt_hf.data.prepare import prepare
from nt_hf.data.tokenizers import load_tokenizer
from nt_hf.text import markdown_table
from nt_hf.training.metrics import read_metrics

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
RUNS = [(1, "one process", {}), (2, "DDP", {}), (4, "DDP", {}), (2, "FSDP2", FSDP2), (4, "FSDP2", FSDP2)]
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("recipes/configs/9m.yaml"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"))
    args = parser.parse_args()
    args.folder /= "benchmark"  # which is removed; what else the folder holds is not
    tokens = args.folder / "tokens"
    prepare("sample:train", load_tokenizer(load_run_config([args.config]).data.tokenizer), tokens)
    common = [
        "--config", args.config, "--data.train", f"prepared:{tokens}", "--data.validation", "sample:validation",
        "--data.validation_tokens", 1, "--data.num_workers", 0, "--train.batch_size", 16, "--train.micro_batch_size", 4,
        "--train.log_steps", 1, "--train.precision", "fp32", "--train.matmul_precision", "medium",
        "--train.save_steps", args.steps, "--train.eval_steps", args.steps,
    ]  # fmt: skip

    speeds, rows = {}, [["processes", "", "tokens/s", "of one process", "waiting for data"]]
    for processes, kind, environment in RUNS:
        run_dir = args.folder / f"{kind}-{processes}".replace(" ", "-")
        shutil.rmtree(run_dir, ignore_errors=True)
        launch(processes, environment, *common, "--train.max_steps", args.steps, "--output_dir", run_dir).wait()
        records = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["event"] == "train"]
        records = records[WARM_UP:]
        speeds[processes, kind] = statistics.median(record["tokens_per_second"] for record in records)
        waiting = statistics.mean(record["data_wait"] for record in records)
        relative = speeds[processes, kind] / speeds[1, "one process"]
        rows.append([str(processes), kind, f"{speeds[processes, kind]:,.0f}", f"{relative:.2f}", f"{waiting:.2%}"])
    print(markdown_table(rows, align="><>"), flush=True)

    fresh, resumed = [], []
    for _ in range(3):
        run_dir = args.folder / "start"
        shutil.rmtree(run_dir, ignore_errors=True)
        command = (*common, "--train.max_steps", 4, "--train.save_steps", 2, "--output_dir", run_dir)
        fresh.append(seconds_to_step(1, run_dir, command))
        shutil.rmtree(run_dir / "checkpoint-4")
        (run_dir / "metrics.jsonl").unlink()  # which has the step already
        resumed.append(seconds_to_step(3, run_dir, command))
    more = ", ".join(f"{b - a:+.1f}" for a, b in zip(fresh, resumed))
    first = statistics.median(fresh), statistics.median(resumed)
    print("\nseconds to the first step: {:.1f} of a new run, {:.1f} of a resumed one".format(*first), f"({more})")
    shutil.rmtree(args.folder)


def launch(processes: int, environment: dict[str, str], *arguments: object) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    command = [sys.executable, *launcher, "recipes/pretrain_c4.py", *arguments]
    alone = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(list(map(str, command)), env=os.environ | alone | environment, stderr=subprocess.DEVNULL)


def seconds_to_step(step: int, run_dir: Path, command: tuple) -> float:
    """From the start of the program to the record of a step; lets the program end."""
    start = time.perf_counter()
    process = launch(1, {}, *command)
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and f'"event": "train", "step": {step},' in metrics.read_text():
            break
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.wait()
    return seconds


if __name__ == "__main__":
    run(main)
