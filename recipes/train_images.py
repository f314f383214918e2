"""Trains an image classifier with several heads.

    python recipes/train_images.py --config digits --output_dir runs/digits
    accelerate launch recipes/train_images.py --config recipes/configs/wrn-28-10-cifar100.yaml \
        --output_dir runs/wrn-28-10-cifar100

It is the program of nt_hf/cli/train_images.py, as a file for launchers that start files. `--help` explains the
arguments.
"""

# nt_hf comes before torch: it sets how idle threads wait, which torch reads when it is loaded.
from nt_hf.cli.program import run
from nt_hf.cli.train_images import main

if __name__ == "__main__":
    run(main)
