"""What topology updates cost.

    python benchmarks/topology.py

Three tables: one update against the same update written with PyTorch's own selections, the time of each method, and
the share of a model's training time that updates and masked gradients take. The sides of a comparison take turns within
one run; figures are medians. Bandwidth is measured by copying, and "bytes" are the least that an update can move:
weight, gradient and mask read, mask written.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable

from nt_hf import NeuroTrailsLlamaForCausalLM, SparsityConfig
from nt_hf.config import load_run_config
from nt_hf.sparsity.criteria import DROP, GROW
from nt_hf.sparsity.first_masks import draw_masks
from nt_hf.sparsity.sparsifier import Sparsifier
from nt_hf.sparsity.update import random_mask, update_mask
from nt_hf.text import markdown_table
from nt_hf.training.optimizer import make_optimizer

import torch
from common import DEVICE, bandwidth, conditions, peak_bytes, seconds, take_turns

DENSITY, DROP_FRACTION = 0.9, 0.3
BYTES = 4 + 4 + 1 + 1  # of a weight: fp32 weight and gradient, old and new mask
MULTINOMIAL_LIMIT = 2**24  # torch.multinomial refuses more categories


# --------------------------------------------------------------------------------------------- one update


def plain_update(choose: Callable, mask: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The update by the obvious means: ``choose(scores, k)`` gives the places of the k largest."""
    active = int(mask.sum())
    moved = round(DROP_FRACTION * active)
    race = 3 * weight.abs().log() - torch.empty_like(weight).exponential_().log()
    kept = torch.zeros_like(mask).flatten()
    kept[choose(race.masked_fill(~mask, -torch.inf).flatten(), active - moved)] = True
    new = kept.clone()
    new[choose(grad.abs().flatten().masked_fill(kept, -1), moved)] = True
    return new.view_as(mask)


def by_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.topk(k, sorted=False).indices


