"""Tokenizers: loaded so that they add no special tokens by themselves, for training and for every later use alike."""

import logging
import os
import re
import tempfile

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..checks import one_line
from .sources import SAMPLE

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer called ``name``: ``"sample"`` (T5's 32,000 pieces, with the package), a directory or a hub name.

    Training ends documents by itself, so a tokenizer that would append ``</s>`` (T5's) or prepend ``<s>`` (Llama's)
    to every text is loaded without that. Saved with a checkpoint, it stays so: a prompt is then encoded as the
    training text was.

    Raises:
        ValueError: there is no such tokenizer, or it has no end-of-sequence token.
    """
    if not os.path.exists(name) and not _HUB_NAME.fullmatch(name) and name != "sample":
        raise ValueError(f"tokenizer={name!r}: there is no such directory")
    try:
        tokenizer = AutoTokenizer.from_pretrained(SAMPLE if name == "sample" else name)
    except Exception as error:  # missing files, bad json, no network: libraries raise errors of many types
        missing = "" if os.path.exists(name) or name == "sample" else "there is no such directory, and "
        raise ValueError(
            f"tokenizer={name!r}: {missing}it cannot be loaded ({one_line(error)}): "
            "accepted is 'sample', a tokenizer's directory or its name on the hub"
        ) from error
    eos_id(tokenizer)
    if _adds_tokens(tokenizer):
        tokenizer = _adding_nothing(tokenizer)
    # Where it was loaded from, of no use to whoever loads what is saved of it.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _adds_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a")["input_ids"] != tokenize(["a"], tokenizer)[0]


def _adding_nothing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer without its post-processor.

    Loaded again as the plain class: those of some models put their post-processor back whenever they are made.
    """
    if not tokenizer.is_fast:  # in code of its own, which is not saved with it
        logger.warning(
            "tokenizer=%r adds special tokens to every text; whoever loads a checkpoint's copy of it by other means "
            "than nt_hf must pass add_special_tokens=False",
            tokenizer.name_or_path,
        )
        tokenizer.build_inputs_with_special_tokens = _joined
        return tokenizer
    name = tokenizer.name_or_path
    of_class = {key: getattr(tokenizer, key) for key in ("padding_side", "truncation_side", "model_input_names")}
    tokenizer.backend_tokenizer.post_processor = None
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **of_class)
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = name
    return tokenizer


def _joined(first: list[int], second: list[int] | None = None) -> list[int]:
    return [*first, *(second or [])]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that every id the tokenizer can emit is below ``vocab_size``; ids may have gaps, so it counts none.

    Raises:
        ValueError: the largest id is ``vocab_size`` or more.
    """
    largest = max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder])
    if largest >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the tokenizer emits ids up to {largest}; accepted is {largest + 1} or more"
        )


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, without the special tokens that a tokenizer may add."""
    return tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that separates documents.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path!r}: has no eos_token; accepted is one to end every document with"
        )
    return tokenizer.eos_token_id
