"""What a run trains with at one moment: its own recipe, or that of a treatment (`doctor.py`).

Everything here is a pure function of the configuration, the progress and the moment of the treatment, so that a
resumed run goes on with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gptvae_cli.config import TrainConfig
from gptvae_cli.objective import Weights
from gptvae_cli.schedule import ramp

UNTREATED = math.inf
"""The progress at which a treatment began, where there was none."""


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
