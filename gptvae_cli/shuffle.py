"""A shuffle without a list: where each row of any number of rows comes in an order that a key names.

`numpy.random.Generator.permutation` needs eight bytes a row at once. Here each place is computed from its number
alone, so that an order of billions of rows takes no memory, and can be entered anywhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_ROUNDS = 8


def shuffled(ranks: Ints, count: int, order: np.random.Generator) -> Ints:
    """The rows at these places of a random order of `count` rows.

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
