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
            if program in (
                "recipes/pretrain_c4.py",
                "recipes/train_images.py",
            ):  # signals need a main thread of its own
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
