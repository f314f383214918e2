"""What a checkpoint of a training run costs, beside writing and syncing as many bytes.

    python benchmarks/saving.py [--config recipes/configs/60m.yaml] [--folder runs/saving]

The folder must lie on the disk that is to be measured. Both sides write new files and then delete their oldest, as a
run does: overwriting would find its memory and its blocks prepared.
"""

import argparse
import os
import shutil
import statistics
from pathlib import Path

from nt_hf import NeuroTrailsForCausalLM, Sparsifier
from nt_hf.cli.program import run
from nt_hf.config import load_run_config
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.training.checkpoint import Progress, TrainingState, load_model, load_training_state, save_checkpoint
from nt_hf.training.manifest import find_damage
from nt_hf.training.optimizer import make_optimizer
from nt_hf.training.tasks import TextTask

import torch
from accelerate import Accelerator
from common import take_turns

ROUNDS = 4


class NoData:
    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, states: list[dict]) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("recipes/configs/60m.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/saving"))
    args = parser.parse_args()
    args.folder /= "benchmark"  # which is removed; what else the folder holds is not
    config = load_run_config([args.config])
    accelerator = Accelerator()
    task = TextTask(config, accelerator)
    model = NeuroTrailsForCausalLM.from_config(config.model_config()).to(accelerator.device)
    draw_masks(model, config.sparsity)
    optimizer = make_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    sparsifier = Sparsifier(model, optimizer, config.sparsity, config.train.max_steps)
    sparsifier.step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress = Progress(100, 0, evaluated=True, processes=1, fingerprint="")
    state = TrainingState(accelerator, model, task, optimizer, sparsifier, NoData(), config, progress)
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    steps = iter(range(101, 1000))

    def save() -> None:
        state.progress.step = next(steps)
        save_checkpoint(args.folder, state, model_card="")

    save()
    (checkpoint,) = args.folder.glob("checkpoint-*")
    sizes = [path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()]
    memory = memoryview(bytearray(os.urandom(1 << 20) * (max(sizes) // (1 << 20) + 1)))

    def write() -> None:
        folder = args.folder / f"plain-{next(steps)}"
        folder.mkdir()
        for number, size in enumerate(sizes):
            with open(folder / str(number), "wb") as file:
                file.write(memory[:size])
                file.flush()
                os.fsync(file.fileno())
        for old in sorted(args.folder.glob("plain-*"))[: -config.train.keep]:
            shutil.rmtree(old)

    def verify() -> None:
        if problem := find_damage(sorted(args.folder.glob("checkpoint-*"))[-1]):
            raise ValueError(problem)

    def load() -> None:
        path = sorted(args.folder.glob("checkpoint-*"))[-1]
        load_model(path, task)
        load_training_state(path, state)

    gigabytes = sum(sizes) / 1e9
    times = take_turns({"save": save, "write and sync": write, "verify": verify, "load": load}, ROUNDS)
    for name, values in times.items():
        print(
            f"{name:15s} {statistics.median(values) / gigabytes:6.2f} s/GB ({' '.join(f'{v:.2f}' for v in values)} s)"
        )
    ratios = [a / b for a, b in zip(times["save"], times["write and sync"])]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{gigabytes:.2f} GB; save / write and sync: {statistics.median(ratios):.2f} ({spread})")
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    run(main)
