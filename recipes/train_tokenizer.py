"""Trains a small tokenizer on any text source: ``python recipes/train_tokenizer.py --data sample:train --output DIR``.

A vocabulary of a few thousand tokens suits small models, whose embedding and LM heads would otherwise outweigh
their blocks. The tokenizer is a byte-level BPE: it is trained in seconds, the same text gives the same file, and
it can spell and restore any text. The special tokens are those of the sample tokenizer: ``<pad>`` = 0, ``</s>`` = 1,
``<unk>`` = 2 (never emitted), none of them added by itself.
"""

# First: it says how threads wait, which is read when torch is loaded.
import nt_hf  # noqa: F401  # isort: skip

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nt_hf.cli.program import run
from nt_hf.data.streams import read_texts
from nt_hf.files import only_writer, writing

logger = logging.getLogger("nt_hf.train_tokenizer")

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LEAST = len(SPECIAL_TOKENS) + len(ALPHABET)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` entries, or of fewer where the text has no more pairs to merge.

    Raises:
        ValueError: ``vocab_size`` has no room for the special tokens and the 256 bytes.
    """
    if vocab_size < LEAST:
        raise ValueError(f"vocab_size={vocab_size}: expected {LEAST} or more, for the special tokens and every byte")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", nargs="+", required=True, help="text sources, for example sample:train or 'text/*.gz'"
    )
    parser.add_argument("--vocab_size", type=int, default=4096, help="entries, special tokens included (%(default)s)")
    parser.add_argument("--output", required=True, help="directory that AutoTokenizer.from_pretrained will take")
    parser.add_argument("--text_field", default="text", help="field that holds the text (%(default)s)")
    options = parser.parse_args(arguments)
    output = Path(options.output)
    with only_writer(output):  # before the text is read
        tokenizer = train_tokenizer(read_texts(options.data, options.text_field), options.vocab_size)
        with writing(output):
            tokenizer.save_pretrained(output)
    logger.info("%d tokens, saved to %s", len(tokenizer), output)


if __name__ == "__main__":
    run(main)
