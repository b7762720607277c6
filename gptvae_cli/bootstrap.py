"""Confidence intervals over texts: by resampling them, and of shares of them in closed form.

Shapes: N texts, C columns, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Sums = Mapping[str, float]

LEVEL = 0.95
RESAMPLES = 1000
SEED = 0


def totals(columns: Mapping[str, Floats]) -> dict[str, float]:
    """The sum of every column over the texts."""
    return {name: float(column_N.sum()) for name, column_N in columns.items()}


def intervals(
    columns: Mapping[str, Floats],
    figures: Callable[[Sums], Mapping[str, float]],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals at `LEVEL` of figures that are functions of sums over texts.

    A resample draws whole texts, all their columns together, so that ratios are of the same texts and two models are
    compared on the same texts.

    Args:
        columns: of every text [N].
        figures: from the sums of the columns, by name.

    Returns:
        (low, high) of each figure, by name.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    table_NC = np.stack(list(columns.values()), axis=1)
    random = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        times_N = np.bincount(random.integers(0, len(table_NC), len(table_NC)), minlength=len(table_NC))
        found.append(figures(dict(zip(columns, (times_N @ table_NC).tolist(), strict=True))))
    tail = 100 * (1 - LEVEL) / 2
    ends = {name: np.percentile([each[name] for each in found], [tail, 100 - tail]) for name in found[0]}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def of_share(hits: int, count: int) -> tuple[float, float]:
    """An interval at `LEVEL` of the share of texts that something is true of. Resampling finds an interval of no width
    where it is true of none of them or of all, and one that is too small near that.

    Args:
        hits: texts that it is true of.
        count: all texts, at least one.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle = (hits + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(hits * (count - hits) / count + z**2 / 4)
    # At an end the two are equal, but for rounding.
    return 0.0 if hits == 0 else middle - half, 1.0 if hits == count else middle + half
