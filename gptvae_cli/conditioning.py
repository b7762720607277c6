"""How a latent enters the decoder: as a vector of the decoder's width, the same weights for every way, under a name.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptvae_cli.config import ConditioningName


class Conditioning(Protocol):
    """What the model and its decoding ask of a way; everything else of them is the same for all."""

    slots: int
    """Positions of the decoder that a latent takes, before those of the text."""

    def enter(self, embedded_BTD: Tensor, vector_B1D: Tensor, keep_B: Tensor | None) -> Tensor:
        """What goes into the layers [B T+slots D].

        Args:
            embedded_BTD: the text's tokens, BOS first.
            vector_B1D: the latents'.
            keep_B: True where a row sees its latent; every row does for None.
        """

    def leave(self, hidden_BTD: Tensor, keep_B: Tensor | None) -> Tensor:
        """Of the hidden states of what `enter` gave, those of the text's tokens [B T D]."""

    def keywords(self, vector_B1D: Tensor, keep_B: Tensor | None, length: int) -> dict[str, Tensor | None]:
        """The same for x-transformers' `TransformerWrapper`, whose hidden states have the slots in front."""

    def window(self, context: Sequence[int], length: int) -> list[int]:
        """The newest tokens of a text, as many as this, in a form that still carries its latent."""


class Token:
    """The latent is a token of its own, before the text, as in the seed class."""

    slots = 1

    def enter(self, embedded_BTD: Tensor, vector_B1D: Tensor, keep_B: Tensor | None) -> Tensor:
        """A row without its latent starts one place earlier instead of masking the latent's slot: rotary positions
        are relative, so this is the same, and attention needs no mask."""
        with_latent_BTD = torch.cat([vector_B1D, embedded_BTD], dim=1)
        if keep_B is None:
            return with_latent_BTD
        return torch.where(keep_B[:, None, None], with_latent_BTD, F.pad(embedded_BTD, (0, 0, 0, 1)))

    def leave(self, hidden_BTD: Tensor, keep_B: Tensor | None) -> Tensor:
        if keep_B is None:
            return hidden_BTD[:, 1:]
        return torch.where(keep_B[:, None, None], hidden_BTD[:, 1:], hidden_BTD[:, :-1])

    def keywords(self, vector_B1D: Tensor, keep_B: Tensor | None, length: int) -> dict[str, Tensor | None]:
        return {"prepend_embeds": vector_B1D, "seq_start_pos": None if keep_B is None else (~keep_B).long()}

    def window(self, context: Sequence[int], length: int) -> list[int]:
        return list(context[-length:])


class AddedToBOS:
    """The latent is added to the embedding of the first token, which is BOS: no position more has to be computed, of
    a sentence of eleven tokens a twelfth. A row without its latent has BOS as it is."""

    slots = 0

    def enter(self, embedded_BTD: Tensor, vector_B1D: Tensor, keep_B: Tensor | None) -> Tensor:
        if keep_B is not None:
            vector_B1D = vector_B1D * keep_B[:, None, None]
        return torch.cat([embedded_BTD[:, :1] + vector_B1D, embedded_BTD[:, 1:]], dim=1)

    def leave(self, hidden_BTD: Tensor, keep_B: Tensor | None) -> Tensor:
        return hidden_BTD

    def keywords(self, vector_B1D: Tensor, keep_B: Tensor | None, length: int) -> dict[str, Tensor | None]:
        if keep_B is not None:
            vector_B1D = vector_B1D * keep_B[:, None, None]
        return {"sum_embeds": F.pad(vector_B1D, (0, 0, 0, length - 1))}

    def window(self, context: Sequence[int], length: int) -> list[int]:
        """BOS stays in front, as the latent is told with it."""
        if len(context) <= length:
            return list(context)
        return [context[0], *context[len(context) - length + 1 :]]


CONDITIONINGS: Mapping[ConditioningName, Conditioning] = {"token": Token(), "bos": AddedToBOS()}
