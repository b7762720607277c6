"""What is in force at one moment of a run: by its configuration, and by a treatment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gptvae_cli.config import STOCK_RECIPE, TrainConfig
from gptvae_cli.recipe import Recipe, recipe, treated

PLAIN = TrainConfig(target_rate=0.0, bag_of_words=0.0, kl_warmup=0.1)
"""The evidence lower bound alone."""


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
