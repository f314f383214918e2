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

from ..config import DEFAULT_BASE, load_run_config, parse_overrides
from ..data.image_config import ImageConfig
from ..training.run import run_training
from .program import run, verb_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line ``argv`` asks for; ``None``: that of this process."""
    start("train", __doc__, argv)


def start(verb: str, description: str | None, argv: Sequence[str] | None, *, images_only: bool = False) -> None:
    """The program of ``nt-hf <verb>``; what is trained follows from the configuration's family of models."""
    parser = verb_parser(verb, description, allow_abbrev=False)
    parser.add_argument("--config", nargs="+", required=True, help="files or names; later ones override earlier ones")
    parser.add_argument("--output_dir", required=True, help="the run's directory")
    parser.add_argument("--resume", default="auto", help="auto (default), never, or a checkpoint's path")
    parser.add_argument("--resume_override", action="store_true", help="continue although the configuration changed")
    parser.add_argument("--log_with", default="none", choices=["none", "tensorboard", "wandb", "trackio"])
    args, rest = parser.parse_known_args(argv)
    config = load_run_config(args.config, parse_overrides(rest))
    if images_only and not isinstance(config.data, ImageConfig):
        base = config.model.get("base", DEFAULT_BASE)
        raise ValueError(
            f"model.base={base!r}: accepted by nt-hf {verb} are image classifiers, such as wide_resnet, vit"
        )
    run_training(
        config,
        Path(args.output_dir),
        resume=args.resume,
        resume_override=args.resume_override,
        log_with=args.log_with,
    )


if __name__ == "__main__":
    run(main)
