"""Schedules as pure functions of the step.

A schedule goes from ``first`` at step ``start`` to ``last`` at step ``end`` and is flat outside. A new one is one
function and one line in `SCHEDULES`.
"""

import math
from collections.abc import Callable


def _progress(step: float, start: float, end: float) -> float:
    """How far ``step`` lies between ``start`` (0) and ``end`` (1)."""
    if end <= start:
        return float(step >= end)
    return min(max((step - start) / (end - start), 0.0), 1.0)


def constant(step: float, start: float, end: float, first: float, last: float) -> float:
    """``first``, always."""
    return first


def linear(step: float, start: float, end: float, first: float, last: float) -> float:
    """A straight line from ``first`` to ``last``."""
    return first + (last - first) * _progress(step, start, end)


def cosine(step: float, start: float, end: float, first: float, last: float) -> float:
    """Half a cosine from ``first`` to ``last`` (Dettmers & Zettlemoyer 2019; RigL, Evci et al. 2020, section 3)."""
    return last + (first - last) * (1 + math.cos(math.pi * _progress(step, start, end))) / 2


def cubic(step: float, start: float, end: float, first: float, last: float) -> float:
    """A cubic curve, steep at first and flat at the end (gradual magnitude pruning, Zhu & Gupta 2017, eq. 1)."""
    return last + (first - last) * (1 - _progress(step, start, end)) ** 3


SCHEDULES: dict[str, Callable[[float, float, float, float, float], float]] = {
    "constant": constant,
    "cosine": cosine,
    "cubic": cubic,
    "linear": linear,
}


def update_due(step: int, interval: int, start: float, end: float) -> bool:
    """Whether step number ``step`` (the first is 1) updates the masks: every ``interval`` steps in [start, end).

    ``interval=0`` never updates. The end is outside: a weight grown at the last step would stay 0 for nothing.
    """
    return interval > 0 and step > 0 and step % interval == 0 and start <= step < end


def last_update(interval: int, start: float, end: float) -> int | None:
    """The last step for which [`update_due`] is true, ``None`` if there is none."""
    if interval <= 0:
        return None
    step = (math.ceil(end) - 1) // interval * interval
    return step if update_due(step, interval, start, end) else None
