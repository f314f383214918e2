"""Trains a multi-head model on C4 or any text.

    nt-hf train --config 60m --output_dir runs/60m
    accelerate launch -m nt_hf.cli.train --config 60m treenet --output_dir runs/treenet-60m \
        --train.max_steps 20000 --data.train 'my/text/*.jsonl.gz'

A configuration is a YAML file or the name of one that comes with the package (60m, demo, …). Every key of it can be set
on the command line as --section.key value. A killed run continues from its last checkpoint when it is started again
with the same command, also on another number of processes. recipes/accelerate has launch files for several GPUs and
machines.
"""

from collections.abc import Sequence
from pathlib import Path

from ..config import load_run_config, parse_overrides
from ..training.run import run_training
from .program import run, verb_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line ``argv`` asks for; ``None``: that of this process."""
    parser = verb_parser("train", __doc__, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", required=True, help="files or names; later ones override earlier ones")
    parser.add_argument("--output_dir", required=True, help="the run's directory")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint's path")
    parser.add_argument("--resume_override", action="store_true", help="continue although the configuration changed")
    parser.add_argument("--log_with", default="none", choices=["none", "tensorboard", "wandb", "trackio"])
    args, rest = parser.parse_known_args(argv)
    config = load_run_config(args.config, parse_overrides(rest))
    run_training(
        config,
        Path(args.output_dir),
        resume=args.resume,
        resume_override=args.resume_override,
        log_with=args.log_with,
    )


if __name__ == "__main__":
    run(main)
