"""The examples of fine-tuning: any source of text, as columns that TRL knows, with the loss on answers only."""

import logging
import re
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig

from ..checks import one_line
from ..data.sources import find_files

logger = logging.getLogger(__name__)

# What each kind of example is made of; the first kind whose columns are there is taken.
KINDS = (("messages",), ("prompt", "completion"), ("text",))
FURTHER = ("tools", "chat_template_kwargs")  # of conversations, if they are there
ACCEPTED = "messages, or prompt and completion, or text"
_BUILDERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet", ".arrow": "arrow"}


def load_examples(name: str, source: list[str]) -> datasets.Dataset:
    """The examples of a source of text, with the columns of one of ``KINDS``.

    Args:
        name: of the setting, for errors.
        source: see the sources module; columns as in ``KINDS``.

    Raises:
        ValueError: files cannot be read or are of several kinds, there is no example, a column is missing or has
            holes.
    """
    files = find_files(source)
    kinds = {_BUILDERS[next(s for s in reversed(Path(file).suffixes) if s in _BUILDERS)] for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{name}={' '.join(source)}: accepted is one kind of files, these are {', '.join(kinds)}")
    (builder,) = kinds
    options = {"sample_by": "document"} if builder == "text" else {}
    try:
        examples = datasets.load_dataset(builder, data_files=files, split="train", **options)
    except Exception as error:  # of many types: a bad line, a damaged file, a connection
        raise ValueError(
            f"{name}={' '.join(source)}: cannot be read ({one_line(error)}); accepted are files of {ACCEPTED}"
        ) from error
    kind = next((kind for kind in KINDS if set(kind) <= set(examples.column_names)), None)
    if kind is None or not len(examples):
        found = f"the columns are {', '.join(examples.column_names) or 'none'}" if len(examples) else "has no example"
        raise ValueError(f"{name}={' '.join(source)}: {found}; accepted are {ACCEPTED}")
    for column in kind:
        values = examples.data.column(column)
        strings = {"string", "large_string"}
        if values.null_count or (column == "text" and str(values.type) not in strings):
            problem = f"{values.null_count} values are missing" if values.null_count else f"holds {values.type}"
            raise ValueError(f"{name}={' '.join(source)}: {column}: {problem}; accepted are {ACCEPTED} in every row")
    return examples.select_columns([*kind, *(column for column in FURTHER if column in examples.column_names)])


def answers_only(name: str, examples: datasets.Dataset, args: SFTConfig, template: str | None) -> datasets.Dataset:
    """Conversations as TRL needs them for a loss on answers only; other examples as they are.

    A template that marks what the assistant generates (``{% generation %}``) says where the answers are: then
    ``args.assistant_only_loss`` is set. Other templates do not, so a conversation becomes a prompt and a completion,
    its last answer, and earlier answers count as prompt.

    Args:
        name: of the setting, for errors.
        examples: of [`load_examples`].
        args: of the trainer.
        template: the chat template.

    Raises:
        ValueError: there is no template, or a conversation without an answer.
    """
    conversations = next((column for column in ("messages", "prompt") if column in examples.column_names), None)
    if conversations is None or not isinstance(examples[0][conversations], list):
        return examples
    if template is None:
        raise ValueError(
            f"{name}: holds conversations, and the tokenizer has no chat template; accepted is --chat_template_path "
            "with a .jinja file or a model that has one"
        )
    if conversations == "prompt" or args.assistant_only_loss:
        return examples
    if re.search(r"{%-?\s*generation\b", template):
        args.assistant_only_loss = True
        logger.info("%s: the chat template marks answers, all of them are learned", name)
        return examples
    logger.info("%s: the chat template does not mark answers, so the last one of each conversation is learned", name)
    return examples.map(_last_answer, fn_kwargs={"name": name}, with_indices=True, remove_columns="messages")


def _last_answer(example: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    messages = example["messages"]
    last = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=0)
    if not last:
        raise ValueError(
            f"{name}: conversation {index + 1} has no answer; accepted are messages with a role and content, of which "
            "one after the first is the assistant's"
        )
    return {"prompt": messages[:last], "completion": messages[last : last + 1]}


def load_chat_tokenizer(model: str, args: SFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint as it is, with the tokens that it adds to a text.

    Raises:
        ValueError: there is none, or it cannot end a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # missing files, bad json: libraries raise errors of many types
        raise ValueError(
            f"model={model!r}: its tokenizer cannot be loaded ({one_line(error)}); accepted is a checkpoint with one"
        ) from error
    if tokenizer.eos_token is None and args.eos_token is None:
        raise ValueError(f"eos_token=None: the tokenizer of {model} has none; accepted is one of its tokens")
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> str | None:
    """The chat template that TRL will use.

    Raises:
        ValueError: ``args.chat_template_path`` leads nowhere.
    """
    path = args.chat_template_path
    if path is None:
        return tokenizer.chat_template
    try:
        if path.endswith((".jinja", ".j2")):
            return Path(path).read_text(encoding="utf-8")
        return AutoTokenizer.from_pretrained(path).chat_template
    except Exception as error:  # of many types
        raise ValueError(
            f"chat_template_path={path!r}: cannot be read ({one_line(error)}); accepted is a .jinja file, or a model "
            "with a chat template"
        ) from error
