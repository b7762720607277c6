"""Schedules, as tables of progress and factor; and what is in force at one moment of a run, which may be treated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptvae_cli.config import STOCK_RECIPE, TrainConfig
from gptvae_cli.schedule import Recipe, dropout_shares, learning_rate_factor, ramp, recipe, treated

PLAIN = TrainConfig(target_rate=0.0, bag_of_words=0.0, kl_warmup=0.1)
"""The evidence lower bound alone."""


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


def test_a_treatment_starts_the_schedules_over_on_what_is_left() -> None:
    plan = replace(PLAIN, word_dropout=0.2)
    assert recipe(plan, 0.6) == Recipe(plan, 0.6)
    half_way = recipe(plan, 0.6, 0.2)
    assert half_way.config == treated(plan)
    assert half_way.progress == pytest.approx(0.5)
    begun, ended = recipe(plan, 0.2, 0.2), recipe(plan, 1.0, 0.2)
    assert (begun.weights.beta, begun.word_dropout, begun.beta_is_final) == (0, 0.4, False)
    assert (ended.weights.beta, ended.word_dropout, ended.beta_is_final) == (1, 0, True)
    assert (begun.weights.bag_of_words, ended.weights.bag_of_words) == (1, 0)


def test_a_treatment_doubles_the_bag_of_words_that_did_not_do() -> None:
    """And makes it 1 at least."""
    assert treated(TrainConfig()).bag_of_words == 2 * TrainConfig().bag_of_words
    assert treated(TrainConfig(bag_of_words=0.3)).bag_of_words == 1
    assert treated(TrainConfig(bag_of_words=0.0)).bag_of_words == 1


def test_a_treatment_keeps_to_a_rate_that_was_asked_for() -> None:
    assert treated(TrainConfig(target_rate=2.0)).target_rate == 2
    assert treated(TrainConfig(target_rate=0.0)).target_rate == 8


@pytest.mark.parametrize("plan", [PLAIN, TrainConfig(), TrainConfig(target_rate=20.0, word_dropout=0.9, kl_warmup=1.0)])
def test_a_treatment_is_never_less_of_a_remedy_than_the_run_had(plan: TrainConfig) -> None:
    new = treated(plan)
    for name in ("target_rate", "bag_of_words", "word_dropout", "kl_warmup"):
        assert getattr(new, name) >= getattr(plan, name)
    assert new != plan


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.3, 0.55, 1.0])
def test_an_untreated_run_has_the_schedules_of_its_configuration(progress: float) -> None:
    plan = TrainConfig(vae_kl_loss_weight=0.5, word_dropout=0.3)
    now = recipe(plan, progress)
    assert now.weights.beta == pytest.approx(0.5 * min(1, progress / 0.3))
    assert now.weights.rate == 8
    assert now.weights.bag_of_words == pytest.approx(max(0, 1 - progress / 0.6))
    assert now.word_dropout == pytest.approx(max(0, 0.3 * (1 - 2 * progress)))
    assert now.latents_dropout == pytest.approx(max(0.1, 0.5 - 0.8 * progress))


@pytest.mark.parametrize(
    ("share", "first"), [(0.0, 0.0), (0.02, 0.1), (0.1, 0.5), (0.3, 0.5), (0.5, 0.5), (0.8, 0.8), (1.0, 1.0)]
)
def test_more_latents_are_dropped_at_first_up_to_a_half(share: float, first: float) -> None:
    plan = TrainConfig(latents_dropout_prob=share)
    shares = [recipe(plan, progress).latents_dropout for progress in (0.0, 0.25, 0.5, 1.0)]
    assert shares == pytest.approx([first, (first + share) / 2, share, share])


def test_the_stock_recipe_drops_as_many_throughout() -> None:
    plan = TrainConfig(**STOCK_RECIPE | {"objective": "stock", "latents_dropout_prob": 0.1})
    assert {recipe(plan, progress).latents_dropout for progress in (0.0, 0.4, 1.0)} == {0.1}
