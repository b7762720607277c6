"""Next-token logits of many texts at once.

Two ways stand side by side, and a test holds them equal: `PlainDecoder` goes through x-transformers, and reads the
whole row again for every token, unless that may keep keys and values; `CachedDecoder` keeps them itself, and runs the
same weights as a handful of fused products.

Shapes: B rows of the batch, T tokens, N rows or all their tokens, S slots of the cache, D model width, E all heads side
by side, H heads, K head width, C pairs of a head, X queries, keys and values, L layers, P two for every row of B,
Z latent width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptvae_cli import fused
from gptvae_cli.attention import attend_one

if TYPE_CHECKING:
    from gptvae_cli.model import GPTVAE

_SLOTS = 128
"""Positions that the cache has room for at first; most texts need no more."""
_SHARED_WIDTH = 64
"""The vocabulary is filled up to a multiple of it, so that threads can share it evenly (`products.SplitProducts`)."""


@dataclass(eq=False)
class Row:
    """A text being written: `context` is what the decoder sees of it, `new` what has been written, EOS included;
    `max_new` is at least 1."""

    index: int
    context: list[int]
    latent: Tensor | None
    max_new: int
    uniforms: Iterator[float] = field(default_factory=lambda: iter(()))
    new: list[int] = field(default_factory=list)
    state: int = 0
    """How far the bytes of a character have come, see `Constraint`."""
    log_rest: Sequence[float] = ()
    """Of a prompt whose end was taken back, see `healing.Healing`."""


class Engine(Protocol):
    """What `run` asks of a decoder. Its rows keep the order in which they joined."""

    def join(self, rows: Sequence[Row]) -> Tensor:
        """Adds rows behind those that are there, and returns their next-token logits [B V]."""

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Next-token logits of all rows, each of which has one new token [B V]."""

    def leave(self, places: Sequence[int]) -> None:
        """Drops the rows at these places; the rows behind them move up."""


class PlainDecoder:
    """Reads every row from its first token, through x-transformers, for any keyword that the model was built with.

    Args:
        model: which writes.
        cached: let x-transformers keep keys and values, where that is known to change no text, and while all rows are
            of one length.
    """

    def __init__(self, model: GPTVAE, *, cached: bool = False) -> None:
        self.model, self.cached = model, cached and model.keeps_keys
        self._cache: Any = None
        self._contexts: list[list[int]] = []
        self._latents: list[Tensor | None] = []

    def join(self, rows: Sequence[Row]) -> Tensor:
        return self.step(rows)

    def step(self, rows: Sequence[Row]) -> Tensor:
        contexts, latents = [list(row.context) for row in rows], [row.latent for row in rows]
        if not self.cached or len({*map(len, contexts)}) > 1:
            return self.model.logits(last_states(self.model, contexts, latents, 1, plain=True)[:, 0])
        # What is kept is of these rows, if they are those of the last step with a token more.
        if [context[:-1] for context in contexts] != self._contexts or [*map(id, latents)] != [*map(id, self._latents)]:
            self._cache = None
        tokens_BT = _right_padded(contexts, self.model.device)
        latents_BZ, keep = _stack_latents(latents, self.model)
        keep_B = None if all(keep) else torch.tensor(keep, device=self.model.device)
        last_BD, self._cache = self.model.last_hidden(tokens_BT, latents_BZ if any(keep) else None, keep_B, self._cache)
        self._contexts, self._latents = contexts, latents
        return self.model.logits(last_BD)

    def leave(self, places: Sequence[int]) -> None:
        pass


