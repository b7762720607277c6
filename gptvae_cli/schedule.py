"""Schedules: pure functions of a run's progress in [0, 1], the same whether steps or seconds end it."""

from __future__ import annotations


def learning_rate_factor(progress: float, *, warmup: float, decay: float) -> float:
    """Warm-up, then constant, then linear decay to zero ("trapezoid", arXiv 2405.18392, section 3).

    Args:
        progress: share of the run that is done, in [0, 1].
        warmup: share of the run over which the factor rises from 0 to 1.
        decay: share of the run, at its end, over which it falls to 0.
    """
    rising = 1.0 if warmup == 0 else min(1.0, progress / warmup)
    falling = 1.0 if decay == 0 else min(1.0, (1.0 - progress) / decay)
    return max(0.0, min(rising, falling))


def ramp(progress: float, until: float) -> float:
    """Rises linearly from 0 to 1 and stays there from `until` on; 1 throughout where `until` is 0."""
    return 1.0 if until == 0 else min(1.0, max(0.0, progress / until))


def dropout_share(dropout: float, epochs: float) -> float:
    """The share to drop of what the decoder's blocks add, after some passes over a corpus: none in the first two,
    `dropout` after eight, three times as much from the thirty-second on; never above a half, unless that was asked for.

    The encoder is left whole: dropping some of it as well wrote fewer tokens back, at the same likelihood or a worse
    one. A text that is new cannot be learnt by heart, and dropout then only slows learning; the more often it was seen,
    the more it helps. On Tatoeba sentences 0.1 costs a decoder alone 0.6 nats a text in 4 passes, and gains it 1.3 in
    20; on a megabyte of Wikipedia, in 36, 0.3 gains 5.5 more than 0.1 does (`tests/benchmarks/latent/`).

    Args:
        dropout: the share after eight passes.
        epochs: passes over the corpus so far.
    """
    factor = ramp(max(0.0, epochs - 2.0), 6.0) + 2.0 * ramp(max(0.0, epochs - 8.0), 24.0)
    return min(dropout * factor, max(dropout, 0.5))


def ends_dropout_share(dropout: float, epochs: float) -> float:
    """The share of the decoder's embedded tokens and last states to drop: none in the first eight passes over a corpus,
    six times `dropout` from the thirty-second on, never above 0.6.

    What a model learns by heart goes through them, past the layers: of a corpus of 0.6 MB, in 17 passes, this gains 1.5
    nats a text, and in 53, which came out worse than 17 without, 2.3; where there is little to learn by heart, it
    costs (`tests/benchmarks/latent/`).

    Args:
        dropout: the share of a block after eight passes, see `dropout_share`.
        epochs: passes over the corpus so far.
    """
    return min(6.0 * dropout * ramp(max(0.0, epochs - 8.0), 24.0), 0.6)
