"""The collapse doctor: what it calls a disease, when it treats, and that the treatment works."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptvae_cli.config import STOCK_RECIPE, DataConfig, TrainConfig, from_dict
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import Rows
from gptvae_cli.doctor import (
    LATEST,
    YOUNG_STEPS,
    advice,
    decline,
    diagnosis,
    treatable,
    treatment,
    verdict,
)
from gptvae_cli.evaluation import Figures
from gptvae_cli.learner import Learner, counters_dict
from gptvae_cli.model import GPTVAE
from gptvae_cli.schedule import UNTREATED
from gptvae_cli.training import StepReport, train
from tests.test_training import SENTENCES, shape

pytestmark = pytest.mark.usefixtures("one_thread")

HEALTHY = Figures(
    texts=1000,
    tokens=10_000,
    cross_entropy=20.0,
    cross_entropy_shuffled=25.0,
    cross_entropy_without=24.0,
    kl=8.0,
    mutual_information=6.0,
    active_001=8,
    active_02=4,
    entropy=math.log(1000),
)
COLLAPSING = {"target_rate": 0.0, "bag_of_words": 0.0, "kl_warmup": 0.1, "dropout": 0.0}
"""The evidence lower bound alone, and nothing that keeps a model from learning ten sentences by heart."""


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 300, "max_time": None, "batch_tokens": 128, "lr": 5e-3, **COLLAPSING, **changes})


# Diagnosis ------------------------------------------------------------------------------------------------------------


def test_a_latent_that_tells_texts_apart_and_is_listened_to_is_well() -> None:
    assert diagnosis(HEALTHY, TrainConfig()) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mutual_information": 0.4}, "it carries 0.40 nats"),
        ({"cross_entropy_shuffled": 20.25}, "another text's does as well, within 0.25 nats"),
        # A budget that is spent carries nothing by itself, and dimensions that move a little are not a use of z.
        ({"mutual_information": 0.9, "kl": 30.0, "active_001": 32}, "it carries 0.90 nats"),
    ],
)
def test_a_latent_that_says_nothing_or_is_not_heard_is_not(changes: dict[str, Any], words: str) -> None:
    found = diagnosis(replace(HEALTHY, **changes), TrainConfig())
    assert found is not None
    assert words in found


@pytest.mark.parametrize(("texts", "carried", "ill"), [(2, 0.69, False), (2, 0.3, True), (5, 1.2, False)])
def test_few_texts_cannot_show_a_nat(texts: int, carried: float, ill: bool) -> None:
    """ln 2 is 0.69: all that there is to know about two texts."""
    found = replace(HEALTHY, texts=texts, mutual_information=carried, entropy=math.log(texts))
    assert (diagnosis(found, TrainConfig()) is not None) == ill


@pytest.mark.parametrize("texts", [1, 3])
def test_one_text_shows_nothing_nor_do_equal_ones(texts: int) -> None:
    same = HEALTHY.cross_entropy
    alike = replace(HEALTHY, texts=texts, mutual_information=0.0, cross_entropy_shuffled=same, entropy=0.0)
    assert diagnosis(alike, TrainConfig()) is None
    assert "cannot be told from one held-out text, or from equal ones" in verdict(alike, TrainConfig())


@pytest.mark.parametrize(("rate", "ill"), [(0.0, True), (8.0, True), (2.0, True), (1.0, False), (1.9, True)])
def test_a_latent_that_may_carry_little_is_well_where_it_carries_that(rate: float, ill: bool) -> None:
    """At a rate of 1 no latent carries a nat; half of the rate is enough, of information and of what is heard."""
    little, unheard = replace(HEALTHY, mutual_information=0.72), replace(HEALTHY, cross_entropy_shuffled=20.72)
    for figures in (little, unheard):
        assert (diagnosis(figures, TrainConfig(target_rate=rate)) is not None) == ill
    assert verdict(little, TrainConfig(target_rate=rate)).startswith("collapsed" if ill else "the latent carries 0.7")
    nearly = replace(HEALTHY, mutual_information=0.49)
    assert diagnosis(nearly, TrainConfig(target_rate=1.0)) is not None


# When it treats -------------------------------------------------------------------------------------------------------


def test_it_treats_while_there_is_time_and_not_over_its_own_beginning() -> None:
    plan = config(on_collapse="treat")
    assert treatable(plan, 15, 0.05, UNTREATED)
    assert treatable(plan, 210, LATEST, UNTREATED), "a validation falls on it"
    assert not treatable(plan, 300, LATEST + 0.01, UNTREATED)
    assert not treatable(plan, 30, 0.1, 0.05), "beta is still on its way"
    assert treatable(plan, 150, 0.5, 0.05)
    assert not treatable(replace(plan, on_collapse="warn"), 15, 0.05, UNTREATED)


def test_a_recipe_with_the_remedies_is_given_its_time() -> None:
    """Starting over before the decoder can have begun to listen costs likelihood and helps nobody."""
    default = TrainConfig()
    assert not treatable(default, YOUNG_STEPS, 0.05, UNTREATED)
    assert not treatable(default, YOUNG_STEPS, 0.29, UNTREATED)
    assert not treatable(default, YOUNG_STEPS - 1, 0.3, UNTREATED)
    assert treatable(default, YOUNG_STEPS, 0.3, UNTREATED)
    for name in ("kl_warmup", "target_rate"):
        assert treatable(from_dict(TrainConfig, {name: 0.0}), 15, 0.05, UNTREATED), name
    assert not treatable(TrainConfig(bag_of_words=0.0), 50, 0.05, UNTREATED), "which is no more ill without a bag"


def test_the_stock_recipe_is_left_alone() -> None:
    """It is there to be compared with."""
    assert not treatable(TrainConfig(**STOCK_RECIPE), YOUNG_STEPS, 0.5, UNTREATED)


def test_a_treatment_says_what_it_does() -> None:
    plan = TrainConfig(target_rate=2.0)
    assert "the first 2 nats" in treatment(plan, again=False)
    assert "over from 0" in treatment(plan, again=False)
    assert "over once more from 0" in treatment(plan, again=True)


# In a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(SENTENCES))
    corpus = Corpus.build([str(path)], DataConfig(tokenizer="bytes", valid=str(path)), tmp_path / "cache")
    return Rows(corpus.train, shape(), window=False)


def learner_of(plan: TrainConfig) -> Learner:
    torch.manual_seed(0)
    return Learner(GPTVAE.from_config(shape()), plan)


def run(learner: Learner, rows: Rows) -> list[StepReport]:
    return list(train(learner, rows, rows, dtype=torch.float32))


def test_it_saves_a_run_that_otherwise_collapses(rows: Rows) -> None:
    """Ten sentences are learnt by heart; the evidence lower bound alone does it without a latent."""
    warned, helped = (run(learner_of(config(on_collapse=way)), rows) for way in ("warn", "treat"))
    for reports in (warned, helped):
        early = [report for report in reports if report.progress <= 0.1 and report.diagnosis]
        assert early, "it is said within the first tenth"
    assert not any(report.treatment for report in warned)
    assert [report.step for report in helped if report.treatment] == [15]
    assert warned[-1].figures is not None
    assert helped[-1].figures is not None
    assert warned[-1].diagnosis is not None
    assert warned[-1].figures.mutual_information < 0.2
    assert helped[-1].diagnosis is None
    assert helped[-1].figures.mutual_information == pytest.approx(math.log(10), abs=0.4)
    assert helped[-1].figures.cross_entropy_shuffled > helped[-1].figures.cross_entropy + 3


def test_a_treatment_outlives_a_pause(rows: Rows) -> None:
    """The beginning of the treatment is in the state, and so are the moments of a bag of words that only it needs."""
    plan = config(steps=40)
    whole = learner_of(plan)
    expected = run(whole, rows)
    assert [report.step for report in expected if report.treatment] == [2, 16, 24], (
        "none of them takes in so short a run"
    )
    told = [report.treatment for report in expected if report.treatment]
    assert ["once more" in each for each in told] == [False, True, True]
    for pause in (1, 2, 9):
        first = learner_of(plan)
        steps = 0

        def stop(pause: int = pause) -> bool:
            nonlocal steps
            steps += 1
            return steps == pause

        list(train(first, rows, rows, dtype=torch.float32, should_stop=stop))
        tensors = {name: tensor.clone() for name, tensor in first.tensors().items()}
        second = learner_of(plan)
        second.restore(tensors, counters_dict(first.counters))
        list(train(second, rows, rows, dtype=torch.float32))
        for name, tensor in whole.tensors().items():
            assert torch.equal(second.tensors()[name], tensor), (pause, name)


def test_the_best_model_is_one_of_the_treatment(rows: Rows) -> None:
    """Before it the latent was not being used."""
    reports = run(learner_of(config()), rows)
    (began,) = [report.progress for report in reports if report.treatment]
    best = [report.progress for report in reports if report.improved]
    assert best
    assert min(best) >= began + 0.3 * (1 - began)


def test_a_treatment_that_fails_does_not_cost_the_model_from_before(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one whose latent is not heard replace it, however likely it finds the texts."""
    ill = replace(HEALTHY, cross_entropy=1.0, cross_entropy_shuffled=1.0)
    found = [HEALTHY, HEALTHY, HEALTHY, *[ill] * 8]
    monkeypatch.setattr("gptvae_cli.training.measure", lambda *args, **options: found.pop(0))
    reports = run(learner_of(config(steps=40)), rows)
    assert next(report.step for report in reports if report.treatment) == 12
    assert [report.step for report in reports if report.improved] == [4]


