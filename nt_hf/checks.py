"""Checks of settings, with one wording for all errors: ``key=value: accepted is …``."""

import copy
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """The values that a setting may have: a test for them, and their description in words.

    ``names`` are the words themselves where the values are words, so that an error can point out the nearest one.
    """

    valid: Callable[[Any], bool]
    accepted: str
    names: tuple[str, ...] = ()


def check(name: str, value: Any, rule: Rule) -> None:
    """Raises ValueError unless the setting ``name`` may have this value."""
    if not rule.valid(value):
        similar = nearest(value, rule.names)
        hint = f" (did you mean {similar}?)" if similar else ""
        raise ValueError(f"{name}={value!r}: accepted is {rule.accepted}{hint}")


def setting(default: Any, rule: Rule) -> Any:
    """A field of a dataclass, with the values that it may have; ``MISSING`` as the default: it must be given."""
    default_of = {"default": default}
    if isinstance(default, list | dict):
        default_of = {"default_factory": lambda: copy.copy(default)}
    return dataclasses.field(**default_of, metadata={"rule": rule})


def rules_of(settings: Any) -> dict[str, Rule]:
    """The rules of the fields of a dataclass, or of an object of one, that are made by [`setting`]."""
    return {field.name: field.metadata["rule"] for field in dataclasses.fields(settings) if "rule" in field.metadata}


def check_fields(settings: Any) -> None:
    """Raises ValueError unless every [`setting`] of a dataclass has an accepted value."""
    for name, rule in rules_of(settings).items():
        check(name, getattr(settings, name), rule)


def look_up(choices: Mapping[str, Any], name: str, value: Any) -> Any:
    """The entry of ``choices`` that the setting ``name`` asks for.

    Raises:
        ValueError: there is none; the message lists the accepted names and the nearest one.
    """
    check(name, value, choice(choices))
    return choices[value]


def nearest(word: Any, names: Iterable[str]) -> str | None:
    """The name that is most like ``word``; ``None`` if no name is like it."""
    similar = difflib.get_close_matches(str(word), list(names), n=1, cutoff=0.5)
    return similar[0] if similar else None


def choice(names: Iterable[str], when: str = "") -> Rule:
    """One of some names; ``when`` says in words under which condition only these are accepted."""
    names = tuple(names)
    accepted = ", ".join(names) + (when and f" {when}")
    return Rule(lambda value: isinstance(value, str) and value in names, accepted, names)


def integer(least: int | None = None, most: int | None = None) -> Rule:
    """A whole number, from ``least`` to ``most`` where they are given; not a truth value."""

    def valid(value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return (least is None or value >= least) and (most is None or value <= most)

    bounds = {(False, True): f" from {least}", (True, True): f" from {least} to {most}"}
    return Rule(valid, "a whole number" + bounds.get((most is not None, least is not None), ""))


def number(interval: str = "(-inf, inf)", noun: str = "a number") -> Rule:
    """A number within an interval such as ``"(0, 1]"``; not a truth value.

    Args:
        interval: as mathematics writes it, ``inf`` for no bound.
        noun: what the number is, for the message.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def valid(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        above = value > low if interval[0] == "(" else value >= low
        return above and (value < high if interval[-1] == ")" else value <= high)

    words = {"(-inf, inf)": "", "(0, inf)": " above 0", "[0, inf)": " from 0"}
    return Rule(valid, noun + words.get(interval, f" in {interval}"))


def optional(rule: Rule) -> Rule:
    """The same, or None."""
    return Rule(lambda value: value is None or rule.valid(value), f"{rule.accepted}, or null", rule.names)


def list_of(rule: Rule, accepted: str, length: int | None = None) -> Rule:
    """A list of such values, ``accepted`` in words, of a certain length if one is given."""

    def valid(value: Any) -> bool:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            return False
        return all(map(rule.valid, value))

    return Rule(valid, accepted)


def mapping_to(rule: Rule, accepted: str) -> Rule:
    """A mapping to such values, ``accepted`` in words."""
    return Rule(lambda value: isinstance(value, dict) and all(map(rule.valid, value.values())), accepted)


TEXT = Rule(lambda value: isinstance(value, str) and value != "", "a text that is not empty")
SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")


def one_line(error: BaseException) -> str:
    """An error's type and message, shortened, for the end of another message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
