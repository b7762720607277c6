"""Decoding: texts token by token, from latents and prompts.

Two ways to the next token's logits stand side by side, and a test holds them equal: `PlainDecoder` reads the whole
row again for every token, through x-transformers; `CachedDecoder` keeps keys and values and runs the same weights
as a handful of fused products. `run` drives either over a stream of rows: rows that have ended leave the batch and
waiting rows take their places.

A row that outgrows the decoder's window goes on from the newer half of its tokens, with its latent still in front.
x-transformers' own cache evicts the latent's keys and values at that point, and the text stops listening to it.

Shapes: B rows of the batch, T tokens, N rows or all their tokens, S slots of the cache, D model width, E all heads side
by side, H heads, K head width, C pairs of a head, X queries, keys and values, L layers, Z latent width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptvae_cli import fused, noise
from gptvae_cli.attention import attend, attend_one
from gptvae_cli.config import SampleConfig
from gptvae_cli.constraint import Constraint

if TYPE_CHECKING:
    from gptvae_cli.model import GPTVAE


_SLOTS = 128
"""Positions that the cache has room for at first; most texts need no more."""
_SHARED_WIDTH = 64
"""The vocabulary is filled up to a multiple of it, so that threads can share it evenly (`products.SplitProducts`)."""
SLOW_SECONDS = 0.3
"""An input that took longer than this to arrive is processed at once, and does not wait for others to share a batch."""


@dataclass(frozen=True, eq=False)
class Request:
    """One text to write: from a latent [Z], or None, behind a prompt without BOS. Row and copy name its noise."""

    row: int
    copy: int
    latent: Tensor | None
    prompt: Sequence[int] = ()


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


Choose = Callable[[Tensor, Sequence[Row]], Tensor]
"""Picks one token for every row from logits [B V]."""


def decode(
    model: GPTVAE,
    requests: Iterable[Request],
    sample: SampleConfig,
    *,
    constraint: Constraint | None = None,
    begins: Sequence[int] = (),
    batch_size: int = 64,
    on_token: Callable[[int, int], None] | None = None,
    cached: bool = True,
) -> Iterator[list[int]]:
    """Writes texts, and yields the new tokens of each, without EOS, in the order of the requests.

    A text depends on its request and on `sample`, not on the other rows. Neither does it on the batch size, but where
    rounding decides between tokens that are as likely: products of few and of many rows are computed in different ways.

    Args:
        model: a model with a config (it names the special tokens).
        requests: taken as places in the batch become free.
        sample: how tokens are chosen.
        constraint: what a text may go on with, see `Tokenizer.constraint`, though one that is cut may end within a
            character; None is any token but padding and BOS.
        begins: what the first new token of a text is one of; nothing is any.
        batch_size: rows that are decoded together.
        on_token: called with (position of the request, token) as each token is chosen.
        cached: False takes the plain path.
    """
    config = model.config
    assert config is not None, "decode needs a model that was built from a config"
    max_new = sample.max_tokens or config.max_seq_len - 1
    if constraint is None:
        never = (config.pad_id, config.bos_id)
        constraint = Constraint([b""] * config.num_tokens, never=never, eos_id=config.eos_id)
    barred_SV = torch.from_numpy(~constraint.allowed_SV).to(model.device)
    barred = barred_SV[0].nonzero()[:, 0]
    no_beginning_V = torch.ones(config.num_tokens, dtype=torch.bool, device=model.device)
    no_beginning_V[list(begins)] = False

    def choose(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
        for row in rows:
            row.state = constraint.behind(row.new[-1:], row.state)
        states = [row.state for row in rows]
        if any(states):
            logits_BV = logits_BV.masked_fill(barred_SV[states], float("-inf"))
        else:  # nearly always, and faster
            logits_BV = logits_BV.index_fill(-1, barred, float("-inf"))
        if begins and not all(row.new for row in rows):
            first_B1 = torch.tensor([[not row.new] for row in rows], device=logits_BV.device)
            logits_BV = logits_BV.masked_fill(first_B1 & no_beginning_V, float("-inf"))
        if sample.greedy:
            return greedy(logits_BV)
        uniforms_B = torch.tensor([next(row.uniforms) for row in rows], dtype=torch.float64)
        return draw(filter_logits(logits_BV, sample), uniforms_B.to(logits_BV.device))

    def rows() -> Iterator[Row]:
        for index, request in enumerate(requests):
            uniforms = noise.token_uniforms(sample.seed, request.row, request.copy)
            state = constraint.behind(request.prompt)
            yield Row(index, [config.bos_id, *request.prompt], request.latent, max_new, uniforms, state=state)

    waiting: dict[int, list[int]] = {}
    next_index = 0
    for row in run(
        model, rows(), choose, eos_id=config.eos_id, batch_size=batch_size, on_token=on_token, cached=cached
    ):
        waiting[row.index] = row.new[:-1] if row.new and row.new[-1] == config.eos_id else row.new
        while next_index in waiting:
            yield waiting.pop(next_index)
            next_index += 1


@torch.inference_mode()
def run(
    model: GPTVAE,
    rows: Iterable[Row],
    choose: Choose,
    *,
    eos_id: int | None,
    batch_size: int,
    on_token: Callable[[int, int], None] | None = None,
    cached: bool = True,
) -> Iterator[Row]:
    """Continues rows until each has written EOS or its `max_new` tokens; yields them as they end."""
    waiting = iter(rows)
    usable = cached and model.fused_decoder is not None
    engine: _Engine = CachedDecoder(model, batch_size) if usable else PlainDecoder(model)
    active: list[Row] = []
    slow = False
    while True:
        # Joining costs a pass of its own over the rows that join, so new ones do several at a time; and those that are
        # there do not wait for others that are slow to come. A row that outgrew its window leaves, and joins again.
        joining: list[Row] = []
        window = model.max_seq_len
        if len(active) <= (0 if slow else batch_size - max(1, batch_size // 4)):
            joining, slow = _arrived(waiting, batch_size - len(active))
        if not joining and (joining := [row for row in active if len(row.context) > model.max_seq_len]):
            window = (model.max_seq_len + 1) // 2
            engine.leave([active.index(row) for row in joining])
            active = [row for row in active if row not in joining]
        if joining:
            for row in joining:
                row.context = model.conditioning.window(row.context, window)
            active += joining
            logits_BV = engine.join(joining)
        elif active:
            logits_BV = engine.step(active)
        else:
            return
        chosen = joining or active
        for row, token in zip(chosen, choose(logits_BV, chosen).tolist(), strict=True):
            row.context.append(token)
            row.new.append(token)
            if on_token is not None:
                on_token(row.index, token)
        ended = [i for i, row in enumerate(active) if row.new[-1] == eos_id or len(row.new) >= row.max_new]
        if ended:
            done = [active[i] for i in ended]
            engine.leave(ended)
            active = [row for row in active if row not in done]
            yield from done


def _arrived(waiting: Iterator[Row], most: int) -> tuple[list[Row], bool]:
    """The next rows, up to the first that was slow to come, and whether there was one."""
    arrived: list[Row] = []
    began = time.monotonic()
    for row in islice(waiting, most):
        arrived.append(row)
        before, began = began, time.monotonic()
        if began - before > SLOW_SECONDS:
            return arrived, True
    return arrived, False


# Choosing a token ----------------------------------------------------------------------------------------------------


def filter_logits(logits_BV: Tensor, sample: SampleConfig) -> Tensor:
    """Temperature, then top-k, top-p and min-p: excluded tokens get minus infinity [B V]."""
    # float64 and a largest logit of 0, so that no temperature, however small or large, overflows.
    logits_BV = logits_BV.double()
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sample.temperature
    if sample.top_k is not None and sample.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sample.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    if sample.top_p is not None and sample.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probs_BV = sorted_BV.softmax(dim=-1)
        # A token stays while the share before it is short of p, so that the likeliest always stays.
        excluded_BV = probs_BV.cumsum(dim=-1) - probs_BV >= sample.top_p
        logits_BV = logits_BV.masked_fill(excluded_BV.scatter(-1, order_BV, excluded_BV), float("-inf"))
    if sample.min_p is not None:
        probs_BV = logits_BV.softmax(dim=-1)
        logits_BV = logits_BV.masked_fill(probs_BV < sample.min_p * probs_BV.amax(-1, keepdim=True), float("-inf"))
    return logits_BV


def greedy(logits_BV: Tensor) -> Tensor:
    """The likeliest token of every row, the first one of several [B]."""
    if logits_BV.device.type == "cpu":  # NumPy's is 5 times as fast, but does not know bfloat16
        exact_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        return torch.from_numpy(exact_BV.numpy().argmax(axis=-1))
    return logits_BV.max(dim=-1).indices


def draw(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution at one uniform number in [0, 1) [B].

    float64, so that a token of zero probability is never drawn and the order of summation does not show.
    """
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    target_B1 = (uniforms_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)


