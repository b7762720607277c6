"""Schedules, as tables of progress and factor."""

from __future__ import annotations

import pytest

from gptvae_cli.schedule import dropout_shares, learning_rate_factor, ramp


@pytest.mark.parametrize(
    ("progress", "warmup", "decay", "factor"),
    [
        (0.0, 0.1, 0.3, 0.0),  # starts at rest
        (0.05, 0.1, 0.3, 0.5),  # half of the warm-up
        (0.1, 0.1, 0.3, 1.0),
        (0.4, 0.1, 0.3, 1.0),  # the plateau
        (0.7, 0.1, 0.3, 1.0),
        (0.85, 0.1, 0.3, 0.5),  # half of the decay
        (1.0, 0.1, 0.3, 0.0),  # ends at rest
        (0.0, 0.0, 0.3, 1.0),  # no warm-up
        (1.0, 0.1, 0.0, 1.0),  # no decay
        (0.0, 0.0, 0.0, 1.0),
        (1.0, 0.0, 0.0, 1.0),
        (0.5, 1.0, 0.0, 0.5),  # nothing but warm-up
        (0.5, 0.0, 1.0, 0.5),  # nothing but decay
        (0.5, 1.0, 1.0, 0.5),  # the two meet: the smaller counts
        (0.25, 0.8, 0.8, 0.3125),
        (0.75, 0.8, 0.8, 0.3125),
        (1.1, 0.1, 0.3, 0.0),  # a last step may end after the time is up
        (1.1, 0.1, 0.0, 1.0),
        (-0.1, 0.1, 0.3, 0.0),
    ],
)
def test_learning_rate_is_a_trapezoid(progress: float, warmup: float, decay: float, factor: float) -> None:
    assert learning_rate_factor(progress, warmup=warmup, decay=decay) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("progress", "until", "factor"),
    [
        (0.0, 0.3, 0.0),
        (0.15, 0.3, 0.5),
        (0.3, 0.3, 1.0),
        (1.0, 0.3, 1.0),
        (1.2, 0.3, 1.0),
        (-0.1, 0.3, 0.0),
        (0.0, 0.0, 1.0),  # no ramp at all
        (1.0, 1.0, 1.0),
    ],
)
def test_beta_rises_and_stays(progress: float, until: float, factor: float) -> None:
    assert ramp(progress, until) == pytest.approx(factor)


def test_dropout_begins_with_the_third_pass_is_whole_with_the_ninth_and_grows_to_three_times() -> None:
    passes = (0.0, 2.0, 3.5, 5.0, 8.0, 20.0, 32.0, 100.0)
    shares = [dropout_shares(0.1, epochs, 1.0).blocks for epochs in passes]
    assert shares == pytest.approx([0, 0, 0.025, 0.05, 0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize(
    ("weights_per_token", "shares"),
    [
        (9.0, [0, 0, 0.15, 0.3, 0.6, 0.6]),
        (2.0, [0, 0, 0.15, 0.3, 0.6, 0.6]),
        (1.0, [0, 0, 0.15, 0.3, 0.3, 0.3]),
        (0.25, [0, 0, 0.075, 0.075, 0.075, 0.075]),
    ],
)
def test_dropout_of_the_ends_grows_to_six_times_but_to_less_where_embeddings_hold_little(
    weights_per_token: float, shares: list[float]
) -> None:
    found = [dropout_shares(0.1, epochs, weights_per_token).ends for epochs in (0.0, 2.0, 7.5, 13.0, 24.0, 1000.0)]
    assert found == pytest.approx(shares)


def test_no_more_than_six_tenths_is_dropped_of_the_ends() -> None:
    most = [dropout_shares(dropout, 1000.0, 5.0).ends for dropout in (0.0, 0.05, 0.1, 0.9)]
    assert most == pytest.approx([0, 0.3, 0.6, 0.6])


@pytest.mark.parametrize(("dropout", "most"), [(0.0, 0.0), (0.1, 0.3), (0.2, 0.5), (0.5, 0.5), (0.8, 0.8)])
def test_no_more_than_half_is_dropped_of_blocks_unless_that_was_asked_for(dropout: float, most: float) -> None:
    assert dropout_shares(dropout, 1000.0, 1.0).blocks == pytest.approx(most)
