"""The order of prepared rows: a permutation that needs no memory, and looks random."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nt_hf.data.prepared import shuffled


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 3000), key=st.text(max_size=8))
def test_shuffling_is_a_bijection(count, key):
    order = shuffled(np.arange(count), count, key)
    assert sorted(order.tolist()) == list(range(count))


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 2**62 - 1), data=st.data())
def test_shuffling_of_many_rows_stays_within_them(count, data):
    places = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=50))
    order = shuffled(np.array(sorted(places)), count, "0/0").tolist()
    assert len(set(order)) == len(places) and all(0 <= row < count for row in order)


def test_shuffling_is_the_same_everywhere():
    assert shuffled(np.arange(10), 10, "0/0").tolist() == [7, 5, 4, 9, 6, 1, 2, 0, 3, 8]
    assert shuffled(np.array([0, 1, 2**40]), 10**15, "7/3").tolist() == [
        129369076264514,
        748725059155142,
        584271139071481,
    ]
    places = np.arange(100)
    assert shuffled(places[40:50], 100, "x").tolist() == shuffled(places, 100, "x")[40:50].tolist()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 10, 30, 100])
def test_small_shuffles_look_random(count):
    """Over many epochs: each row at each place as often, neighbours no more often than by chance, no order twice."""
    epochs = 1000
    orders = np.stack([shuffled(np.arange(count), count, f"0/{epoch}") for epoch in range(epochs)])
    seen = np.stack([(orders == row).sum(0) for row in range(count)])  # [row, place]
    expected = epochs / count
    squares = ((seen - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2
    assert abs(squares - freedom) < 5 * np.sqrt(2 * freedom), "chi-squared of rows by places"
    kept = (np.diff(orders, axis=1) == 1).sum()  # a row followed by the one after it: (n - 1) pairs at 1 / n each
    mean = epochs * (count - 1) / count
    assert abs(kept - mean) < 5 * np.sqrt(mean)
    if count >= 10:
        assert len({tuple(order) for order in orders.tolist()}) == epochs or count == 10
    if count <= 4:  # every order as often
        found = collections.Counter(map(tuple, orders.tolist()))
        possible = np.prod(range(1, count + 1))
        assert len(found) == possible
        assert all(abs(n - epochs / possible) < 5 * np.sqrt(epochs / possible) for n in found.values())


def test_large_shuffles_look_random():
    count = 100_000
    first, second = (shuffled(np.arange(count), count, key) for key in ("0/0", "0/1"))
    for order in (first, second, np.argsort(first)[second]):  # the last: from one epoch's order to the next one's
        assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 5 / np.sqrt(count)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / np.sqrt(count)
        assert (np.abs(np.diff(order)) == 1).sum() < 20  # 2 by chance
        assert (order == np.arange(count)).sum() < 20  # 1 by chance
