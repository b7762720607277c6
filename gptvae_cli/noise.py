"""Noise that is a pure function of what it is for, not of the order in which it is drawn.

Every stream is a Philox counter generator whose key holds the seed and the purpose, and whose counter holds the row
and the copy, or the step (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). A row's noise
therefore depends neither on its neighbours, nor on the batch size, nor on the device. One `torch.Generator` for a
batch has none of these properties: `randn(4, 20)` is not two draws of `randn(2, 20)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_UNIFORMS = 64
"""That are drawn at once."""


class Purpose(IntEnum):
    """What a stream is for; two purposes never share a number."""

    LATENT = 0
    TOKENS = 1
    TRAINING = 2
    ORDER = 3
    VALIDATION = 4
    IMPORTANCE = 5
    BATCHES = 6


def stream(seed: int, purpose: Purpose, major: int = 0, minor: int = 0) -> np.random.Generator:
    """A generator of its own for (seed, purpose, major, minor)."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, minor, major]))


def latent_noise(seed: int, row: int, copy: int, width: int) -> npt.NDArray[np.float32]:
    """Standard normal noise of one latent [Z]."""
    return stream(seed, Purpose.LATENT, row, copy).standard_normal(width, dtype=np.float32)


def token_uniforms(seed: int, row: int, copy: int) -> Iterator[float]:
    """A uniform number in [0, 1) for every position of a text, however long it gets."""
    random = stream(seed, Purpose.TOKENS, row, copy)
    while True:
        yield from random.random(_UNIFORMS).tolist()
