"""Pretrains a NeuroTrails Llama, on C4 or any text.

    accelerate launch recipes/pretrain_c4.py --config recipes/configs/60m.yaml --output_dir runs/60m
    accelerate launch recipes/pretrain_c4.py --config recipes/configs/60m.yaml recipes/configs/treenet.yaml \
        --output_dir runs/treenet-60m --train.max_steps 20000 --data.train 'my/text/*.jsonl.gz'

It is the program of nt_hf/cli/train.py, as a file for launchers that start files. `--help` explains the arguments, and
docs/train.md the rest.
"""

# nt_hf comes before torch: it sets how idle threads wait, which torch reads when it is loaded.
from nt_hf.cli.program import run
from nt_hf.cli.train import main

if __name__ == "__main__":
    run(main)
