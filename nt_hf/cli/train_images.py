"""Trains an image classifier with several heads.

    nt-hf train-images --config digits --output_dir runs/digits
    accelerate launch -m nt_hf.cli.train_images --config wrn-16-1 treenet --output_dir runs/treenet \
        --data.train my/images/train --data.validation my/images/test

A configuration is a YAML file or the name of one that comes with the package (digits, wrn-28-10-cifar100, …). Images
are digits (they come with the package), a folder with one folder for each class, parquet files, or a data set of the
hub. Every key can be set on the command line as --section.key value. A killed run continues from its last checkpoint
when it is started again with the same command.
"""

from collections.abc import Sequence

from .program import run
from .train import start


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line ``argv`` asks for; ``None``: that of this process."""
    start("train-images", __doc__, argv, images_only=True)


if __name__ == "__main__":
    run(main)
