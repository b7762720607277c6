"""Noise and orders that are pure functions of what they are for, not of what was drawn before.

Every stream is a Philox counter generator whose key holds the seed and the purpose, and whose counter holds the row
and the copy, or the step (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). A row's noise
therefore depends neither on its neighbours, nor on the batch size, nor on the device. One `torch.Generator` for a
batch has none of these properties: `randn(4, 20)` is not two draws of `randn(2, 20)`.

Shapes: B rows, W numbers of each, N places.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_UNIFORMS = 64
"""Uniforms that are drawn at once."""
_BLOCK = 8
"""Numbers of float32 that Philox makes of one value of its counter, four words of 64 bits."""
_ROUNDS = 8
"""Of the network that shuffles."""


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


def shuffled(ranks: Ints, count: int, order: np.random.Generator) -> Ints:
    """The rows at these places of a random order of `count` rows.

    `numpy.random.Generator.permutation` needs eight bytes a row at once. Here each place is computed from its number
    alone, so that an order of billions of rows takes no memory, and can be entered anywhere.

    A generalised Feistel network over pairs (left, right) of about `sqrt(count)` values each: every round adds to
    one half a hash of the other, which can be undone, so that no two places get one row. The few pairs that stand
    for no row go through it again ("cycle walking").

    Args:
        ranks: places, from 0 to `count - 1` [N].
        count: of all rows, at least 1.
        order: draws the keys; the same ones give the same order.

    Returns:
        A row number for each place [N].

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3; the hash is the
    finaliser of SplitMix64 (Steele et al. 2014).
    """
    keys = order.integers(0, 2**64, _ROUNDS, dtype=np.uint64)
    width = np.uint64(max(1, int(np.ceil(np.sqrt(count)))))
    height = np.uint64(-(-count // int(width)))
    rows = np.asarray(ranks).astype(np.uint64)
    walking = np.ones(len(rows), dtype=bool)
    while walking.any():
        left, right = rows[walking] // width, rows[walking] % width
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left = (left + _hash(right ^ key) % height) % height
            else:
                right = (right + _hash(left ^ key) % width) % width
        rows[walking] = left * width + right
        walking = rows >= count
    return rows.astype(np.int64)


def _hash(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
