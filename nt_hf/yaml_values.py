"""Values out of YAML: every key once, every scalar also as it was written, converted to the type of its field."""

import math
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from .checks import nearest


class DuplicateKeyError(ValueError):
    """A key that a YAML mapping has twice."""


class _UniqueKeys(yaml.composer.Composer):
    """Refuses keys that are given twice: YAML would drop the first of them without a word."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise DuplicateKeyError(
                        f"line {line}: the key {key.value} is given twice, first in line {lines[key.value]}"
                    )
                lines[key.value] = line
        return node


class _Loader(_UniqueKeys, yaml.SafeLoader):
    """YAML 1.1 reads 2:4 as 124, a number to the base 60: nobody means that, and here it is a sparsity structure."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not pattern.match("2:4")]
    + [(tag, re.compile(r"[-+]?\d[\d_]*$")) for tag, pattern in resolvers if tag.endswith(":int")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _load(text: str) -> tuple[Any, Any]:
    """What a YAML text holds, and the same with all scalars as they were written."""
    return yaml.load(text, _Loader), yaml.load(text, yaml.BaseLoader)


def parse_yaml(text: str) -> tuple[Any, Any]:
    """A value of the command line: YAML where it is, else plain text (``*.jsonl`` would be an alias)."""
    try:
        return _load(text)
    except yaml.YAMLError:
        return text, text


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mapping that a YAML file holds, and the same with all scalars as they were written.

    Raises:
        ValueError: it is not YAML in UTF-8, or no mapping, or has a key twice.
        OSError: it cannot be read.
    """
    try:
        content, written = _load(Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.object[error.start]:#x} at {error.start})") from error
    except DuplicateKeyError as error:
        raise ValueError(f"{path}, {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content or {}, dict):
        raise ValueError(f"{path}: accepted is a mapping")
    return content or {}, written or {}


def known_name(name: str, accepted: Iterable[str], where: str) -> str:
    """The name itself, if it is an accepted one; else a ValueError points out the nearest. ``where`` precedes it."""
    names = tuple(accepted)
    if name not in names:
        similar = nearest(name, names)
        hint = f"did you mean {similar}?" if similar else f"accepted is {', '.join(names)}"
        raise ValueError(f"unknown key {where}{name}: {hint}")
    return name


_NO_SUCH = object()
_WORDS = {
    type(None): "null", bool: "true or false", int: "a whole number", float: "a finite number", str: "text",
    list: "a list", dict: "a mapping",
}  # fmt: skip


def typed_value(value: Any, hint: Any, name: str, text: Any = None) -> Any:
    """``value`` checked against a field's type, with all that it contains.

    YAML reads ``1e-3`` as text, so text that is a number counts as one; and ``no`` as false, so where text is wanted a
    scalar counts as it was written.

    Args:
        value: as YAML reads it.
        hint: the type.
        name: for the message.
        text: the same with every scalar as it was written, if that is known.

    Raises:
        ValueError: it is of another type.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if (typed := _as(value, option, name, text)) is not _NO_SUCH:
            return typed
    if str in options and value is not None and isinstance(text, str):
        return text
    kinds = [dict if typing.is_typeddict(option) else typing.get_origin(option) or option for option in options]
    accepted = dict.fromkeys(_WORDS.get(kind) or getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{name}={value!r}: accepted is {' or '.join(accepted)}")


def _as(value: Any, hint: Any, name: str, text: Any) -> Any:
    """``value`` as one type that is no union, or ``_NO_SUCH``."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (Any, object):
        return value
    if kind in (int, float):
        return _number(value, kind)
    if kind is list and isinstance(value, list):
        texts = text if isinstance(text, list) and len(text) == len(value) else [None] * len(value)
        return [typed_value(item, *inner or (Any,), f"{name}[{i}]", texts[i]) for i, item in enumerate(value)]
    if (kind is dict or typing.is_typeddict(kind)) and isinstance(value, dict):
        of_value, texts = (inner or (Any, Any))[1], text if isinstance(text, dict) else {}
        hints = dict.fromkeys(value, of_value)
        if typing.is_typeddict(kind):
            hints = typing.get_type_hints(kind)
        for key in value:
            known_name(key, hints, f"{name}.")
        return {key: typed_value(item, hints[key], f"{name}.{key}", texts.get(key)) for key, item in value.items()}
    return value if isinstance(kind, type) and not typing.is_typeddict(kind) and isinstance(value, kind) else _NO_SUCH


def _number(value: Any, kind: type) -> Any:
    """A finite number, also where it is written as ``1e-3`` or, a whole one, as ``1e4``; or ``_NO_SUCH``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _NO_SUCH
    if kind is int and isinstance(value, int):
        return value
    try:
        converted = float(value)
    except (ValueError, OverflowError):
        return _NO_SUCH
    if not math.isfinite(converted) or (kind is int and not converted.is_integer()):
        return _NO_SUCH
    return kind(converted)
