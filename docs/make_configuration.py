"""Writes docs/configuration.md, the reference of all configuration keys, from the classes that define them.

python docs/make_configuration.py
"""

import dataclasses
import re
import types
import typing
from pathlib import Path
from types import MappingProxyType

from nt_hf import NeuroTrailsLlamaConfig
from nt_hf.checks import rules_of
from nt_hf.config import DEFAULT_BASE, DERIVED_MODEL_KEYS, TrainConfig
from nt_hf.data.config import DataConfig
from nt_hf.data.image_config import ImageConfig
from nt_hf.sparsity.config import REGISTRIES, SparsityConfig

INTRODUCTION = """# Configuration

<!-- Written by docs/make_configuration.py; a test compares this page with it. Edit the docstrings instead. -->

A run is configured by a YAML file with the four sections below. Any key can also be given on the command line as
`--section.key value`; [train.md](train.md) says how files and command line combine. In Python the sections are
`DataConfig` or `ImageConfig`, `SparsityConfig` and `TrainConfig`, and the keys of `model`, but for `base`, are
arguments of the family's configuration, such as `NeuroTrailsLlamaConfig`.
A value that is out of range ends the program with one line that names the key and what it accepts.
"""
# Keys whose meaning Llama's own documentation gives; here in a few words.
LLAMA = {
    "vocab_size": "number of tokens of the vocabulary",
    "hidden_size": "width of the model",
    "intermediate_size": "inner width of the MLPs",
    "num_hidden_layers": "depth of one trail, backbone and head together",
    "num_attention_heads": "attention heads of a block",
    "num_key_value_heads": "key and value heads of a block; default: as many as attention heads",
    "head_dim": "width of an attention head; default: `hidden_size / num_attention_heads`",
    "hidden_act": "activation of the MLPs",
    "initializer_range": "standard deviation of the initial weights",
    "rms_norm_eps": "epsilon of the norms",
    "tie_word_embeddings": "the LM heads share the embedding's weight",
    "rope_parameters": "type and base of the rotary embedding, `{rope_type: default, rope_theta: 500000.0}`",
    "attention_bias": "biases in the attention's projections",
    "attention_dropout": "dropout of the attention weights",
    "mlp_bias": "biases in the MLPs",
}
DATA = {
    "train": "text to train on: a source or a list of sources, see [train.md](train.md#text)",
    "validation": "text to evaluate on, a source or a list of sources",
    "tokenizer": "`sample` (T5's vocabulary of 32,000 pieces), a directory, or a name on the hub",
    "sequence_length": "tokens of a row",
    "packing": "`pack` joins documents and cuts them into rows; `pad` takes one document per row and cuts it",
    "shuffle_block": "documents that are shuffled among each other; 0: no shuffling",
    "order_per_head": "each head reads the training text in its own order",
    "num_workers": "processes that read and tokenize for each training process; 0: the training process does it",
    "on_bad_line": "`error` ends the run at a line that is not JSON or has no text; `skip` leaves it out",
    "validation_tokens": "an evaluation stops after this number of tokens; null: all of the text",
    "text_field": "name of the JSON field with the text",
}


def descriptions(cls: type) -> dict[str, str]:
    """What the docstring's list of arguments or attributes says of each name, as Markdown."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in (cls.__doc__ or "").splitlines():
        if re.fullmatch(r" {4}\w[\w ]*:", line):
            inside = line.strip() in ("Args:", "Attributes:")
        elif inside and (start := re.fullmatch(r" {8}(\w[\w, ]*): (.*)", line)):
            names = start.group(1).split(", ")
            found |= dict.fromkeys(names, start.group(2))
        elif inside and line.startswith(" " * 12):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    for old, new in (("``", "`"), ("[`", "`"), ("`]", "`"), ("`None`", "`null`"), ("`False`", "`false`")):
        found = {name: text.replace(old, new) for name, text in found.items()}
    return {name: text.rstrip(".") for name, text in found.items()}


def type_name(hint: object) -> str:
    """A type as a user of YAML would call it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_name, typing.get_args(hint))))
    if typing.is_typeddict(hint) or dict in (hint, typing.get_origin(hint)):
        return "mapping"
    if typing.get_origin(hint) is list:
        return f"list of {type_name(*typing.get_args(hint))}s"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default_of(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def accepted_by(name: str, hint: object, rules: dict) -> str:
    """The values that a key may have: those that its check accepts, or else its type."""
    if name in REGISTRIES:
        return ", ".join(REGISTRIES[name])
    return rules[name].accepted if name in rules else type_name(hint)


def table(fields: list[tuple[str, object, object]], texts: dict[str, str], rules: dict = MappingProxyType({})) -> str:
    """A Markdown table of (name, type, default); every name needs a text."""
    for name, *_ in fields:  # some keys are explained together with another
        if name not in texts:
            others = [other for other, text in texts.items() if f"`{name}`" in text]
            texts = {**texts, name: f"see `{others[0]}`"} if others else texts
    rows = ["| key | accepted | default | meaning |", "|---|---|---|---|"]
    for name, hint, default in fields:
        value = {"None": "null", "True": "true", "False": "false"}.get(str(default), str(default))
        text = texts[name].replace("|", "\\|")
        rows.append(f"| `{name}` | {accepted_by(name, hint, rules)} | `{value}` | {text} |")
    return "\n".join(rows)


def fields_of(cls: type) -> list[tuple[str, object, object]]:
    return [(field.name, field.type, default_of(field)) for field in dataclasses.fields(cls)]


def page() -> str:
    """The whole page."""
    own = [name for name in vars(NeuroTrailsLlamaConfig)["__annotations__"] if name not in DERIVED_MODEL_KEYS]
    model = {name: (name, hint, default) for name, hint, default in fields_of(NeuroTrailsLlamaConfig)}
    sections = [
        ("model", "`base` is any family of [families.md](families.md). The shape of the heads comes next, then the\n"
                  "family's own keys, here Llama's. `max_position_embeddings` and the ids of special tokens follow\n"
                  "from `data`, `masked_modules` from `sparsity`; they cannot be set.",
         table([("base", str, DEFAULT_BASE), *(model[name] for name in [*own, *LLAMA] if name in model)],
               {"base": "family of stock models", **LLAMA, **descriptions(NeuroTrailsLlamaConfig)})),
        ("data", "", table(fields_of(DataConfig), {**DATA, **descriptions(DataConfig)}, rules_of(DataConfig))),
        ("data of images", "The section `data` where `model.base` is a family of image classifiers. See "
                           "[images.md](images.md).",
         table(fields_of(ImageConfig), descriptions(ImageConfig), rules_of(ImageConfig))),
        ("sparsity", "[sparsify-your-model.md](sparsify-your-model.md) compares the methods and says where each is "
                     "from.\n`seed` follows `train.seed` unless it is given.",
         table(fields_of(SparsityConfig), descriptions(SparsityConfig), rules_of(SparsityConfig))),
        ("train", "", table(fields_of(TrainConfig), descriptions(TrainConfig), rules_of(TrainConfig))),
    ]  # fmt: skip
    text = INTRODUCTION
    for name, note, rows in sections:
        text += f"\n## {name}\n\n" + (f"{note}\n\n" if note else "") + rows + "\n"
    return text


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page(), encoding="utf-8")
