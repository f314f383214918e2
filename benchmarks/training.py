"""What a training step costs, against a stock Llama, the paper's reference code, and the machine.

    python benchmarks/training.py --sizes 20m 60m --reference DIR

DIR is a checkout of https://github.com/bramgrooten/neurotrails. Without it the other side is a plain loop in its
manner: all heads' logits at once, Adam over dense gradients, weights multiplied by masks of floats, soft-magnitude drop
by `torch.multinomial` and growth by a sort.

The sides take turns within one run, on the same random tokens. A step is forward, backward, masks and optimizer; what a
topology update adds is measured alone and counts once in its interval. On a CPU all sides are fp32; each
side's fastest setting is compared as well. On a GPU nt_hf is bf16 autocast over fp32 weights with compiled blocks, the
stock Llama as well, the reference its own bf16 weights.
"""

import argparse
import copy
import io
import math
import os
import statistics
import subprocess
import sys
import types
import warnings
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from nt_hf import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM, SparsityConfig
from nt_hf.config import RunConfig, load_run_config
from nt_hf.models.lm_heads import by_head
from nt_hf.plan.flops import training_flops_per_token
from nt_hf.plan.hardware import peak_tflops
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.sparsifier import Sparsifier
from nt_hf.training.device import compile_blocks
from nt_hf.training.launch import fastest_precision
from nt_hf.training.optimizer import make_optimizer

import torch
from common import (
    DEVICE,
    Figure,
    matmul_peak,
    matmul_precision,
    peak_bytes,
    ratio,
    seconds,
    synchronize,
    table,
    take_turns,
)
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

LENGTH = 256
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
STEPS = 10_000  # of the run that schedules are for


class Side:
    """One way of training: ``step`` runs a step, ``update`` what a topology update adds to it."""

    def step(self) -> None:
        raise NotImplementedError

    def update(self) -> None:
        raise NotImplementedError


class NtHf(Side):
    bf16 = GPU  # autocast

    def __init__(self, run: RunConfig, ids: torch.Tensor):
        self.ids, self.interval = ids, run.sparsity.update_interval
        config = run.model_config(max_position_embeddings=LENGTH)
        self.model = NeuroTrailsLlamaForCausalLM(config).to(DEVICE).train()
        draw_masks(self.model, run.sparsity)
        if GPU:
            compile_blocks(self.model)
        self.optimizer = make_optimizer(self.model, run.train)
        sparsity = copy.deepcopy(run.sparsity)
        sparsity.update_interval = 0
        self.sparsity = sparsity
        self.sparsifier = Sparsifier(self.model, self.optimizer, sparsity, total_steps=STEPS)

    def backward(self) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()

    def step(self) -> None:
        self.backward()
        self.sparsifier.step()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        self.sparsity.update_interval = 1
        self.sparsifier.step()
        self.sparsity.update_interval = 0


