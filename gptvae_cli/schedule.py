"""Schedules: pure functions of a run's progress in [0, 1], the same whether steps or seconds end it."""

from __future__ import annotations

from typing import NamedTuple


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
