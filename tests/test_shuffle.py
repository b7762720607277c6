"""The shuffle without a list: it is a permutation, entered anywhere, and no worse mixed than a list would be."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from gptvae_cli.noise import Purpose, stream
from gptvae_cli.shuffle import Ints, shuffled


def order(count: int, seed: int = 0) -> Ints:
    return shuffled(np.arange(count), count, stream(seed, Purpose.ORDER))


@pytest.mark.parametrize("count", [*range(1, 40), 63, 64, 65, 99, 100, 101, 1023, 4096, 10_007, 99_856, 99_857])
def test_every_row_has_exactly_one_place(count: int) -> None:
    """Also around squares, where the two halves of a number change their sizes."""
    for seed in range(3):
        assert np.array_equal(np.sort(order(count, seed)), np.arange(count))


def test_any_part_of_the_order_is_that_part_of_the_whole() -> None:
    whole = order(5000)
    for places in (np.arange(1234, 2345), np.array([4999, 0, 17]), np.array([], dtype=np.int64)):
        assert shuffled(places, 5000, stream(0, Purpose.ORDER)).tolist() == whole[places].tolist()


def test_an_order_is_a_function_of_its_key() -> None:
    assert np.array_equal(order(1000, seed=1), order(1000, seed=1))
    # Of two random orders of many rows, one row is expected in the same place.
    assert (order(1000, seed=1) == order(1000, seed=2)).sum() < 10


def test_all_orders_of_four_rows_come_equally_often() -> None:
    """Chi-square with 23 degrees of freedom: 49.7 is exceeded once in a thousand tries, and the seeds are fixed."""
    tries = 4800
    counts = Counter(tuple(order(4, seed).tolist()) for seed in range(tries))
    expected = tries / 24
    assert sum((counts[one] - expected) ** 2 / expected for one in permutations(range(4))) < 49.7


@pytest.mark.parametrize("count", [97, 1000])
def test_rows_spread_evenly_over_the_places(count: int) -> None:
    """Where rows 0 and 1 come, and how far apart, in ten parts of the order; 9 degrees of freedom, 27.9 is one in a
    thousand. A weak hash would keep neighbours together."""
    tries = 2000
    places = np.array([np.argsort(order(count, seed))[:2] for seed in range(tries)])
    for values in (places[:, 0], places[:, 1], (places[:, 1] - places[:, 0]) % count):
        found = np.histogram(values, bins=np.linspace(0, count, 11))[0]
        sizes = np.histogram(np.arange(count), bins=np.linspace(0, count, 11))[0]
        expected = tries * sizes / count
        assert ((found - expected) ** 2 / expected).sum() < 27.9


def test_neighbours_are_not_correlated() -> None:
    rows = order(100_000).astype(float)
    for lag in (1, 2, 100, 317):  # 317 rows wide is the first half of a number
        correlation = np.corrcoef(rows[:-lag], rows[lag:])[0, 1]
        assert abs(correlation) < 5 / len(rows) ** 0.5


def test_a_trillion_rows_take_no_memory() -> None:
    count = 10**12
    rows = shuffled(np.arange(count - 1000, count), count, stream(0, Purpose.ORDER))
    assert len(set(rows.tolist())) == 1000
    assert 0 <= rows.min() < count / 50
    assert count - count / 50 < rows.max() < count
