"""Trains a small ResNet of Transformers with RigL: 80 % of its weights are zero from the first step on.

python examples/sparsify_resnet.py --steps 200
"""

import argparse

from nt_hf import Sparsifier, SparsityConfig, check_masks, draw_masks

import torch
from transformers import ResNetConfig, ResNetForImageClassification

CLASSES = 4


def images(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures ``[count, 3, 16, 16]`` with a bright corner, and which corner it is ``[count]``."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    pictures = torch.randn(count, 3, 16, 16, generator=generator)
    for picture, label in zip(pictures, labels.tolist()):
        row, column = 8 * (label // 2), 8 * (label % 2)
        picture[:, row : row + 8, column : column + 8] += 1
    return pictures, labels


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=CLASSES))

    # RigL: drop the smallest weights, grow where the gradient is largest. First layer and classifier stay dense.
    rigl = SparsityConfig(
        density=0.2, drop="magnitude", grow="gradient", update_interval=10, update_end=0.75,
        exclude=["resnet.embedder.*", "classifier.*"],
    )  # fmt: skip
    draw_masks(model, rigl)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    sparsifier = Sparsifier(model, optimizer, rigl, total_steps=args.steps)
    for _ in range(args.steps):
        pictures, labels = images(32, generator)
        model(pixel_values=pictures, labels=labels).loss.backward()
        if update := sparsifier.step():  # after backward, before the optimizer
            print(f"step {update.step}: {update.dropped} weights dropped, {update.grown} grown")
        optimizer.step()
        optimizer.zero_grad()

    pictures, labels = images(256, generator)
    with torch.no_grad():
        accuracy = (model.eval()(pixel_values=pictures).logits.argmax(-1) == labels).float().mean().item()
    print(sparsifier.report())
    print(f"accuracy {accuracy:.3f}; weights outside a mask that are not zero: {len(check_masks(model))}")
    return accuracy


if __name__ == "__main__":
    main()