# Words ----------------------------------------------------------------------------------------------------------------


def test_the_verdict_says_what_the_latent_carries() -> None:
    text = verdict(HEALTHY, TrainConfig())
    assert text == (
        "the latent carries 6.0 nats of information per text, of the 6.9 that 1,000 texts can show at most;"
        " for a KL of 8.0 it lowers the cross-entropy from 24.0 to 20.0"
    )


def test_the_verdict_does_not_praise_information_of_which_the_decoder_makes_little() -> None:
    text = verdict(replace(HEALTHY, cross_entropy_without=22.9), TrainConfig())
    assert text.endswith(
        "for a KL of 8.0 it lowers the cross-entropy only from 22.9 to 20.0, so the decoder makes little of it yet"
    )


def test_the_verdict_does_not_speak_of_help_where_there_is_none() -> None:
    """A decoder that hardly knows the language may do better without the latent, if worse with another text's."""
    text = verdict(replace(HEALTHY, cross_entropy_without=19.9), TrainConfig())
    assert text.endswith("can show at most; it does not help the decoder yet")


def test_the_verdict_does_not_compare_with_what_was_never_learnt() -> None:
    text = verdict(HEALTHY, TrainConfig(latents_dropout_prob=0.0))
    assert text.endswith("can show at most; for a KL of 8.0 the cross-entropy is 20.0")