def by_sort(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.sort(descending=True).indices[:k]


def multinomial_update(mask: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The reference's manner: weights drawn by torch.multinomial, then a sort of the gradients."""
    active = int(mask.sum())
    moved = round(DROP_FRACTION * active)
    kept = torch.zeros_like(mask).flatten()
    kept[torch.multinomial(weight.abs().flatten() ** 3, active - moved)] = True
    new = kept.clone()
    new[by_sort(grad.abs().flatten().masked_fill(kept, -1), moved)] = True
    return new.view_as(mask)


def compare_one_update(shape: tuple[int, int], repetitions: int) -> None:
    mask, weight, grad = tensors(shape)
    steps = itertools.count()
    update = functools.partial(update_mask, drop_fraction=DROP_FRACTION, seed=0, name="weight")
    updates = {
        "nt_hf": lambda: update(mask, weight, grad, step=next(steps)),
        "race, torch.topk": lambda: plain_update(by_topk, mask, weight, grad),
        "race, torch.sort": lambda: plain_update(by_sort, mask, weight, grad),
    }
    if mask.numel() <= MULTINOMIAL_LIMIT:
        updates["torch.multinomial, torch.sort"] = lambda: multinomial_update(mask, weight, grad)
    sides = {name: lambda side=side: check(side(), mask) for name, side in updates.items()}
    medians = {name: statistics.median(values) for name, values in take_turns(sides, repetitions).items()}
    speed, bytes_moved = bandwidth(mask.numel()), BYTES * mask.numel()
    print(
        f"\nSoft-magnitude drop and gradient growth of {shape[0]} x {shape[1]}, density {DENSITY}, "
        f"{DROP_FRACTION:.0%} moved; a copy reaches {speed / 1e9:.1f} GB/s\n"
    )
    rows = [["", "ms", "ratio", "MB moved at least", "share of bandwidth", "extra memory / tensor"]]
    for name, value in medians.items():
        extra = peak_bytes(updates[name])
        memory = "" if extra is None else f"{extra / (4 * mask.numel()):.1f}"
        moved, share = f"{bytes_moved / 1e6:.0f}", f"{bytes_moved / value / speed:.2%}"
        rows.append([name, f"{1000 * value:.1f}", f"{value / medians['nt_hf']:.2f}", moved, share, memory])
    print(markdown_table(rows))


def tensors(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    mask = random_mask(shape, round(DENSITY * shape[0] * shape[1]), seed=0, device=DEVICE)
    weight = torch.randn(shape, generator=generator, device=DEVICE).masked_fill_(~mask, 0)
    return mask, weight, torch.randn(shape, generator=generator, device=DEVICE)


def check(new: torch.Tensor, mask: torch.Tensor) -> None:
    assert int(new.sum()) == int(mask.sum()), "the number of active weights changed"


def time_methods(shape: tuple[int, int], repetitions: int) -> None:
    mask, weight, grad = tensors(shape)
    sparse = random_mask(shape, mask.numel() // 2, seed=0, device=DEVICE, structure="2:4")
    cases = [(drop, "gradient", "unstructured", mask) for drop in DROP]
    cases += [("magnitude", grow, "unstructured", mask) for grow in GROW if grow != "gradient"]
    cases += [("magnitude", "gradient", "2:4", sparse)]
    fan_in = random_mask(shape, mask.numel() // 2, seed=0, device=DEVICE, structure="constant_fan_in")
    cases += [("magnitude", "gradient", "constant_fan_in", fan_in)]
    rows = [["drop", "grow", "structure", "ms"]]
    for drop, grow, structure, before in cases:
        methods = {"drop": drop, "grow": grow, "structure": structure}
        update = functools.partial(
            update_mask, before, weight.masked_fill(~before, 0), grad, momentum=grad, drop_fraction=DROP_FRACTION,
            seed=0, step=1, **methods,
        )  # fmt: skip
        side = {"update": lambda update=update, before=before: check(update(), before)}
        median = statistics.median(take_turns(side, repetitions)["update"])
        rows.append([*methods.values(), f"{1000 * median:.1f}"])
    print(f"\nOther methods, {shape[0]} x {shape[1]}\n\n{markdown_table(rows)}")


# ---------------------------------------------------------------------------------------------- in training


def share_of_training(path: str, micro_batch: int, tokens: int, repetitions: int) -> None:
    config = load_run_config([path])
    config.sparsity = SparsityConfig(density=config.sparsity.density)  # soft magnitude and gradient, as above
    length = config.data.sequence_length
    model = NeuroTrailsLlamaForCausalLM(
        config.model_config(max_position_embeddings=length)
    ).to(DEVICE)  # fmt: skip
    draw_masks(model, config.sparsity)
    optimizer = make_optimizer(model, config.train)
    config.sparsity.update_interval, interval = 1, config.sparsity.update_interval
    sparsifier = Sparsifier(model, optimizer, config.sparsity, total_steps=10**6)
    ids = torch.randint(model.config.vocab_size, (micro_batch, length), device=DEVICE)

    def passes() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    times: dict[str, list[float]] = {"pass": [], "update": [], "masking": [], "optimizer": []}
    for _ in range(repetitions + 1):
        optimizer.zero_grad()
        times["pass"].append(seconds(passes))
        times["update"].append(seconds(sparsifier.step))
        config.sparsity.update_interval = 0
        times["masking"].append(seconds(sparsifier.step))
        config.sparsity.update_interval = 1
        times["optimizer"].append(seconds(optimizer.step))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    report = sparsifier.report().overall
    step = medians["pass"] * tokens / (micro_batch * length) + medians["optimizer"] + medians["masking"]
    update = max(0.0, medians["update"] - medians["masking"])
    print(
        f"\n{path}: {report.size / 1e6:.0f}M masked weights, density {report.density:.3f}; a step of {tokens} tokens "
        f"is {tokens // (micro_batch * length)} passes of {micro_batch} x {length}\n"
    )
    every = f"topology update with its measures, every {interval} steps"
    rows = [
        ["", "ms", "share of a step"],
        ["step: passes, masked gradients, optimizer", f"{1000 * step:.0f}", ""],
        ["masking gradients, every step", f"{1000 * medians['masking']:.1f}", f"{medians['masking'] / step:.3%}"],
        [every, f"{1000 * update:.1f}", f"{update / interval / step:.3%}"],
    ]
    print(markdown_table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32000)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--config", default="recipes/configs/350m.yaml", help="the model of the last table")
    parser.add_argument("--micro_batch", type=int, default=2 if DEVICE.type == "cpu" else 16)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a step in the last table")
    args = parser.parse_args()

    print(conditions())
    compare_one_update((args.rows, args.columns), args.repetitions)
    compare_one_update((4096, 4096), args.repetitions)
    time_methods((args.rows, args.columns), args.repetitions)
    share_of_training(args.config, args.micro_batch, args.tokens, min(args.repetitions, 3))


if __name__ == "__main__":
    main()
