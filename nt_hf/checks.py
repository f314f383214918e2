"""Checks of settings, with one wording for all errors: ``key=value: accepted is …``."""

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
        raise ValueError(f"{name}={value!r}: accepted is {rule.accepted}{nearest(value, rule.names)}")


def check_fields(settings: Any, rules: Mapping[str, Rule]) -> None:
    """Raises ValueError unless the fields that ``rules`` names have accepted values."""
    for name, rule in rules.items():
        check(name, getattr(settings, name), rule)


def look_up(choices: Mapping[str, Any], name: str, value: Any) -> Any:
    """The entry of ``choices`` that the setting ``name`` asks for.

    Raises:
        ValueError: there is none; the message lists the accepted names and the nearest one.
    """
    check(name, value, choice(choices))
    return choices[value]


def nearest(word: Any, names: Iterable[str]) -> str:
    """The text " (did you mean …?)" with the name that is most like ``word``; empty if none is like it."""
    similar = difflib.get_close_matches(str(word), list(names), n=1, cutoff=0.5)
    return f" (did you mean {similar[0]}?)" if similar else ""


def choice(names: Iterable[str], *others: str) -> Rule:
    """One of some names. ``others`` describes values that are accepted elsewhere."""
    names = tuple(names)
    return Rule(lambda value: isinstance(value, str) and value in names, ", ".join([*names, *others]), names)


def whole(least: int | None = None, most: int | None = None) -> Rule:
    """A whole number, from ``least`` to ``most`` where they are given; not a truth value."""

    def valid(value: Any) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            return False
        return (least is None or value >= least) and (most is None or value <= most)

    bounds = {(False, True): f" from {least}", (True, True): f" from {least} to {most}"}
    return Rule(valid, "a whole number" + bounds.get((most is not None, least is not None), ""))


def number(interval: str = "(-inf, inf)", of: str = "a number") -> Rule:
    """A number within an interval such as ``"(0, 1]"``; not a truth value.

    Args:
        interval: as mathematics writes it, ``inf`` for no bound.
        of: what the number is, for the message.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))

    def valid(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        above = value > low if interval[0] == "(" else value >= low
        return above and (value < high if interval[-1] == ")" else value <= high)

    words = {"(-inf, inf)": "", "(0, inf)": " above 0", "[0, inf)": " from 0"}
    return Rule(valid, of + words.get(interval, f" in {interval}"))


def optional(rule: Rule) -> Rule:
    """The same, or None."""
    return Rule(lambda value: value is None or rule.valid(value), f"{rule.accepted}, or null", rule.names)


def list_of(rule: Rule, accepted: str) -> Rule:
    """A list of such values, ``accepted`` in words."""
    return Rule(lambda value: isinstance(value, list | tuple) and all(map(rule.valid, value)), accepted)


def mapping_to(rule: Rule, accepted: str) -> Rule:
    """A mapping to such values, ``accepted`` in words."""
    return Rule(lambda value: isinstance(value, dict) and all(map(rule.valid, value.values())), accepted)


TEXT = Rule(lambda value: isinstance(value, str) and value != "", "a text that is not empty")
SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")


def one_line(error: BaseException) -> str:
    """An error's type and message, shortened, for the end of another message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
