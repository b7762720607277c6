"""The collapse doctor: notices that a run does not use its latent, and changes the rest of the run so that it will.

A decoder that writes well without a latent gives its encoder nothing to learn from, and the KL then takes away what
little the latent held: this does not mend itself. So the schedules start over on what is left of the run, with beta
at 0, under a recipe that makes the latent worth listening to (`schedule.treated`). At the end of a run it says in a
sentence what came of it (`verdict`), whether it had been better before (`decline`), and what to do where the latent
came to little (`advice`).
"""

from __future__ import annotations

from gptvae_cli.config import TrainConfig
from gptvae_cli.evaluation import Figures
from gptvae_cli.latent import LEAST_NATS, has_collapsed
from gptvae_cli.schedule import UNTREATED, recipe, treated

LATEST = 0.7
"""Share of a run after which a treatment has no time left to work."""
DECLINE = 0.01
"""Share of the likelihood that a run has to lose again to be told of it."""
YOUNG_STEPS = 1000
"""Steps that a recipe with remedies gets to make use of its latent. In runs of 60 to 300 steps a treatment cost 1 to 15
nats of likelihood a text, and no decoder came to listen that did not without (`tests/benchmarks/latent/`)."""

FEW_TEXTS = 20
"""Held-out texts of which a latent can hardly be told to be used or not: information is at most the logarithm of their
number, and another text's latent is one of few."""


def diagnosis(figures: Figures, config: TrainConfig) -> str | None:
    """What is wrong with the use of the latent on held-out texts, in words; None where nothing is, and where texts are
    all equal, or there is but one, which has no other to be told from."""
    if figures.entropy == 0:
        return None
    if has_collapsed(figures.mutual_information, figures.entropy, _least(config)):
        return f"the latent is not being used: it carries {max(0.0, figures.mutual_information):.2f} nats of a text"
    loss = figures.cross_entropy_shuffled - figures.cross_entropy
    if loss < _least(config):
        return f"the latent is not being used: another text's does as well, within {abs(loss):.2f} nats a text"
    return None


def _least(config: TrainConfig) -> float:
    """`LEAST_NATS`, or half of a target rate under two, which allows no more."""
    return min(LEAST_NATS, config.target_rate / 2) if config.target_rate > 0 else LEAST_NATS


def treatable(config: TrainConfig, step: int, progress: float, treated_at: float) -> bool:
    """Whether a treatment is wanted and has time to work, and neither another one nor a recipe that has its remedies
    already is still at its beginning: what has hardly begun is young and not ill."""
    if config.on_collapse != "treat" or progress > LATEST:
        return False
    if has_remedies(config) and step < YOUNG_STEPS:
        return False
    waits = treated_at != UNTREATED or has_remedies(config)
    return not waits or recipe(config, progress, treated_at).beta_is_final


def has_remedies(config: TrainConfig) -> bool:
    """Whether a recipe has what keeps a latent from collapsing, as the default one has: free bits, and beta from 0.
    The bag of words makes it carry more, but did not decide whether it is used (`tests/benchmarks/latent/`)."""
    return min(config.kl_warmup, config.target_rate) > 0


def treatment(config: TrainConfig, *, again: bool) -> str:
    """What a treatment does, in words; `again` where it is not the first."""
    new = treated(config)
    return (
        f"beta starts over {'once more ' if again else ''}from 0, the first {new.target_rate:g} nats of KL are"
        f" free, the bag of words weighs {new.bag_of_words:g}, and at first {new.word_dropout:.0%} of the words are"
        " hidden from the decoder"
    )


def verdict(figures: Figures, config: TrainConfig) -> str:
    """One sentence on what the latent carries."""
    if config.without_latent:
        return (
            f"trained without a latent: {figures.cross_entropy_without:.2f} nats/text held out; compare with --baseline"
        )
    if figures.entropy == 0:
        return "what the latent carries cannot be told from one held-out text, or from equal ones"
    if has_collapsed(figures.mutual_information, figures.entropy, _least(config)):
        return (
            f"collapsed: the latent carries {max(0.0, figures.mutual_information):.2f} nats of a text,"
            " the decoder writes without it"
        )
    lost = figures.cross_entropy_shuffled - figures.cross_entropy
    if diagnosis(figures, config) is not None:
        return (
            f"not used: the latent carries {figures.mutual_information:.1f} nats of a text, but the decoder writes"
            f" as well from another text's, within {abs(lost):.2f} nats"
        )
    carries = (
        f"the latent carries {figures.mutual_information:.1f} nats of information per text, of the"
        f" {figures.entropy:.1f} that {figures.texts:,} texts can show at most"
    )
    if config.latents_dropout_prob == 0:  # the decoder never learnt to write without one, however badly it does
        return f"{carries}; for a KL of {figures.kl:.1f} the cross-entropy is {figures.cross_entropy:.1f}"
    helps = figures.cross_entropy_without - figures.cross_entropy
    if helps <= 0:
        return f"{carries}; it does not help the decoder yet"
    little = helps < figures.mutual_information / 2
    return (
        f"{carries}; for a KL of {figures.kl:.1f} it lowers the cross-entropy{' only' if little else ''} from"
        f" {figures.cross_entropy_without:.1f} to {figures.cross_entropy:.1f}"
        f"{', so the decoder makes little of it yet' if little else ''}"
    )


def decline(kept: Figures, last: Figures, config: TrainConfig, epochs: float) -> str | None:
    """That a run made its model worse before its end, and what may keep it from that; None where it did not.

    Args:
        kept, last: of the best model, and of the one at the end of the run, on the same texts.
    """
    best, end = (
        f.cross_entropy_without if config.without_latent else f.cross_entropy + config.vae_kl_loss_weight * f.kl
        for f in (kept, last)
    )
    if end - best <= DECLINE * best:
        return None
    overfits = f"more texts, a shorter run, or another --dropout than {config.dropout:g}"
    better = overfits if epochs > 2 else "a longer run"
    return f"these were at {best:.2f} nats/text then and at {end:.2f} at the end of the run; {better} may do better"


def advice(figures: Figures, config: TrainConfig, steps: int) -> str | None:
    """What to do where the latent is not being used; None where it is, or where there is none."""
    if config.without_latent or diagnosis(figures, config) is None:
        return None
    if figures.texts < FEW_TEXTS:
        return f"{figures.texts} held-out texts are too few to tell: --valid 0.2 holds out more"
    if config.objective == "stock":
        return "the stock objective seldom uses a latent, train without --objective stock"
    if config.on_collapse == "warn" and not has_remedies(config):
        return "train again without --on-collapse warn"
    if steps < YOUNG_STEPS:
        return f"{steps:,} steps are few: train for longer with --max-time"
    return "train for longer with --max-time, or on more texts"
