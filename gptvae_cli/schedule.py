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


def dropout_factor(epochs: float) -> float:
    """Rises from 0 to 1 between the second and the eighth pass over a corpus.

    A text that is new cannot be learnt by heart, and dropout then only slows learning: on Tatoeba sentences it costs a
    decoder alone 0.6 nats a text in 4 passes, and gains it 1.3 in 20 (`tests/benchmarks/latent/`).

    Args:
        epochs: passes over the corpus so far.
    """
    return ramp(max(0.0, epochs - 2.0), 6.0)