class CachedDecoder:
    """Keys and values of every row in one preallocated cache; one position costs one pass over the weights.

    Keys are stored rotated. The latent's slot, where it has one, comes first; a row without a latent has no such slot,
    which rotary positions, being relative, do not notice.

    Under autocast the weights are cast once, and not for every token; the residual stream stays float32.
    """

    def __init__(self, model: GPTVAE, batch_size: int) -> None:
        stack = model.fused_decoder
        assert stack is not None, "these layers have no fused form"
        self.model, self.batch_size = model, batch_size
        self.embedding_VD = model.decoder.token_emb.emb.weight
        self.stack = fused.Frozen(stack, batch_size)
        weight_VD = model.decoder.to_logits.weight
        self.vocabulary = len(weight_VD)
        self.to_logits = self.stack.products.matrix(F.pad(weight_VD, (0, 0, 0, -self.vocabulary % _SHARED_WIDTH)))
        self.turns_S11C = self.stack.turns(model.max_seq_len + 1)
        self.room = fused.Heads(self.stack, (0,))
        # The position of each row, kept on the host so that nothing has to wait for the device.
        self.positions: list[int] = []
        heads, width = self.stack.heads, self.stack.head_width
        self.cache_LXBHSK = torch.zeros(
            len(self.stack.layers), 2, 0, heads, 0, width, dtype=self.stack.dtype, device=model.device
        )

    def join(self, rows: Sequence[Row]) -> Tensor:
        device, first = self.model.device, len(self.positions)
        latents_BZ, keep = _stack_latents([row.latent for row in rows], self.model)
        positions = [len(row.context) - 1 for row in rows]
        x_BTD = F.embedding(_right_padded([row.context for row in rows], device), self.embedding_VD)
        if any(keep):
            way, latent_BD = self.model.conditioning, self.model.from_latent_to_prepend_token(latents_BZ)
            x_BTD = way.enter(x_BTD, latent_BD, torch.tensor(keep, device=device))
            positions = [position + way.slots * kept for position, kept in zip(positions, keep, strict=True)]
        length = x_BTD.shape[1]
        self._grow(first + len(rows), length, length + max(row.max_new for row in rows))
        self.positions += positions
        # Padding behind a row is computed and stored, but its slots are masked until real tokens overwrite them.
        cache_LXBHTK = self.cache_LXBHSK[:, :, first : first + len(rows), :, :length]
        hidden_BTD = self.stack.through(x_BTD, cache_LXBHTK=cache_LXBHTK)
        return self._logits(hidden_BTD[torch.arange(len(rows), device=device), torch.tensor(positions, device=device)])

    def step(self, rows: Sequence[Row]) -> Tensor:
        count, device, dtype = len(rows), self.model.device, self.stack.dtype
        self.positions = [position + 1 for position in self.positions]
        used = max(self.positions) + 1
        self._grow(count, used, self.model.max_seq_len + 1)
        x_BD = F.embedding(torch.tensor([row.context[-1] for row in rows], device=device), self.embedding_VD)
        # All views that the layers need are made here, once: for a single row, making them takes most of the time.
        cache_LXBHSK = self.cache_LXBHSK[:, :, :count]
        slots = cache_LXBHSK[..., :used, :].flatten(0, 1).unbind()
        if len(self.room.qkv_NE) != count:
            self.room = fused.Heads(self.stack, (count,))
        qkv_BXHK = self.room.qkv_XHK
        queries_BH1K, new_BXHK = qkv_BXHK[:, 0, :, None], qkv_BXHK[:, 1:]
        new_XBHK, rows_B = new_BXHK.transpose(0, 1), torch.arange(count, device=device)
        if min(self.positions) == used - 1:
            turns_B11C, mask_B11S, places = self.turns_S11C[used - 1], None, cache_LXBHSK.select(4, used - 1).unbind()
        else:
            positions_B = torch.tensor(self.positions, device=device)
            turns_B11C = self.turns_S11C[positions_B]
            unseen_BS = torch.arange(used, device=device) > positions_B[:, None]
            # A GPU's kernels want rows of whole eights, and would fill a mask up in every layer.
            mask_B11S = torch.zeros(count, 1, 1, -(-used // 8) * 8, dtype=dtype, device=device)[..., :used]
            mask_B11S.masked_fill_(unseen_BS[:, None, None], float("-inf"))
            places = None
        for i, layer in enumerate(self.stack.layers):
            self.stack.project(layer, x_BD, turns_B11C, self.room)
            if places is not None:
                places[i].copy_(new_XBHK)
            else:
                cache_LXBHSK[i][:, rows_B, :, positions_B] = new_BXHK.to(dtype)
            keys, values = slots[2 * i : 2 * i + 2]
            attended_BH1K = attend_one(queries_BH1K, keys, values, mask_B11S, most_rows=self.batch_size)
            self.stack.finish(layer, x_BD, attended_BH1K.view(count, -1))
        return self._logits(x_BD)

    def leave(self, places: Sequence[int]) -> None:
        gone = set(places)
        stay = [i for i in range(len(self.positions)) if i not in gone]
        used = max(self.positions) + 1
        # From the first gap on; the rows before it stay where they are.
        first = min(gone)
        if moving := stay[first:]:
            self.cache_LXBHSK[:, :, first : len(stay), :, :used] = self.cache_LXBHSK[:, :, moving, :, :used]
        self.positions = [self.positions[i] for i in stay]

    def _logits(self, x_BD: Tensor) -> Tensor:
        normed_BD = self.stack.final_norm(x_BD).to(self.stack.dtype)
        return self.stack.products.product(normed_BD, self.to_logits)[:, : self.vocabulary]

    def _grow(self, rows: int, slots: int, most: int) -> None:
        """Makes room for at least this many rows and slots. Slots are doubled, up to `most`, since most texts are far
        shorter than the model could write."""
        layers, two, old_rows, heads, old_slots, width = self.cache_LXBHSK.shape
        if rows <= old_rows and slots <= old_slots:
            return
        new_rows = max(rows, old_rows)
        new_slots = (
            old_slots
            if slots <= old_slots
            else max(slots, min(2 * old_slots or _SLOTS, most, self.model.max_seq_len + 1))
        )
        grown = self.cache_LXBHSK.new_zeros(layers, two, new_rows, heads, new_slots, width)
        grown[:, :, :old_rows, :, :old_slots] = self.cache_LXBHSK
        self.cache_LXBHSK = grown


class GuidedDecoder:
    """Rows in pairs, with and without their latent: the logits are those without, and a multiple of the difference.

    Source: classifier-free guidance of language models, Sanchez et al. 2023 (arXiv 2306.17806).
    """

    def __init__(self, engine: Engine, scale: float) -> None:
        self.engine, self.scale = engine, scale

    def join(self, rows: Sequence[Row]) -> Tensor:
        return self._guided(self.engine.join(_with_and_without(rows)))

    def step(self, rows: Sequence[Row]) -> Tensor:
        return self._guided(self.engine.step(_with_and_without(rows)))

    def leave(self, places: Sequence[int]) -> None:
        self.engine.leave([each for place in places for each in (2 * place, 2 * place + 1)])

    def _guided(self, logits_PV: Tensor) -> Tensor:
        logits_BV, without_BV = logits_PV.float().view(-1, 2, logits_PV.shape[-1]).unbind(1)
        return without_BV + self.scale * (logits_BV - without_BV)


def _with_and_without(rows: Sequence[Row]) -> list[Row]:
    return [each for row in rows for each in (row, replace(row, latent=None))]


def cache_bytes(model: GPTVAE) -> int:
    """Memory that keys and values take at most for a row, in float32."""
    layers = model.decoder.attn_layers
    bytes_of_a_slot: int = 2 * 4 * layers.depth * layers.attn_heads * layers.attn_dim_head
    return bytes_of_a_slot * (model.max_seq_len + 1)


def _right_padded(contexts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Tokens [B T], padded with 0, which causal attention never looks at."""
    tokens = [torch.tensor(context, dtype=torch.long) for context in contexts]
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)


def _stack_latents(latents: Sequence[Tensor | None], model: GPTVAE) -> tuple[Tensor, list[bool]]:
    """Latents [B Z], zeros where a row has none, and which rows have one. They are moved to the model's device in one
    copy."""
    given = [latent_Z for latent_Z in latents if latent_Z is not None]
    nothing_Z = torch.zeros_like(given[0]) if given else torch.zeros(model.dim_latent)
    latents_BZ = torch.stack([nothing_Z if latent_Z is None else latent_Z for latent_Z in latents])
    return latents_BZ.to(next(model.parameters())), [latent_Z is not None for latent_Z in latents]


def last_states(
    model: GPTVAE,
    contexts: Sequence[Sequence[int]],
    latents: Sequence[Tensor | None],
    count: int,
    *,
    plain: bool = False,
) -> Tensor:
    """The decoder's hidden states at the last tokens of every row, as many as are asked for [B count D]."""
    tokens_BT = _right_padded(contexts, model.device)
    latents_BZ, keep = _stack_latents(latents, model)
    if any(keep):
        keep_B = None if all(keep) else torch.tensor(keep, device=model.device)
        hidden_BTD = model.hidden(tokens_BT, latents_BZ, keep_B, plain=plain)
    else:
        # No slot at all rather than a masked one, as in the seed class: absolute positions tell them apart.
        hidden_BTD = model.hidden(tokens_BT, None, plain=plain)
    length_B1 = torch.tensor([[len(context)] for context in contexts], device=model.device)
    places_BN = length_B1 - count + torch.arange(count, device=model.device)
    return hidden_BTD[torch.arange(len(contexts), device=model.device)[:, None], places_BN]
