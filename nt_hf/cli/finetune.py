"""Fine-tunes a checkpoint on text, on answers to prompts, or on conversations, by TRL's SFTTrainer.

    nt-hf finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data conversations.jsonl --output_dir runs/tuned
    nt-hf finetune --model runs/tuned --data answers.jsonl --train trail --output_dir runs/one

A stock model gets several heads first. Every option of TRL's SFTConfig is accepted, too, for example --learning_rate,
--num_train_epochs, --max_steps, --per_device_train_batch_size, --gradient_accumulation_steps, --max_length, --packing,
--eval_strategy, --save_strategy, --resume_from_checkpoint, --chat_template_path, --model_init_kwargs, --use_cpu;
--config FILE reads options from YAML. Other defaults than TRL's: gradient_checkpointing is off, because the heads run
one after another and so keep the activations of one only; bf16 is on where there is a GPU that has it; and --output_dir
must be given.
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import HfArgumentParser

from ..checks import TEXT, check
from ..training.finetune_config import FinetuneConfig
from .program import check_output, run


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tunes as the command line ``argv`` asks for; ``None``: that of this process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = {"prog": "nt-hf finetune", "description": __doc__, "formatter_class": _Formatter, "allow_abbrev": False}
    try:
        import peft  # noqa: F401  (asked for now, not after the model has been loaded)
        from trl import SFTConfig, TrlParser
    except ModuleNotFoundError:
        if {"-h", "--help"} & set(argv):
            HfArgumentParser(FinetuneConfig, **options).parse_args(argv)  # prints, and ends the program
        raise
    parser = TrlParser((FinetuneConfig, SFTConfig), **options)
    parser.error = _refuse
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    parser.set_defaults(gradient_checkpointing=False, bf16=has_bf16, output_dir="")
    config, args = parser.parse_args_and_config(argv)
    check("output_dir", args.output_dir, TEXT)
    check_output(Path(args.output_dir), directory=True, option="--output_dir")
    from ..training.finetune import finetune

    finetune(config, args)


def _refuse(message: str) -> None:
    # In place of a usage message as long as the list of options.
    raise ValueError(f"{message}; nt-hf finetune --help lists what is accepted")


if __name__ == "__main__":
    run(main)
