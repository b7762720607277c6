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