def test_the_verdict_calls_a_collapse_a_collapse() -> None:
    text = verdict(replace(HEALTHY, mutual_information=0.034), TrainConfig())
    assert text == "collapsed: the latent carries 0.03 nats of a text, the decoder writes without it"


UNHEARD = replace(HEALTHY, cross_entropy_shuffled=HEALTHY.cross_entropy + 0.4)


def test_the_verdict_does_not_praise_a_latent_that_the_decoder_does_not_hear() -> None:
    assert verdict(UNHEARD, TrainConfig()) == (
        "not used: the latent carries 6.0 nats of a text, but the decoder writes as well from another text's,"
        " within 0.40 nats"
    )


@pytest.mark.parametrize(
    ("figures", "config", "words"),
    [
        (HEALTHY, {}, None),
        (UNHEARD, {"latents_dropout_prob": 1.0}, None),
        (UNHEARD, {}, "--max-time"),
        (replace(HEALTHY, mutual_information=0.5), {}, "--max-time"),
        (UNHEARD, {"on_collapse": "warn"}, "--max-time"),
        (UNHEARD, {"on_collapse": "warn", "bag_of_words": 0.0}, "--max-time"),
        (UNHEARD, {"on_collapse": "warn", "target_rate": 0.0}, "without --on-collapse warn"),
        (UNHEARD, {"objective": "stock", **STOCK_RECIPE}, "without --objective stock"),
    ],
)
def test_a_latent_that_is_not_used_comes_with_advice(
    figures: Figures, config: dict[str, Any], words: str | None
) -> None:
    found = advice(figures, TrainConfig(**config), 1000)
    assert (found is None) if words is None else (found is not None and words in found)


def test_a_run_of_few_steps_is_told_that_they_were_few() -> None:
    """It is not for want of texts."""
    assert advice(UNHEARD, TrainConfig(), 999) == "999 steps are few: train for longer with --max-time"
    assert "more texts" in (advice(UNHEARD, TrainConfig(), 1000) or "")


def test_few_held_out_texts_tell_little() -> None:
    """Nothing of the run, so it is not told to be longer."""
    few = replace(UNHEARD, texts=19, entropy=math.log(19))
    assert advice(few, TrainConfig(), 5000) == "19 held-out texts are too few to tell: --valid 0.2 holds out more"
    assert "held-out" not in (advice(replace(few, texts=20), TrainConfig(), 5000) or "")
    assert advice(replace(few, cross_entropy_shuffled=40.0), TrainConfig(), 5000) is None, "it is used"


def test_a_run_that_got_worse_is_told_so() -> None:
    """By a hundredth of its likelihood at least: held out, 28.00 nats a text, and 28.27 are the same."""
    assert decline(HEALTHY, replace(HEALTHY, kl=8.27), TrainConfig(), 20.0) is None
    assert decline(replace(HEALTHY, kl=9.0), HEALTHY, TrainConfig(), 20.0) is None
    worse = replace(HEALTHY, kl=8.29, cross_entropy_without=1.0)
    assert decline(HEALTHY, worse, TrainConfig(dropout=0.2), 20.0) == (
        "these were at 28.00 nats/text then and at 28.29 at the end of the run; more texts, a shorter run, or another"
        " --dropout than 0.2 may do better"
    )
    young = decline(HEALTHY, worse, TrainConfig(dropout=0.2), 2.0)
    assert young is not None and young.endswith("; a longer run may do better"), "two passes do not overfit"


def test_a_run_got_worse_by_its_own_beta() -> None:
    """That is what the best model has least of."""
    assert decline(HEALTHY, replace(HEALTHY, kl=8.5), TrainConfig(vae_kl_loss_weight=0.1), 20.0) is None
    assert decline(HEALTHY, replace(HEALTHY, kl=12.0), TrainConfig(vae_kl_loss_weight=0.1), 20.0) is not None


def test_without_a_latent_a_run_got_worse_where_the_decoder_did() -> None:
    baseline = TrainConfig(latents_dropout_prob=1.0)
    assert decline(HEALTHY, replace(HEALTHY, kl=99.0), baseline, 20.0) is None
    found = decline(HEALTHY, replace(HEALTHY, cross_entropy_without=25.0), baseline, 20.0)
    assert found is not None
    assert "at 24.00 nats/text then and at 25.00" in found