# Next-token logits ---------------------------------------------------------------------------------------------------


class _Engine(Protocol):
    """What `run` asks of a decoder. Its rows keep the order in which they joined."""

    def join(self, rows: Sequence[Row]) -> Tensor:
        """Adds rows behind those that are there, and returns their next-token logits [B V]."""

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Next-token logits of all rows, each of which has one new token [B V]."""

    def leave(self, places: Sequence[int]) -> None:
        """Drops the rows at these places; the rows behind them move up."""


class PlainDecoder:
    """Reads every row from its first token, through x-transformers, for any keyword that the model was built with."""

    def __init__(self, model: GPTVAE) -> None:
        self.model = model

    def join(self, rows: Sequence[Row]) -> Tensor:
        return self.step(rows)

    def step(self, rows: Sequence[Row]) -> Tensor:
        model = self.model
        tokens_BT = _right_padded([row.context for row in rows], model.device)
        latents_BZ, keep = _stack_latents(rows, model)
        if any(keep):
            keep_B = None if all(keep) else torch.tensor(keep, device=model.device)
            hidden_BTD = model.hidden(tokens_BT, latents_BZ, keep_B, plain=True)
        else:
            # No slot at all rather than a masked one, as in the seed class: absolute positions tell them apart.
            hidden_BTD = model.hidden(tokens_BT, None, plain=True)
        last_B = torch.tensor([len(row.context) - 1 for row in rows], device=model.device)
        return model.logits(hidden_BTD[torch.arange(len(rows), device=model.device), last_B])

    def leave(self, places: Sequence[int]) -> None:
        pass


class CachedDecoder:
    """Keys and values of every row in one preallocated cache; one position costs one pass over the weights.

    Keys are stored rotated. The latent's slot, where it has one, comes first; a row without a latent has no such slot,
    which rotary positions, being relative, do not notice.

    Under autocast the weights are cast once, and not for every token; the residual stream stays float32.
    """

    def __init__(self, model: GPTVAE, batch_size: int) -> None:
        assert model.fused_decoder is not None, "these layers have no fused form"
        self.model, self.batch_size = model, batch_size
        self.embedding_VD = model.decoder.token_emb.emb.weight
        self.stack = fused.Frozen(model.fused_decoder, batch_size)
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
        latents_BZ, keep = _stack_latents(rows, self.model)
        positions = [len(row.context) - 1 for row in rows]
        x_BTD = self.embedding_VD[_right_padded([row.context for row in rows], device)]
        if any(keep):
            way, latent_BD = self.model.conditioning, self.model.from_latent_to_prepend_token(latents_BZ)
            x_BTD = way.enter(x_BTD, latent_BD, torch.tensor(keep, device=device))
            positions = [position + way.slots * kept for position, kept in zip(positions, keep, strict=True)]
        length = x_BTD.shape[1]
        self._grow(first + len(rows), length, length + max(row.max_new for row in rows))
        self.positions += positions
        room, turns_T11C = fused.Heads(self.stack, (len(rows), length)), self.turns_S11C[:length]
        qkv_XBHTK, x_ND = room.qkv_XHK.permute(2, 0, 3, 1, 4), x_BTD.flatten(0, 1)
        # Padding behind a row is computed and stored, but its slots are masked until real tokens overwrite them.
        for layer, cache_XBHSK in zip(self.stack.layers, self.cache_LXBHSK, strict=True):
            self.stack.project(layer, x_ND, turns_T11C, room)
            cache_XBHSK[:, first : first + len(rows), :, :length] = qkv_XBHTK[1:]
            q_BHTK, k_BHTK, v_BHTK = qkv_XBHTK.to(self.stack.dtype)
            attended_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, None, causal=True)
            self.stack.finish(layer, x_ND, attended_BHTK.transpose(1, 2).reshape(len(x_ND), -1))
        return self._logits(x_BTD[torch.arange(len(rows), device=device), torch.tensor(positions, device=device)])

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
            mask_B11S = torch.zeros_like(unseen_BS, dtype=dtype).masked_fill_(unseen_BS, float("-inf"))[:, None, None]
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


def _right_padded(contexts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Tokens [B T], padded with 0, which causal attention never looks at."""
    tokens = [torch.tensor(context, dtype=torch.long) for context in contexts]
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)


def _stack_latents(rows: Sequence[Row], model: GPTVAE) -> tuple[Tensor, list[bool]]:
    """Latents [B Z], zeros where a row has none, and which rows have one. They are moved to the model's device in one
    copy."""
    given = [row.latent for row in rows if row.latent is not None]
    nothing_Z = torch.zeros_like(given[0]) if given else torch.zeros(model.dim_latent)
    latents_BZ = torch.stack([nothing_Z if row.latent is None else row.latent for row in rows])
    return latents_BZ.to(next(model.parameters())), [row.latent is not None for row in rows]
