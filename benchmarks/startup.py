"""What it takes to begin: imports, the command line, the load of a checkpoint, the first step of a run.

    python benchmarks/startup.py

Every start is that of a fresh process, and the sides take turns. Start-up runs on one core, so what counts is the
processor time of a process, which other processes hardly disturb. Files come from the system's cache: one round goes
before those that count.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from nt_hf import NeuroTrailsLlamaForCausalLM
from nt_hf.config import load_run_config

from common import Figure, ratio, table
from transformers import LlamaForCausalLM

SIZE = "20m"
STOCK = "import transformers; from transformers import LlamaForCausalLM"
CONSOLE = "import sys; from nt_hf_console import main; main(sys.argv[1:])"
# A model so small that its step takes no time to speak of.
TINY = {"model.hidden_size": "64", "model.intermediate_size": "128"}
FRESH = "import shutil, sys; shutil.rmtree(sys.argv[-1], ignore_errors=True); "
# One step of a stock Llama by Transformers' Trainer, on made-up tokens, and its checkpoint.
TRAINER = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
model = LlamaForCausalLM(LlamaConfig.from_pretrained(sys.argv[1]))
rows = [{"input_ids": torch.arange(256), "labels": torch.arange(256)}] * 8
arguments = TrainingArguments(sys.argv[2], max_steps=1, per_device_train_batch_size=8, report_to=[], use_cpu=True)
trainer = Trainer(model, arguments, train_dataset=rows)
trainer.train()
trainer.save_model()
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def processor_seconds(command: Sequence[str]) -> float:
    """Of a process that must end well, on one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def processes_take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each command's processes, one a round; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 + rounds):
        for name, command in commands.items():
            times[name].append(processor_seconds(command))
    return {name: values[1:] for name, values in times.items()}


def measure(rounds: int = 5) -> list[Figure]:
    """Row 11 of the table of goals."""
    with tempfile.TemporaryDirectory() as folder:
        multi_head, stock = (str(Path(folder) / name) for name in ("multi-head", "stock"))
        config = load_run_config([SIZE]).model_config()
        NeuroTrailsLlamaForCausalLM(config).save_pretrained(multi_head)
        LlamaForCausalLM(config.to_stock_config()).save_pretrained(stock)
        load_run_config([SIZE], TINY).model_config().to_stock_config().save_pretrained(f"{folder}/tiny")
        settings = TINY | {
            "data.train": "sample:train", "data.validation": "sample:validation", "data.validation_tokens": 256,
            "train.max_steps": 1, "train.batch_size": 8, "train.micro_batch_size": 8, "train.save_steps": 1,
            "train.precision": "fp32",
        }  # fmt: skip
        run = ["--config", SIZE, *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]
        load = "; {}.from_pretrained(sys.argv[1])"
        times = processes_take_turns(
            {
                "stock": python(STOCK),
                "nt_hf": python("import nt_hf"),
                "nt-hf --help": python(CONSOLE, "--help"),
                "nt-hf train --help": python(CONSOLE, "train", "--help"),
                "load stock": python("import sys; " + STOCK + load.format("LlamaForCausalLM"), stock),
                "load": python("import sys, nt_hf" + load.format("nt_hf.NeuroTrailsForCausalLM"), multi_head),
                "Trainer": python(TRAINER, f"{folder}/tiny", f"{folder}/trainer"),
                "nt-hf train": python(FRESH + CONSOLE, "train", *run, "--output_dir", f"{folder}/run"),
            },
            rounds,
        )
    median = {name: statistics.median(values) for name, values in times.items()}
    return [
        Figure(
            11,
            "import nt_hf / import transformers and its Llama",
            ratio(times, "nt_hf", "stock"),
            at_most=1.1,
            note=f"{median['nt_hf']:.2f} s, {median['stock']:.2f} s, processor time of fresh processes",
        ),
        *(
            Figure(11, f"{name}, seconds", median[name], note="processor time")
            for name in ("nt-hf --help", "nt-hf train --help")
        ),
        Figure(
            11,
            f"import and load a checkpoint, {SIZE} / a stock Llama of one trail",
            ratio(times, "load", "load stock"),
            note=f"{median['load']:.2f} s, {median['load stock']:.2f} s",
        ),
        Figure(
            11,
            "a run of one step, tiny model / a stock Llama of one trail by Trainer",
            ratio(times, "nt-hf train", "Trainer"),
            note=f"{median['nt-hf train']:.2f} s, {median['Trainer']:.2f} s, with a checkpoint and, in nt-hf, data, "
            "validation and a report",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    print(table(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
