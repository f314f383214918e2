"""Trains a small tokenizer on any text source.

    nt-hf tokenizer --data sample:train --vocab_size 2048 --output DIR

A vocabulary of a few thousand tokens suits small models, whose embedding and LM heads would otherwise outweigh
their blocks. The tokenizer is a byte-level BPE: it is trained in seconds, the same text gives the same file, and
it can spell and restore any text. The special tokens are those of the sample tokenizer: ``<pad>`` = 0, ``</s>`` = 1,
``<unk>`` = 2 (never emitted), none of them added by itself.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..data.sources import read_texts
from ..files import lock_directory, writing
from .program import verb_parser

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
        raise ValueError(f"vocab_size={vocab_size}: accepted is {LEAST} or more, for the special tokens and every byte")
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb_parser("tokenizer", __doc__)
    parser.add_argument(
        "--data", nargs="+", required=True, help="text sources, for example sample:train or 'text/*.gz'"
    )
    parser.add_argument("--vocab_size", type=int, default=4096, help="entries, special tokens included (%(default)s)")
    parser.add_argument("--output", required=True, help="directory that AutoTokenizer.from_pretrained will take")
    parser.add_argument("--text_field", default="text", help="field that holds the text (%(default)s)")
    args = parser.parse_args(argv)
    output = Path(args.output)
    with lock_directory(output):  # before the text is read
        tokenizer = train_tokenizer(read_texts(args.data, args.text_field), args.vocab_size)
        with writing(output):
            tokenizer.save_pretrained(output)
    logger.info("%d tokens, saved to %s", len(tokenizer), output)
