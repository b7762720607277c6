"""What a run trains with at one moment: schedules of its own recipe, or of that of a treatment (`doctor.py`).

Everything here is a pure function of the configuration, of how far the run has come and of when it was treated: the
same whether steps or seconds end it, and where it is resumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from gptvae_cli.config import Objective, TrainConfig

UNTREATED = math.inf
"""The progress at which a treatment began, where there was none."""


def learning_rate_factor(progress: float, *, warmup: float, decay: float) -> float:
    """Warm-up, then constant, then linear decay to zero ("trapezoid", arXiv 2405.18392, section 3).

    Args:
        progress: share of the run that is done, in [0, 1].
        warmup: share of the run over which the factor rises from 0 to 1.
        decay: share of the run, at its end, over which it falls to 0.
    """
    return min(ramp(progress, warmup), ramp(1.0 - progress, decay))


def ramp(progress: float, until: float) -> float:
    """Rises linearly from 0 to 1 and stays there from `until` on; 1 throughout where `until` is 0."""
    return 1.0 if until == 0 else min(1.0, max(0.0, progress / until))


class Dropout(NamedTuple):
    """Shares to drop: of what each of the decoder's blocks adds, and of its embedded tokens and last states."""

    blocks: float
    ends: float


def dropout_shares(dropout: float, epochs: float, weights_per_token: float) -> Dropout:
    """What to drop after some passes over a corpus: nothing in the first two, as a text that is new cannot be learnt by
    heart, and dropout then only slows learning; the more often it was seen, the more it helps.

    Of the blocks `dropout` after eight passes, three times as much after thirty-two; never above a half, unless that
    was asked for. On Tatoeba sentences 0.1 costs a decoder alone 0.6 nats a text in 4 passes, and gains it 1.3 in 20;
    on a megabyte of Wikipedia, in 36, 0.3 gains 5.5 more than 0.1 does.

    Of the ends, through which goes what is learnt by heart, past the layers, six times `dropout` after twenty-four
    passes, up to 0.6; but no more than three times as much where the table of embeddings has a weight for every token
    of the corpus, and still less of one that holds less, as of bytes: there is little by heart then, and dropping more
    makes a run of forty minutes worse than one of twenty.

    The encoder is left whole: dropping some of it as well wrote fewer tokens back, at the same likelihood or a worse
    one. All figures are in `tests/benchmarks/latent/`.

    Args:
        dropout: the share of a block after eight passes.
        epochs: passes over the corpus so far.
        weights_per_token: weights of the table of the decoder's embeddings for every token of the corpus.
    """
    blocks = dropout * (ramp(epochs - 2.0, 6.0) + 2.0 * ramp(epochs - 8.0, 24.0))
    ends = dropout * min(6.0 * ramp(epochs - 2.0, 22.0), 3.0 * weights_per_token)
    return Dropout(min(blocks, max(dropout, 0.5)), min(ends, 0.6))


@dataclass(frozen=True)
class Weights:
    """How the terms of the objective are weighed at one moment of a run.

    Args:
        objective: the units, see `TrainConfig`.
        beta: factor of the KL.
        floor: free bits in nats per dimension.
        bag_of_words: factor of the auxiliary loss.
        rate: free bits in nats per text, for all dimensions together.
        language_model: train the decoder without a latent, and nothing else.
    """

    objective: Objective
    beta: float
    floor: float
    bag_of_words: float
    rate: float = 0.0
    language_model: bool = False

    @property
    def have_free_bits(self) -> bool:
        """Whether some of the KL costs nothing."""
        return self.objective == "elbo" and not self.language_model and max(self.floor, self.rate) > 0


@dataclass(frozen=True)
class Recipe:
    """What is in force at one moment of a run.

    Args:
        config: the run's own, or a treatment's.
        progress: share of its schedules that is over; the learning rate alone keeps to the whole run.
    """

    config: TrainConfig
    progress: float

    @property
    def beta_is_final(self) -> bool:
        """Before that, a model cannot be compared with later ones."""
        return self.progress >= self.config.kl_warmup

    @property
    def weights(self) -> Weights:
        """Of the terms of the objective."""
        config = self.config
        return Weights(
            objective=config.objective,
            beta=config.vae_kl_loss_weight * ramp(self.progress, config.kl_warmup),
            floor=config.vae_kl_div_floor,
            rate=config.target_rate,
            bag_of_words=config.bag_of_words * (1 - ramp(self.progress, 0.6)),
            language_model=config.without_latent,
        )

    @property
    def latents_dropout(self) -> float:
        """Share of the rows to train without their latent: at first five times that of the configuration, up to a half.
        While KL costs little, a decoder leaves to the latent what it has to know later (`tests/benchmarks/latent/`)."""
        last = self.config.latents_dropout_prob
        if self.config.objective == "stock":
            return last
        first = max(last, min(0.5, 5 * last))
        return first + (last - first) * ramp(self.progress, 0.5)

    @property
    def word_dropout(self) -> float:
        """Share of the decoder's input tokens to hide."""
        return self.config.word_dropout * (1 - ramp(self.progress, 0.5))


def recipe(config: TrainConfig, progress: float, treated_at: float = UNTREATED) -> Recipe:
    """What is in force when a share of the run is done.

    Args:
        config: of the run.
        progress: share of the run that is done, in [0, 1].
        treated_at: progress at which the last treatment began.
    """
    if treated_at == UNTREATED:
        return Recipe(config, progress)
    return Recipe(treated(config), (progress - treated_at) / (1 - treated_at))


def treated(config: TrainConfig) -> TrainConfig:
    """The recipe of a treatment: never less of a remedy than there was before, and a rate that was asked for stays.

    Free bits take the reason to collapse away (Kingma et al. 2016, arXiv 1606.04934), the bag of words teaches the
    encoder without the decoder (Zhao et al. 2017, arXiv 1703.10960), hidden words make the decoder need a latent and
    beta from 0 lets it find one (Bowman et al. 2016, arXiv 1511.06349; again and again: Fu et al. 2019, arXiv
    1903.10145).
    """
    return replace(
        config,
        kl_warmup=max(config.kl_warmup, 0.3),
        target_rate=config.target_rate or 8.0,
        bag_of_words=max(2 * config.bag_of_words, 1.0),
        word_dropout=max(config.word_dropout, 0.4),
    )
