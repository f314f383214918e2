"""Training runs on a tiny model: in this process, or in processes of their own that may be killed."""

import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from accelerate.state import AcceleratorState
from processes import SERVER, free_port

from nt_hf.cli import tokenizer as train_tokenizer
from nt_hf.cli.train import main
from nt_hf.training.metrics import read_metrics

CONFIG = """
model: {vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
        blocks_in_head: 1}
data: {train: "sample:train", validation: "sample:validation", tokenizer: TOKENIZER, sequence_length: 32,
       validation_tokens: 500}
sparsity: {density: 0.5, distribution: uniform, exclude: ["model.embed_tokens.*"], update_interval: 3}
train: {max_steps: 12, batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2, warmup_ratio: 0.17,
        max_grad_norm: 1.0, log_steps: 1, eval_steps: 6, save_steps: 6}
"""


def write_config(directory: Path) -> Path:
    """A configuration file with a tokenizer of 320 pieces."""
    command = ["--data", "sample:validation", "--vocab_size", "320", "--output", str(directory / "tokenizer")]
    call(train_tokenizer.main, *command)
    path = directory / "tiny.yaml"
    path.write_text(CONFIG.replace("TOKENIZER", str(directory / "tokenizer")))
    return path


def call(program, *arguments: object) -> None:
    """Runs the ``main`` of a program with command-line arguments, in this process."""
    argv, sys.argv = sys.argv, ["script", *map(str, arguments)]
    try:
        program()
    finally:
        sys.argv = argv
        AcceleratorState._reset_state(reset_partial_state=True)


def train(config: Path, run_dir: Path, *overrides: object) -> list[dict]:
    """Runs the recipe in this process; returns its metrics."""
    call(main, "--config", config, "--output_dir", run_dir, *overrides)
    return read_metrics(run_dir / "metrics.jsonl")


def of(records: list[dict], event: str, *keys: str) -> list[tuple]:
    return [tuple(record[key] for key in keys) for record in records if record["event"] == event]


def start(processes: int, *arguments: object, before=None, **environment: str) -> list[BaseProcess]:
    """Starts the recipe on some gloo processes; ``before()`` is called in each first."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes), **environment}
    started = []
    for rank in range(processes):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else environment
        started.append(SERVER.Process(target=_run, args=(own, list(map(str, arguments)), before), daemon=True))
        started[-1].start()
    return started


def _run(environment: dict[str, str], arguments: list[str], before) -> None:
    os.environ.update(environment, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    if before:
        before()
    try:
        call(main, *arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
