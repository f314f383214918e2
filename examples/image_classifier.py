"""A wide residual network of three sparse heads learns the digits that come with the package, in half a minute.

python examples/image_classifier.py --steps 200
nt-hf evaluate images --model runs/image-classifier --output runs/image-classifier/images.json
"""

import argparse
from pathlib import Path

from nt_hf import NeuroTrailsForImageClassification, NeuroTrailsWideResNetConfig, Sparsifier, SparsityConfig, draw_masks
from nt_hf.data.image_config import ImageConfig
from nt_hf.data.image_sets import open_training_images
from nt_hf.data.images import ImageBatches
from nt_hf.files import write_json

import torch


def main(arguments: list[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="runs/image-classifier")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    train, validation = open_training_images(ImageConfig(crop_padding=1))
    config = NeuroTrailsWideResNetConfig(
        num_hidden_layers=6, width=1, image_size=train.size[0], num_labels=len(train.classes), num_ensemble_heads=3,
        blocks_in_head=4, masked_modules=["model.layers.*", "model.heads.*"],
    )  # fmt: skip
    model = NeuroTrailsForImageClassification.from_config(config).train()
    sparsity = SparsityConfig(density=0.3, distribution="erk", drop="magnitude", grow="gradient", update_interval=25)
    draw_masks(model, sparsity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    sparsifier = Sparsifier(model, optimizer, sparsity, total_steps=args.steps)
    for step, batch in zip(range(1, args.steps + 1), ImageBatches(train, batch_size=64)):
        output = model(**batch)
        output.loss.backward()
        sparsifier.step()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: losses of the heads", [f"{loss:.3f}" for loss in output.head_losses.tolist()])

    model.eval()
    right = torch.zeros(4)
    with torch.no_grad():
        for batch in ImageBatches(validation, batch_size=256, training=False):
            output = model(batch["pixel_values"], output_head_logits=True)
            guesses = torch.cat([output.head_logits, output.logits[None]]).argmax(-1)
            right += (guesses == batch["labels"]).sum(1)
    print("accuracy of each head, and of the ensemble", [f"{x:.3f}" for x in (right / len(validation)).tolist()])
    model.save_pretrained(args.output)
    mean, std = train.config.statistics  # what evaluation, and an image processor of Transformers, needs to know
    write_json(Path(args.output, "preprocessor_config.json"), {"image_mean": list(mean), "image_std": list(std)})
    return model


if __name__ == "__main__":
    main()