class Stock(Side):
    """A Llama of one trail, trained as Transformers has it."""

    def __init__(self, run: RunConfig, ids: torch.Tensor):
        config = run.model_config(max_position_embeddings=LENGTH).to_stock_config()
        self.ids, self.model = ids, LlamaForCausalLM(config).to(DEVICE).train()
        if GPU:
            for block in self.model.model.layers:
                block.compile()
        self.optimizer = make_optimizer(self.model, run.train)

    def step(self) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def summed_losses(logits: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Of whole logits, shifted by copies, as the reference's loop has it."""
    losses = (
        nn.functional.cross_entropy(x[:, :-1].contiguous().flatten(0, 1), ids[:, 1:].contiguous().flatten())
        for x in logits
    )
    return sum(losses)


class Plain(Side):
    """A multi-head loop in the reference's manner, over our own modules."""

    def __init__(self, run: RunConfig, ids: torch.Tensor, dtype: torch.dtype):
        self.ids, self.interval = ids, run.sparsity.update_interval
        config = run.model_config(max_position_embeddings=LENGTH)
        self.model = NeuroTrailsLlamaForCausalLM(config).to(DEVICE, dtype).train()
        self.masks = {
            weight: (torch.rand_like(weight) < run.sparsity.density).to(dtype)
            for weight in self.model.parameters()
            if weight.dim() == 2
        }
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=run.train.learning_rate)

    def step(self) -> None:
        hidden = self.model.model(input_ids=self.ids, use_cache=False).last_hidden_state
        states = by_head(hidden, self.model.config.hidden_size)
        logits = [lm_head(x) for lm_head, x in zip(self.model.lm_heads, states)]
        summed_losses(logits, self.ids).backward()
        self.optimizer.step()
        for weight, mask in self.masks.items():
            weight.data = weight.data * mask
        self.gradients = {weight: weight.grad for weight in self.masks}
        self.optimizer.zero_grad()

    def update(self) -> None:
        for weight, mask in self.masks.items():
            active = int(mask.sum())
            kept = torch.multinomial(weight.data.abs().flatten().float() ** 3, active - active // 2)
            new = torch.zeros_like(mask).flatten()
            new[kept] = 1
            order = torch.sort((self.gradients[weight].flatten() * (new == 0)).abs(), descending=True).indices
            new[order[: active - len(kept)]] = 1
            self.masks[weight] = new.view_as(mask)


class Reference(Side):
    """The paper's code, from a checkout."""

    def __init__(self, run: RunConfig, ids: torch.Tensor, dtype: torch.dtype, checkout: Path):
        folder = str(checkout / "language_modeling")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        # It logs by wandb, which need not be installed here.
        sys.modules["wandb"] = types.ModuleType("wandb")
        sys.modules["wandb"].log = lambda values: None
        os.environ["NORM_TYPE"] = "pre"
        if not GPU:
            torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # the code asks for a GPU by name
        transformers_logging.set_verbosity_error()  # it warns of what the code does not use
        with redirect_stdout(io.StringIO()):
            from make_multi_head import TreeNetLlama
            from sparselearning.core import Masking
            from transformers import LlamaConfig

            shape = {key: value for key, value in run.model.items() if key in LlamaConfig().to_dict()}
            config = LlamaConfig(**shape, max_position_embeddings=LENGTH, pad_token_id=-1)
            config.max_sequence_length = LENGTH
            model = TreeNetLlama(config, run.model["num_ensemble_heads"], run.model["blocks_in_head"])
            self.model = model.to(DEVICE, dtype).train()
            optimizer = torch.optim.Adam(self.model.parameters(), lr=run.train.learning_rate)
            arguments = argparse.Namespace(
                growth="gradient", prune="magnitude_soft", prune_rate=0.5, prune_rate_decay="cosine", fix=False,
                update_frequency=10**9, num_training_steps=STEPS, density=run.sparsity.density, initial_density=1.0,
                density_decay="constant", temperature_decay="constant", temperature=3.0, init_temperature=1.0,
                dense_embedding=False, reinit="no", mix=0.0, single_gpu=True,
            )  # fmt: skip
            self.masking = Masking(optimizer, args=arguments, device=DEVICE)
            self.masking.add_module(self.model, density=run.sparsity.density, sparse_init="Multi_Output")
        self.ids, self.optimizer, self.interval = ids, optimizer, run.sparsity.update_interval

    def step(self) -> None:
        with redirect_stdout(io.StringIO()):
            summed_losses(self.model(input_ids=self.ids), self.ids).backward()
            self.masking.step()
            # ``zero_grad`` of the last step; an update needs the gradients.
            self.gradients = [weight.grad for weight in self.model.parameters()]
            self.optimizer.zero_grad()

    def update(self) -> None:
        for weight, grad in zip(self.model.parameters(), self.gradients):
            weight.grad = grad
        with redirect_stdout(io.StringIO()):
            self.masking.truncate_weights()
            self.masking.print_nonzero_counts()
        self.optimizer.zero_grad()


def build(name: str, run: RunConfig, batch: int, reference: Path | None, dtype: torch.dtype = DTYPE) -> Side:
    """A side by name, on random tokens ``[batch, LENGTH]``; ``dtype`` is that of the baseline's weights."""
    torch.manual_seed(0)
    ids = torch.randint(run.model["vocab_size"], (batch, LENGTH), device=DEVICE)
    if name == "baseline":
        return Reference(run, ids, dtype, reference) if reference else Plain(run, ids, dtype)
    return {"nt_hf": NtHf, "stock": Stock}[name](run, ids)


def recipe(size: str) -> RunConfig:
    """The recipe of a size, whose masks move by soft magnitude and gradient here, as the baseline's do."""
    run = load_run_config([f"recipes/configs/{size}.yaml"])
    run.sparsity = SparsityConfig(density=run.sparsity.density)
    return run


def measure(sizes: list[str], reference: Path | None = None, rounds: int = 3) -> list[Figure]:
    """Rows 1 to 5 and 12 of the table of goals."""
    return [figure for size in sizes for figure in of_one_size(size, reference, rounds)]


def of_one_size(size: str, reference: Path | None, rounds: int) -> list[Figure]:
    batch = 64 if GPU else 8
    baseline_name = "the reference code" if reference else "a plain loop in the reference's manner"
    shape, figures = f"{size}, {batch} x {LENGTH}", []
    run = recipe(size)
    sides = {name: build(name, run, batch, reference) for name in ("nt_hf", "stock", "baseline")}
    nt_hf, baseline = sides["nt_hf"], sides["baseline"]
    config = nt_hf.model.config
    trail = copy.deepcopy(config)
    trail.num_ensemble_heads = 1
    tokens = batch * LENGTH
    flops, trail_flops = (tokens * training_flops_per_token(model, LENGTH) for model in (config, trail))

    best, baseline_best = math.inf, math.inf
    for precision in ("highest",) if GPU else ("highest", "medium"):
        setting = "" if precision == "highest" else ", matmul precision medium"
        with matmul_precision(precision):
            times = take_turns({name: side.step for name, side in sides.items()}, rounds)
            figures.append(share_of_peak(flops / statistics.median(times["nt_hf"]), size, shape + setting))
        median = {name: statistics.median(values) for name, values in times.items()}
        if precision == "highest":
            baseline_update = seconds(baseline.update)
            update, masking = update_and_masking(nt_hf)
        step, baseline_step = (
            median["nt_hf"] + update / nt_hf.interval,
            median["baseline"] + baseline_update / baseline.interval,
        )
        best, baseline_best = min(best, step), min(baseline_best, baseline_step)
        figures += [
            Figure(
                1,
                f"step / (stock Llama's step x FLOPs ratio), {shape}{setting}",
                ratio(times, "nt_hf", "stock") / (flops / trail_flops),
                at_most=1.03,
                note=f"{median['nt_hf']:.3f} s, {median['stock']:.3f} s x {flops / trail_flops:.2f}",
            ),
            Figure(
                2,
                f"tokens/s against {baseline_name}, {shape}{setting}",
                baseline_step / step,
                at_least=2.5 if GPU else 1.6,
                note=f"{tokens / step:,.0f} and {tokens / baseline_step:,.0f} tokens/s; a topology update takes "
                f"{update:.2f} and {baseline_update:.1f} s",
            ),
        ]
        if precision == "highest":
            figures += machinery(run, update, masking, median["nt_hf"], batch, shape)
    if GPU:
        figures.append(Figure(1, f"host waits for the device in a step, {shape}", waits(nt_hf), at_most=0))
    else:
        of_precision, fastest = automatic_precision(nt_hf, flops, size, shape, rounds)
        figures += of_precision
        best = min(best, fastest + update / nt_hf.interval)
        # Weights, gradients and moments in bf16: the reference's own option, which changes what is trained as well.
        in_bf16 = build("baseline", run, batch, reference, torch.bfloat16)
        step_in_bf16 = statistics.median(take_turns({"bf16": in_bf16.step}, rounds)["bf16"])
        step_in_bf16 += seconds(in_bf16.update) / in_bf16.interval
        note = (
            f"{tokens / best:,.0f} tokens/s; the other side with weights in fp32 {tokens / baseline_best:,.0f}, "
            f"in bf16 {tokens / step_in_bf16:,.0f}"
        )
        baseline_best = min(baseline_best, step_in_bf16)
        name = f"tokens/s against {baseline_name}, each in its fastest setting, {shape}"
        figures.append(Figure(2, name, baseline_best / best, at_least=2.5, note=note))
    del sides, nt_hf, baseline
    memory = {name: memory_of(name, size, batch, reference) for name in ("nt_hf", "baseline")}
    if all(memory.values()):
        note = "{nt_hf:.2f} and {baseline:.2f} GB, weights and optimizer included"
        note = note.format(**{name: value / 1e9 for name, value in memory.items()})
        name = f"peak memory against {baseline_name}, {shape}"
        figures.append(Figure(3, name, memory["nt_hf"] / memory["baseline"], at_most=0.5, note=note))
    figures.append(stacked_heads(config, batch, rounds))
    return sorted(figures, key=lambda figure: figure.row)


def machinery(run: RunConfig, update: float, masking: float, step: float, batch: int, shape: str) -> list[Figure]:
    """Row 5, from the seconds of an update, of masking and of a step that masks."""
    interval, passes = run.sparsity.update_interval, run.train.batch_size // batch
    step_seconds = {shape: step, f"{shape} in {passes} passes, the recipe's batch": (
        passes * (step - masking) + masking
    )}  # fmt: skip
    note = f"masking {1000 * masking:.1f} ms a step, an update {1000 * update:.0f} ms every {interval} steps"
    return [
        Figure(
            5,
            f"masks and updates, share of training, {what}",
            (masking + update / interval) / (seconds + update / interval),
            at_most=0.015,
            note=note,
        )
        for what, seconds in step_seconds.items()
    ]


def automatic_precision(side: NtHf, flops: float, size: str, shape: str, rounds: int) -> tuple[list[Figure], float]:
    """Row 12: whether ``train.precision=auto`` takes the faster precision on this CPU; row 4 in bf16.

    Returns:
        The figures, and the seconds of a step in the fastest setting.
    """
    medium = "fp32, matmul precision medium"
    settings = {"fp32": ("highest", False), medium: ("medium", False), "bf16": ("highest", True)}

    def step(products: str, bf16: bool) -> None:
        side.bf16 = bf16
        with matmul_precision(products):
            side.step()

    times = take_turns({name: partial(step, *setting) for name, setting in settings.items()}, rounds)
    side.bf16 = False
    median = {name: statistics.median(values) for name, values in times.items()}
    auto = fastest_precision()
    others = [name for name in settings if not name.startswith(auto)]
    figure = Figure(
        12,
        f"step at train.precision auto ({auto}) / fastest other, {shape}",
        ratio(times, auto, min(others, key=median.__getitem__)),
        at_most=round(1 / 1.8, 3) if size == "60m" else 1.0,
        note="; ".join(f"{name}: {value:.2f} s" for name, value in median.items()),
    )
    share = share_of_peak(flops / median["bf16"], size, f"{shape}, bf16", torch.bfloat16)
    return [figure, share], min(median.values())


def update_and_masking(side: NtHf, rounds: int = 3) -> tuple[float, float]:
    """Median seconds of what an update adds, and of masking the gradients."""
    updates, maskings = [], []
    for _ in range(rounds):
        side.backward()
        with_update = seconds(side.update)
        maskings.append(seconds(side.sparsifier.step))
        updates.append(max(0.0, with_update - maskings[-1]))
        side.optimizer.zero_grad(set_to_none=True)
    return statistics.median(updates), statistics.median(maskings)


def share_of_peak(flops: float, size: str, shape: str, dtype: torch.dtype = torch.float32) -> Figure:
    """Matrix FLOP/s against the peak: of the data sheet on a known GPU, measured in ``dtype`` on a CPU."""
    named = peak_tflops(torch.cuda.get_device_name()) if GPU else None
    peak = named * 1e12 if named else matmul_peak(torch.bfloat16 if GPU else dtype)
    goal = {"350m": 0.45} if GPU else {"60m": 0.45 if dtype == torch.bfloat16 else 0.65}
    return Figure(
        4,
        f"share of the matrix-product peak, {shape}",
        flops / peak,
        at_least=goal.get(size),
        note=f"{flops / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s" + (" (data sheet)" if named else " measured"),
    )


def memory_of(name: str, size: str, batch: int, reference: Path | None) -> int | None:
    """Peak bytes of building a side and running two steps, in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", name, "--sizes", size, "--batch", str(batch)]
    command += ["--reference", str(reference)] if reference else []
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return None if lines[-1] == "None" else int(lines[-1])


def waits(side: NtHf) -> int:
    """How often the host waits for the device in a step without a topology update."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            side.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    synchronize()
    return sum("synchroniz" in str(warning.message) for warning in caught)


def stacked_heads(config: NeuroTrailsLlamaConfig, batch: int, rounds: int) -> Figure:
    """The linear layers of a block of every head, forward and backward: one batched product against one by one."""
    heads, hidden, wide = config.num_ensemble_heads, config.hidden_size, config.intermediate_size
    shapes = [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]
    options = {"device": DEVICE, "dtype": torch.bfloat16 if GPU else torch.float32, "requires_grad": True}
    stacked = [
        (torch.randn(heads, batch * LENGTH, i, **options), torch.randn(heads, o, i, **options)) for o, i in shapes
    ]
    single = [
        (x[h].detach().clone().requires_grad_(), weight[h].detach().clone().requires_grad_())
        for h in range(heads)
        for x, weight in stacked
    ]

    def run(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for x, weight in pairs:
            out = x @ weight.mT
            out.backward(out.detach())
            x.grad = weight.grad = None

    times = take_turns({"one by one": lambda: run(single), "stacked": lambda: run(stacked)}, rounds)
    return Figure(
        1,
        f"heads' linear layers stacked / one by one, hidden {hidden}",
        ratio(times, "stacked", "one by one"),
        note="above 1: one by one, as nt_hf runs them, is faster",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["20m", "60m"])
    parser.add_argument("--reference", type=Path, help="checkout of the paper's code")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory_of", choices=["nt_hf", "baseline"], help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        run = recipe(args.sizes[0])

        def two_steps() -> None:
            side = build(args.memory_of, run, args.batch, args.reference)
            side.step()
            side.step()

        print(peak_bytes(two_steps))
    else:
        print(table(measure(args.sizes, args.reference, args.rounds)))


if __name__ == "__main__":
    main()
