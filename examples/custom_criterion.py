"""Trains with a drop criterion of one's own: the magnitude of a weight times a random number.

python examples/custom_criterion.py
"""

from nt_hf import Sparsifier, SparsityConfig, check_masks, draw_masks
from nt_hf.sparsity.criteria import DROP, Chunk, Drop

import torch
from torch import nn


def noisy_magnitude(chunk: Chunk) -> torch.Tensor:
    """Keeps the largest ``|w| * u``, ``u`` uniform in (0, 1): now and then a small weight stays and a large one goes.

    A chunk gives the weights, gradients and noise of a piece of one tensor, flat and in fp32, as copies that may be
    overwritten. The noise depends on the seed, the step and the name alone, so a run can be repeated.
    """
    return chunk.weight.abs_().mul_(chunk.noise)


def main(steps: int = 200) -> float:
    DROP["noisy_magnitude"] = Drop(noisy_magnitude)  # now a name that SparsityConfig accepts

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 1))
    config = SparsityConfig(density=0.2, drop="noisy_magnitude", grow="random", update_interval=20, update_end=0.75)
    draw_masks(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimizer, config, total_steps=steps)
    for step in range(1, steps + 1):
        inputs = torch.randn(64, 32)
        loss = (model(inputs)[:, 0] - inputs[:, :4].sum(-1)).square().mean()  # four of the 32 inputs matter
        loss.backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    print(sparsifier.report())
    assert not check_masks(model)
    useful = (model[0].weight != 0)[:, :4].float().mean() / (model[0].weight != 0).float().mean()
    print(f"the inputs that matter have {useful:.2f} times as many weights as the average input")
    return loss.item()


if __name__ == "__main__":
    main()
