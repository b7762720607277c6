"""Bootstrap intervals, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from gptvae_cli.bootstrap import Floats, Sums, intervals, of_share, totals


def columns(count: int = 60) -> dict[str, Floats]:
    random = np.random.default_rng(3)
    kl_N = random.gamma(4, 2, count)
    return {"nats": random.normal(30, 8, count), "kl": kl_N, "saved": 0.7 * kl_N + random.normal(0, 1, count)}


def ratios(sums: Sums) -> dict[str, float]:
    return {"mean": sums["nats"] / 60, "efficiency": sums["saved"] / sums["kl"]}


def test_intervals_are_those_of_scipy() -> None:
    """Of a mean, and of a ratio whose parts are drawn together: the same resamples, so the very same ends."""
    table = columns()
    found = intervals(table, ratios, resamples=500, seed=7)
    mean = scipy.stats.bootstrap(
        (table["nats"],), np.mean, n_resamples=500, method="percentile", rng=np.random.default_rng(7)
    )
    ratio = scipy.stats.bootstrap(
        (table["saved"], table["kl"]),
        lambda saved, kl, axis: saved.sum(axis) / kl.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=500,
        method="percentile",
        rng=np.random.default_rng(7),
    )
    assert found["mean"] == pytest.approx(tuple(mean.confidence_interval), rel=1e-9)
    assert found["efficiency"] == pytest.approx(tuple(ratio.confidence_interval), rel=1e-9)


def test_an_interval_of_a_mean_is_near_that_of_the_normal_distribution() -> None:
    values_N = np.random.default_rng(0).normal(5, 2, 4000)
    low, high = intervals({"x": values_N}, lambda sums: {"mean": sums["x"] / 4000})["mean"]
    half = 1.96 * values_N.std() / np.sqrt(4000)
    assert (low, high) == pytest.approx((values_N.mean() - half, values_N.mean() + half), abs=0.1 * half)


def test_the_seed_decides_and_totals_are_sums() -> None:
    table = columns()
    assert intervals(table, ratios, resamples=50) == intervals(table, ratios, resamples=50)
    assert intervals(table, ratios, resamples=50) != intervals(table, ratios, resamples=50, seed=1)
    assert totals(table) == {name: pytest.approx(sum(column)) for name, column in table.items()}


@pytest.mark.parametrize(("hits", "count"), [(0, 1000), (1, 1000), (57, 1000), (40, 40), (38, 40), (1, 1), (0, 1)])
def test_intervals_of_shares_are_those_of_scipy(hits: int, count: int) -> None:
    expected = scipy.stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    found = of_share(hits, count)
    assert found == pytest.approx(tuple(expected), abs=1e-12)
    assert (found[0] == 0, found[1] == 1) == (hits == 0, hits == count)
