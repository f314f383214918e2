"""Suites of runs made in this process."""

from pathlib import Path

import pytest
import yaml
from conftest import script
from recipe_runs import call, start, write_text

from experiments import suite_report
from nt_hf.cli import prepare, tokenizer

runner = script("experiments/run.py")
TRAINING = ("recipes/pretrain_c4.py", "recipes/train_images.py")
PROGRAMS = {"recipes/prepare_c4.py": prepare, "recipes/train_tokenizer.py": tokenizer}


TINY = """
preparation: {text: ["{data_root}"], vocab_size: 320}
config:
  model: {vocab_size: 320, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2,
          num_ensemble_heads: 2, blocks_in_head: 1}
  data: {train: "prepared:{runs}/tokens", validation: "{data_root}", tokenizer: "{runs}/tokenizer",
         sequence_length: 32, validation_tokens: 300}
  sparsity: {density: 0.5, distribution: uniform, exclude: ["model.embed_tokens.*"], update_interval: 3}
  train: {max_steps: 8, batch_size: 4, log_steps: 2, eval_steps: 4, save_steps: 4, keep: 1}
tuning: {learning_rates: [0.001, 0.01], share: 0.5}
seeds: [0, 1]
baseline: single
rival: neurotrails
evaluation: {texts: {text: "{data_root}"}, max_tokens: 400}
arms:
  single: {label: single, config: {model: {num_ensemble_heads: 1}, sparsity: {density: 1.0}}}
  neurotrails: {label: NeuroTrails}
  longer: {label: longer, seeds: 1, learning_rate_of: neurotrails, longer: true}
"""


def tiny_suite(directory: Path) -> Path:
    (path := directory / "tiny.yaml").write_text(TINY)
    return path


def edited(path: Path, **changes) -> Path:
    """The suite with some of its keys set anew."""
    content = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(directory: Path, *arguments: str, plots: bool = False) -> list[str]:
    """Runs a suite without starting an interpreter for each program. Returns the programs that were called."""
    called = []
    if not (directory / "text.jsonl").exists():
        write_text(directory / "text.jsonl")

    class Quick(runner.Programs):
        def __post_init__(self):
            pass

        def call(self, program, *arguments, threads=None, log=None):
            called.append(program)
            if program in TRAINING:  # signals need a main thread of its own
                [process] = start(1, *arguments)
                process.join()
                if process.exitcode:
                    raise ValueError(f"exit code {process.exitcode}")
            elif program == "experiments/run.py":
                call(runner.main, *arguments)
            else:
                PROGRAMS[program].main(list(arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Programs", Quick)
        if not plots:
            patch.setattr(suite_report, "pyplot", lambda: None)
        call(
            runner.main, "--suite", directory / "tiny.yaml", "--data_root", directory / "text.jsonl",
            "--runs", directory / "runs", "--results", directory / "results", *arguments,
        )  # fmt: skip
    return called
