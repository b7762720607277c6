"""Noise that is a pure function of what it is for, not of the order in which it is drawn.

Every stream is a Philox counter generator whose key holds the seed and the purpose, and whose counter holds the row
and the copy, or the step (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). A row's noise
therefore depends neither on its neighbours, nor on the batch size, nor on the device. One `torch.Generator` for a
batch has none of these properties: `randn(4, 20)` is not two draws of `randn(2, 20)`.

Shapes: B rows, W numbers of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_UNIFORMS = 64
"""Uniforms that are drawn at once."""
_BLOCK = 8
"""Numbers of float32 that Philox makes of one value of its counter, four words of 64 bits."""


class Purpose(IntEnum):
    """What a stream is for; two purposes never share a number."""

    LATENT = 0
    TOKENS = 1
    TRAINING_LATENT = 2
    ORDER = 3
    VALIDATION = 4
    IMPORTANCE = 5
    BATCHES = 6
    TRAINING_KEEP = 7
    TRAINING_HIDE = 8
    TRAINING_DROP = 9


def stream(seed: int, purpose: Purpose, major: int = 0, minor: int = 0) -> np.random.Generator:
    """A generator of its own for (seed, purpose, major, minor)."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, minor, major]))


def row_uniforms(seed: int, purpose: Purpose, step: int, rows: range, width: int) -> Floats:
    """Uniform numbers in [0, 1) for some rows of a step, the same for a row whichever others are asked for [B W].

    Args:
        rows: numbers of the rows, one after another.
        width: W, which a row's numbers depend on.
    """
    blocks = -(-width // _BLOCK)
    random = np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[blocks * rows.start, 0, 0, step]))
    return random.random((len(rows), blocks * _BLOCK), dtype=np.float32)[:, :width]


def row_bits(seed: int, purpose: Purpose, step: int, rows: range, width: int) -> npt.NDArray[np.uint16]:
    """The same of whole numbers below 65,536, which take a third of the time (row `drop` of
    `tests/benchmarks/speed/`) [B W]."""
    blocks = -(-width // (2 * _BLOCK))
    random = np.random.Philox(key=[seed, purpose], counter=[blocks * rows.start, 0, 0, step])
    words = random.random_raw(len(rows) * blocks * 4).astype("<u8", copy=False)
    return words.view("<u2").reshape(len(rows), blocks * 2 * _BLOCK)[:, :width]


def row_normals(seed: int, purpose: Purpose, step: int, rows: range, width: int) -> Floats:
    """The same of standard normal numbers [B W] (Box and Muller 1958: a draw takes as many uniforms for every row)."""
    pairs = -(-width // 2)
    uniform_BW = row_uniforms(seed, purpose, step, rows, 2 * pairs)
    radius_BP = np.sqrt(-2 * np.log1p(-uniform_BW[:, :pairs]))
    angle_BP = np.float32(2 * np.pi) * uniform_BW[:, pairs:]
    return np.concatenate([radius_BP * np.cos(angle_BP), radius_BP * np.sin(angle_BP)], axis=1)[:, :width]


def latent_noise(seed: int, row: int, copy: int, width: int) -> Floats:
    """Standard normal noise of one latent [Z]."""
    return stream(seed, Purpose.LATENT, row, copy).standard_normal(width, dtype=np.float32)


def token_uniforms(seed: int, row: int, copy: int) -> Iterator[float]:
    """A uniform number in [0, 1) for every position of a text, however long it gets."""
    random = stream(seed, Purpose.TOKENS, row, copy)
    while True:
        yield from random.random(_UNIFORMS).tolist()
