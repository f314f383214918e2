"""Trains a small GPT-2 with transformers.Trainer and RigL: one callback makes it sparse.

python examples/rigl_with_trainer.py --steps 100 --output runs/rigl
"""

import argparse
from itertools import islice

from nt_hf import SparsityCallback, SparsityConfig, check_masks, draw_masks
from nt_hf.data.streams import TokenBatches
from nt_hf.data.tokenizers import load_tokenizer

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="runs/rigl")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    tokenizer = load_tokenizer("sample")
    batches = TokenBatches("sample:train", tokenizer, batch_size=1, sequence_length=64)
    rows = [{name: values[0] for name, values in batch.items()} for batch in islice(batches, 256)]
    eos = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=eos, eos_token_id=eos
    )
    model = GPT2LMHeadModel(config)

    # Only the blocks are sparse: GPT-2 shares the embedding with its LM head.
    rigl = SparsityConfig(
        density=0.5, drop="magnitude", grow="gradient", update_interval=10, exclude=["transformer.w*", "lm_head.*"]
    )
    draw_masks(model, rigl)
    callback = SparsityCallback(rigl)
    trainer = Trainer(
        model,
        TrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()
    print(callback.sparsifier.report())
    assert not check_masks(model)
    return trainer


if __name__ == "__main__":
    main()
