"""Training runs on a tiny model: in this process, or in processes of their own that may be killed."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from processes import SERVER, free_port

from nt_hf.cli import tokenizer as train_tokenizer
from nt_hf.cli.train import main
from nt_hf.data.sources import read_texts
from nt_hf.training import report
from nt_hf.training.metrics import read_metrics

CONFIG = """
model: {vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
        blocks_in_head: 1}
data: {train: DIRECTORY/train.jsonl, validation: DIRECTORY/validation.jsonl, tokenizer: DIRECTORY/tokenizer,
       sequence_length: 32, validation_tokens: 500}
sparsity: {density: 0.5, distribution: uniform, exclude: ["model.embed_tokens.*"], update_interval: 3}
train: {max_steps: 12, batch_size: 4, micro_batch_size: 2, learning_rate: 1.0e-2, warmup_ratio: 0.17,
        max_grad_norm: 1.0, log_steps: 1, eval_steps: 6, save_steps: 6, precision: fp32}
"""


def write_text(path: Path, source: str = "sample:validation", documents: int = 12) -> Path:
    """A file of the first documents of the sample: tokenizing all of them takes longer than training on a few."""
    lines = (json.dumps({"text": text}) + "\n" for text in itertools.islice(read_texts(source), documents))
    path.write_text("".join(lines))
    return path


def write_config(directory: Path) -> Path:
    """A configuration file, with text and a tokenizer of 320 pieces beside it."""
    command = ["--data", "sample:validation", "--vocab_size", "320", "--output", str(directory / "tokenizer")]
    call(train_tokenizer.main, *command)
    write_text(directory / "train.jsonl", "sample:train", 24)
    write_text(directory / "validation.jsonl")
    path = directory / "tiny.yaml"
    path.write_text(CONFIG.replace("DIRECTORY", str(directory)))
    return path


def call(program, *arguments: object) -> None:
    """Runs the ``main`` of a program with command-line arguments, in this process."""
    argv, sys.argv = sys.argv, ["script", *map(str, arguments)]
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of an earlier test leaves its precision there
    try:
        program()
    finally:
        sys.argv = argv
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def no_plots() -> Iterator[None]:
    """Runs report without plots, as without matplotlib: drawing takes as long as a third of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "pyplot", lambda: None)
        yield


def train(config: Path, run_dir: Path, *overrides: object) -> list[dict]:
    """Runs the recipe in this process; returns its metrics."""
    with no_plots():
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
        with no_plots():
            call(main, *arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
