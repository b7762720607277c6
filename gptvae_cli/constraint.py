"""Which tokens a text may go on with: never some of them, and only what is valid UTF-8.

A byte-level tokenizer has tokens that are parts of a character. A decoder may put any of them behind any other, and
what is no UTF-8 would be shown as U+FFFD.

Shapes: S states, V tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

_TAIL = range(0x80, 0xC0)
_RULES: dict[int, list[tuple[Iterable[int], int]]] = {
    0: [
        (range(0x80), 0),
        (range(0xC2, 0xE0), 1),
        ([0xE0], 4),
        ([*range(0xE1, 0xED), 0xEE, 0xEF], 2),
        ([0xED], 5),
        ([0xF0], 6),
        (range(0xF1, 0xF4), 3),
        ([0xF4], 7),
    ],
    1: [(_TAIL, 0)],
    2: [(_TAIL, 1)],
    3: [(_TAIL, 2)],
    4: [(range(0xA0, 0xC0), 1)],
    5: [(range(0x80, 0xA0), 1)],
    6: [(range(0x90, 0xC0), 2)],
    7: [(range(0x80, 0x90), 2)],
}
"""Of each state the bytes that may come, and the state behind them. In states 0 to 3 so many bytes of a character are
missing; the others are those in which not every tail byte may come. Source: RFC 3629, section 4."""
_DEAD = len(_RULES)


class Constraint:
    """Tokens as steps from state to state; 0 is between characters.

    Args:
        tokens: the bytes of each. One without any may come in every state and leaves it as it is: a special one, or any
            of a tokenizer whose bytes are not known.
        never: tokens that no text goes on with.
        eos_id: what ends a text, in state 0 alone.
    """

    def __init__(self, tokens: Sequence[bytes], *, never: Iterable[int], eos_id: int) -> None:
        step_SB = np.full((_DEAD + 1, 256), _DEAD, dtype=np.int8)
        for state, rules in _RULES.items():
            for allowed, then in rules:
                step_SB[state, list(allowed)] = then
        behind_SV = np.repeat(np.arange(_DEAD, dtype=np.int8)[:, None], len(tokens), axis=1)
        every_byte = np.frombuffer(b"".join(tokens), dtype=np.uint8)
        size_V = np.array([*map(len, tokens)], dtype=np.int64)
        start_V = size_V.cumsum() - size_V
        for place in range(size_V.max(initial=0)):
            longer = np.flatnonzero(size_V > place)
            behind_SV[:, longer] = step_SB[behind_SV[:, longer], every_byte[start_V[longer] + place]]
        follows_SV = behind_SV != _DEAD
        self._behind_SV = np.where(follows_SV, behind_SV, 0)
        self.allowed_SV: npt.NDArray[np.bool_] = follows_SV
        """Whether a token may come in a state."""
        self.allowed_SV[1:, eos_id] = False
        self.allowed_SV[:, list(never)] = False

    def behind(self, ids: Iterable[int], state: int = 0) -> int:
        """The state behind these tokens. One that may not come where it does ends what was begun, as when decoded."""
        for token in ids:
            state = self._behind_SV.item(state, token)
        return state
