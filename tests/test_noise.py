"""Noise: the same for the same name, and unrelated for any other. The shuffle without a list: a permutation, entered
anywhere, and no worse mixed than a list would be."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, islice, permutations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import kstest

from gptvae_cli.noise import (
    Ints,
    Purpose,
    latent_noise,
    row_bits,
    row_normals,
    row_uniforms,
    shuffled,
    stream,
    token_uniforms,
)


def uniforms(seed: int, row: int, copy: int, count: int) -> npt.NDArray[np.float64]:
    return np.fromiter(islice(token_uniforms(seed, row, copy), count), np.float64)


def test_noise_does_not_depend_on_what_was_drawn_before() -> None:
    first = latent_noise(7, 3, 1, 16)
    for row in range(5):
        latent_noise(7, row, 0, 16)
        np.random.default_rng(row).random()
    assert (latent_noise(7, 3, 1, 16) == first).all()


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000])
def test_a_longer_draw_starts_with_a_shorter_one(count: int) -> None:
    """So that a longer limit on a text continues it instead of changing it."""
    assert (stream(5, Purpose.TOKENS, 2, 1).random(2000)[:count] == uniforms(5, 2, 1, count)).all()
    assert (latent_noise(5, 2, 1, 2000)[:count] == latent_noise(5, 2, 1, count)).all()


def test_no_two_names_share_a_number() -> None:
    """Rows and copies that are swapped, neighbours, purposes, and seeds beyond 32 bits."""
    names = [
        (seed, purpose, major, minor)
        for seed in (0, 1, 2**32, 2**63 - 1)
        for purpose in Purpose
        for major, minor in ((0, 0), (0, 1), (1, 0), (1, 1), (2**40, 0), (0, 2**40))
    ]
    draws = {name: stream(*name).integers(2**63, size=200).tolist() for name in names}
    for first, second in combinations(names, 2):
        assert not set(draws[first]) & set(draws[second]), (first, second)


@pytest.mark.parametrize("row", [0, 1, 10**9])
def test_latents_and_tokens_of_a_row_are_streams_of_their_own(row: int) -> None:
    latent = stream(3, Purpose.LATENT, row, 2).standard_normal(8, dtype=np.float32)
    assert (latent_noise(3, row, 2, 8) == latent).all()
    tokens = stream(3, Purpose.TOKENS, row, 2).random(8)
    assert (uniforms(3, row, 2, 8) == tokens).all()


def test_latents_are_standard_normal() -> None:
    """Across rows, as a batch meets them: mean, variance, and fourth moment (3 for a Gaussian)."""
    noise = np.stack([latent_noise(0, row, 0, 32) for row in range(2000)]).astype(np.float64)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1) < 0.03
    assert abs((noise**4).mean() - 3) < 0.15
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.02


def test_uniforms_fill_the_unit_interval() -> None:
    noise = np.stack([uniforms(0, row, 0, 20) for row in range(2000)]).ravel()
    assert ((noise >= 0) & (noise < 1)).all()
    counts = np.histogram(noise, bins=20, range=(0, 1))[0]
    assert (((counts - 2000) ** 2) / 2000).sum() < 43.8  # chi-square, 19 degrees of freedom, one in a thousand


def test_a_seed_keeps_its_numbers() -> None:
    """What `--seed 7` named in one release it names in the next."""
    assert latent_noise(7, 1, 2, 3).tolist() == pytest.approx([-0.6322232, 0.5623785, -0.6278022], abs=1e-6)
    assert uniforms(7, 1, 2, 3).tolist() == pytest.approx(
        [0.8262336524306, 0.3099374374548, 0.3596261131781], abs=1e-12
    )


def test_noise_has_the_width_and_type_that_tensors_want() -> None:
    assert latent_noise(0, 0, 0, 5).dtype == np.float32
    assert latent_noise(0, 0, 0, 0).shape == (0,)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 1930])
def test_rows_of_a_step_are_read_off_one_stream_at_their_places(width: int) -> None:
    whole = stream(3, Purpose.TRAINING_DROP, 7).random((20, -(-width // 8) * 8), dtype=np.float32)[:, :width]
    assert (row_uniforms(3, Purpose.TRAINING_DROP, 7, range(20), width) == whole).all()
    assert (row_uniforms(3, Purpose.TRAINING_DROP, 7, range(13, 17), width) == whole[13:17]).all()


@pytest.mark.parametrize("width", [1, 15, 16, 17, 1930])
def test_whole_numbers_of_a_step_are_read_off_one_stream_at_their_places(width: int) -> None:
    whole = stream(3, Purpose.TRAINING_DROP, 7).integers(2**16, size=(20, -(-width // 16) * 16), dtype=np.uint16)
    assert (row_bits(3, Purpose.TRAINING_DROP, 7, range(20), width) == whole[:, :width]).all()
    assert (row_bits(3, Purpose.TRAINING_DROP, 7, range(13, 17), width) == whole[13:17, :width]).all()


def test_normal_numbers_of_a_row_do_not_depend_on_its_neighbours() -> None:
    whole = row_normals(3, Purpose.TRAINING_LATENT, 7, range(20), 33)
    assert (row_normals(3, Purpose.TRAINING_LATENT, 7, range(19, 20), 33) == whole[19:]).all()
    assert not (row_normals(3, Purpose.TRAINING_LATENT, 8, range(20), 33) == whole).any()


def test_normal_numbers_of_rows_are_normal_and_unrelated() -> None:
    """Quantiles beside scipy's, and every number of a row beside every other: two are made of each pair."""
    noise = row_normals(0, Purpose.TRAINING_LATENT, 0, range(20_000), 6)
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    assert np.abs(np.corrcoef(np.concatenate([noise, noise**2], axis=1).T) - np.eye(12)).max() < 0.03
    assert np.abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.02


# An order of rows -----------------------------------------------------------------------------------------------------


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
