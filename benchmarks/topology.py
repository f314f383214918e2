"""Time of one topology update against the same update written with torch.topk.

    make bench

Both sides take turns within one run; the figures are medians. Density 0.9, soft magnitude and gradient growth, the
update of the paper, on a tensor as large as the embedding of its 350M model.
"""

import argparse
import statistics
import time

import torch

from nt_hf.topology import random_mask, update_mask


def topk_update(mask: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, drop_fraction: float) -> torch.Tensor:
    """The same choice by the obvious means: an exponential race and two ``torch.topk``."""
    active = int(mask.sum())
    moved = round(drop_fraction * active)
    race = 3 * weight.abs().log() - torch.empty_like(weight).exponential_().log()
    kept = torch.zeros_like(mask).flatten()
    kept[race.masked_fill(~mask, -torch.inf).flatten().topk(active - moved, sorted=False).indices] = True
    new = kept.clone()
    new[grad.abs().flatten().masked_fill(kept, -1).topk(moved, sorted=False).indices] = True
    return new.view_as(mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32000)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--drop_fraction", type=float, default=0.3)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (args.rows, args.columns)
    generator = torch.Generator(device).manual_seed(0)
    mask = random_mask(shape, round(0.9 * args.rows * args.columns), seed=0, device=device)
    weight = torch.randn(shape, generator=generator, device=device).masked_fill_(~mask, 0)
    grad = torch.randn(shape, generator=generator, device=device)
    sides = {
        "nt_hf.topology.update_mask": lambda i: update_mask(
            mask, weight, grad, drop_fraction=args.drop_fraction, seed=0, step=i, name="weight"
        ),
        "exponential race and torch.topk": lambda i: topk_update(mask, weight, grad, args.drop_fraction),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(args.repetitions + 1):  # the first round warms up
        for name, side in sides.items():
            start = time.perf_counter()
            new = side(i)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
            assert int(new.sum()) == int(mask.sum()), f"{name} changed the number of active weights"
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    ours = next(iter(medians.values()))
    print(
        f"{args.rows} x {args.columns} on {device.type}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for name, value in medians.items():
        print(f"  {name:<34} {1000 * value:9.1f} ms   {value / ours:5.2f} x")


if __name__ == "__main__":
    main()
