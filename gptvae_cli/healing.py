"""Token healing: what is written behind a prompt that ends where no token of a text that was learnt does.

A prompt may end within a word, or behind the space that is in the token of the next word. So its last tokens are taken
back, and what is written in their place must spell them: they themselves, or some of them and then a token that holds
the rest of the prompt, and may hold more. Every way is as likely as the model has it: a token of the prompt's own
counts with all ways on from there that spell the prompt, which a look ahead tells, and not with all texts that begin
with it.

Shapes: B rows, T tokens, P places in the tokens that were taken back, D model width, V vocabulary.

Source: token healing is of guidance (github.com/guidance-ai/guidance), which takes the last token back, without a look
ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptvae_cli.device import moved
from gptvae_cli.engines import Row, last_states

if TYPE_CHECKING:
    from gptvae_cli.constraint import Constraint
    from gptvae_cli.model import GPTVAE
    from gptvae_cli.tokenizer import Tokenizer

_MOST = 8
"""Tokens that are taken back at most."""


def take_back(
    tokenizer: Tokenizer, prompt: str, constraint: Constraint, *, longest: int = _MOST
) -> tuple[list[int], list[list[int]]]:
    """The tokens of a prompt that stay; and for each of the others, it and the tokens that may come in its place, which
    begin with what the prompt says from there on.

    Args:
        longest: tokens that the decoder sees at once; of no more can it tell how likely they are.
    """
    ids = tokenizer.encode_batch([prompt])[0]
    endings: list[list[int]] = []
    for place in reversed(range(max(0, len(ids) - min(_MOST, longest)), len(ids)) if tokenizer.is_exact else ()):
        rest = tokenizer.decode(ids[place:])
        longer = [] if "\ufffd" in rest else tokenizer.beginning_with(rest)
        allowed = [token for token in longer if constraint.allowed_SV[0, token] and token != ids[place]]
        endings.insert(0, [ids[place], *allowed])
    while endings and len(endings[0]) == 1:  # nothing else may come there
        del endings[0]
    return ids[: len(ids) - len(endings)], endings


class Healing:
    """Weighs the first tokens of texts, whose `endings`, one or more, are as `take_back` has them."""

    def __init__(self, model: GPTVAE, endings: Sequence[Sequence[int]], constraint: Constraint) -> None:
        self._model, self._constraint = model, constraint
        self._own = [ending[0] for ending in endings]
        # Behind the last one any token may come.
        self._closed_PV = torch.ones(len(endings) + 1, constraint.allowed_SV.shape[1], dtype=torch.bool)
        for place, ending in enumerate(endings):
            self._closed_PV[place, list(ending)] = False
        self._closed_PV[-1] = False
        self._closed_PV = self._closed_PV.to(model.device)

    def __call__(self, logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
        """Logits of the next tokens, of which those that would not spell the prompt get minus infinity."""
        if len(self._own) > 1 and (new := [row for row in rows if not row.new]):
            self._look_ahead(new)
        places = [self._place(row) for row in rows]
        if min(places) == len(self._own):
            return logits_BV
        logits_BV = logits_BV.masked_fill(self._closed_PV[moved(torch.tensor(places), logits_BV.device)], float("-inf"))
        for row, place, logits_V in zip(rows, places, logits_BV, strict=True):
            if place + 1 < len(self._own):
                logits_V[self._own[place]] += row.log_rest[place]
        return logits_BV

    def _place(self, row: Row) -> int:
        """How many of the prompt's own tokens a row has written; all of them, where it went another way."""
        written, most = len(row.new), len(self._own)
        if row.new == self._own[:written]:
            return written
        if written <= most and row.new[:-1] == self._own[: written - 1]:
            row.max_new -= most - written  # its last token holds the others, too
        return most

    def _look_ahead(self, rows: Sequence[Row]) -> None:
        """Finds for every token but the last the logarithm of the share of texts that spell the rest of the prompt."""
        model, own = self._model, self._own
        contexts = [model.conditioning.window([*row.context, *own[:-1]], model.max_seq_len) for row in rows]
        hidden_BPD = last_states(model, contexts, [row.latent for row in rows], len(own) - 1)
        rest_B = hidden_BPD.new_zeros(len(rows), dtype=torch.float64)
        rests = [rest_B]
        for place in reversed(range(1, len(own))):
            states = [self._constraint.behind(own[:place], row.state) for row in rows]
            barred_BV = torch.from_numpy(~self._constraint.allowed_SV[states]).to(model.device)
            logits_BV = model.logits(hidden_BPD[:, place - 1]).double()
            log_share_BV = logits_BV.masked_fill_(barred_BV, float("-inf")).log_softmax(-1)
            log_share_BV = log_share_BV.masked_fill_(self._closed_PV[place], float("-inf"))
            log_share_BV[:, own[place]] += rest_B
            rest_B = log_share_BV.logsumexp(-1)
            rests.insert(0, rest_B)
        for row, rest in zip(rows, torch.stack(rests, dim=1).tolist(), strict=True):
            row.log_rest = rest
