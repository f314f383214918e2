"""Schedules by value."""

import pytest

from nt_hf.sparsity.schedules import SCHEDULES, last_update, update_due


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # at steps 0, 10 (start), 15, 20, 30 (end), 99
        ("constant", [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ("linear", [0.5, 0.5, 0.4, 0.3, 0.1, 0.1]),
        ("cosine", [0.5, 0.5, 0.3 + 0.2 * 0.5**0.5, 0.3, 0.1, 0.1]),
        ("cubic", [0.5, 0.5, 0.1 + 0.4 * 27 / 64, 0.15, 0.1, 0.1]),
    ],
)
def test_values(name, values):
    assert [SCHEDULES[name](step, 10, 30, 0.5, 0.1) for step in (0, 10, 15, 20, 30, 99)] == pytest.approx(values)


@pytest.mark.parametrize("name", ["linear", "cosine", "cubic"])
def test_an_empty_window_jumps_to_the_last_value(name):
    assert [SCHEDULES[name](step, 10, 10, 0.5, 0.1) for step in (9, 10, 11)] == pytest.approx([0.5, 0.1, 0.1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_may_rise(name):
    values = [SCHEDULES[name](step, 0, 10, 0.0, 1.0) for step in range(11)]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("interval", "start", "end", "steps"),
    [
        (10, 0, 50, [10, 20, 30, 40]),  # not at the end: a weight grown last would stay 0
        (10, 20, 31, [20, 30]),
        (10, 0, 7.5, []),
        (7, 0, 22, [7, 14, 21]),
        (1, 0, 4, [1, 2, 3]),
        (0, 0, 50, []),
    ],
)
def test_updates_are_due(interval, start, end, steps):
    assert [step for step in range(60) if update_due(step, interval, start, end)] == steps
    assert last_update(interval, start, end) == (steps[-1] if steps else None)
