"""Decoding: texts token by token, from latents and prompts.

`run` drives an engine over a stream of rows: rows that have ended leave the batch and waiting rows take their places.

A row that outgrows the decoder's window goes on from the newer half of its tokens, with its latent still in front.
x-transformers' own cache evicts the latent's keys and values at that point, and the text stops listening to it.

Shapes: B rows of the batch, S states of a constraint, Z latent width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gptvae_cli import noise
from gptvae_cli.config import SampleConfig
from gptvae_cli.constraint import Constraint
from gptvae_cli.device import moved, rows_together
from gptvae_cli.engines import CachedDecoder, Engine, GuidedDecoder, PlainDecoder, Row, cache_bytes
from gptvae_cli.errors import CheckpointError
from gptvae_cli.healing import Healing

if TYPE_CHECKING:
    from gptvae_cli.model import GPTVAE


@dataclass(frozen=True, eq=False)
class Request:
    """One text to write: from a latent [Z], or None, behind a prompt without BOS. Row and copy name its noise."""

    row: int
    copy: int
    latent: Tensor | None
    prompt: Sequence[int] = ()


Choose = Callable[[Tensor, Sequence[Row]], Tensor]
"""Picks one token for every row from logits [B V], or `NO_TOKEN`."""

NO_TOKEN = -1
"""Where the logits of a row are no finite numbers. It comes from the device with the tokens, so that nothing has to
wait for it."""


def decode(
    model: GPTVAE,
    requests: Iterable[Request | None],
    sample: SampleConfig,
    *,
    constraint: Constraint | None = None,
    endings: Sequence[Sequence[int]] = (),
    batch_size: int | None = None,
    on_token: Callable[[int, int], None] | None = None,
    cached: bool = True,
) -> Iterator[list[int]]:
    """Writes texts, and yields the new tokens of each, without EOS, in the order of the requests.

    A text depends on its request and on `sample`, not on the other rows. Neither does it on the batch size, but where
    rounding decides between tokens that are as likely: products of few and of many rows are computed in different ways.

    Args:
        model: a model with a config (it names the special tokens).
        requests: taken as places in the batch become free. None says that the next one has to be waited for: the texts
            that were begun are written before it is asked for.
        sample: how tokens are chosen.
        constraint: what a text may go on with, see `Tokenizer.constraint`, though one that is cut may end within a
            character; None is any token but padding and BOS.
        endings: of a prompt whose end was taken back, see `healing.take_back`. Tokens that spell it do not count.
        batch_size: rows that are decoded together; None is as many as are fastest, where there is memory for them.
        on_token: called with (position of the request, token) as each token is chosen.
        cached: False takes the plain path.

    Raises:
        CheckpointError: where logits are not finite numbers.
    """
    row_bytes = cache_bytes(model) * (1 if sample.guidance == 1 else 2)
    batch_size = batch_size or rows_together(model.device, row_bytes)
    config = model.config
    assert config is not None, "decode needs a model that was built from a config"
    max_new = (sample.max_tokens or config.max_seq_len - 1) + len(endings)
    if constraint is None:
        never = (config.pad_id, config.bos_id)
        constraint = Constraint([b""] * config.num_tokens, never=never, eos_id=config.eos_id)
    barred_SV = torch.from_numpy(~constraint.allowed_SV).to(model.device)
    barred = barred_SV[0].nonzero()[:, 0]
    healing = Healing(model, endings, constraint) if endings else None

    def choose(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
        for row in rows:
            row.state = constraint.behind(row.new[-1:], row.state)
        states = [row.state for row in rows]
        if any(states):
            logits_BV = logits_BV.masked_fill(barred_SV[moved(torch.tensor(states), logits_BV.device)], float("-inf"))
        else:  # nearly always, and faster
            logits_BV = logits_BV.index_fill(-1, barred, float("-inf"))
        if healing is not None:
            logits_BV = healing(logits_BV, rows)
        if sample.greedy:
            return greedy(logits_BV)
        uniforms_B = torch.tensor([next(row.uniforms) for row in rows], dtype=torch.float64)
        return draw(filter_logits(logits_BV, sample), moved(uniforms_B, logits_BV.device))

    def rows() -> Iterator[Row | None]:
        places = count()
        for request in requests:
            if request is None:
                yield None
                continue
            uniforms = noise.token_uniforms(sample.seed, request.row, request.copy)
            state = constraint.behind(request.prompt)
            yield Row(next(places), [config.bos_id, *request.prompt], request.latent, max_new, uniforms, state=state)

    waiting: dict[int, list[int]] = {}
    next_index = 0
    for row in run(
        model,
        rows(),
        choose,
        eos_id=config.eos_id,
        batch_size=batch_size,
        guidance=sample.guidance,
        on_token=on_token,
        cached=cached,
    ):
        waiting[row.index] = row.new[:-1] if row.new and row.new[-1] == config.eos_id else row.new
        while next_index in waiting:
            yield waiting.pop(next_index)
            next_index += 1


@torch.inference_mode()
def run(
    model: GPTVAE,
    rows: Iterable[Row | None],
    choose: Choose,
    *,
    eos_id: int | None,
    batch_size: int,
    guidance: float = 1.0,
    on_token: Callable[[int, int], None] | None = None,
    cached: bool = True,
) -> Iterator[Row]:
    """Continues rows until each has written EOS or its `max_new` tokens; yields them as they end. None among the rows
    says that the next one has to be waited for.

    Raises:
        CheckpointError: where `choose` finds no token.
    """
    waiting = iter(rows)
    usable = cached and model.fused_decoder is not None
    guided = guidance != 1
    engine: Engine = CachedDecoder(model, batch_size * (1 + guided)) if usable else PlainDecoder(model, cached=cached)
    if guided:
        engine = GuidedDecoder(engine, guidance)
    active: list[Row] = []
    dry = False  # the next row has to be waited for, which is done when there is nothing else to do
    while True:
        # Joining costs a pass of its own over the rows that join, so new ones do several at a time. A row that outgrew
        # its window leaves, and joins again.
        joining: list[Row] = []
        window = model.max_seq_len
        if len(active) <= (0 if dry else batch_size - max(1, batch_size // 4)):
            joining, dry = _next_rows(waiting, batch_size - len(active))
            if dry and not joining and not active:
                continue
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
            if token == NO_TOKEN:
                raise CheckpointError(
                    "the logits of a token are not finite numbers: the weights of the model are too large"
                )
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


def _next_rows(waiting: Iterator[Row | None], most: int) -> tuple[list[Row], bool]:
    """The next rows, up to one that has to be waited for, and whether there is one."""
    rows: list[Row] = []
    for row in islice(waiting, most):
        if row is None:
            return rows, True
        rows.append(row)
    return rows, False


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
    """The likeliest token of every row, the first one of several, or `NO_TOKEN` [B]."""
    if logits_BV.device.type == "cpu":  # NumPy's is 5 times as fast, but does not know bfloat16
        exact_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32)).numpy()
        best_B = exact_BV.argmax(axis=-1)  # a NaN, where there is one
        best_B[~np.isfinite(exact_BV[np.arange(len(best_B)), best_B])] = NO_TOKEN
        return torch.from_numpy(best_B)
    best = logits_BV.max(dim=-1)
    return best.indices.masked_fill(~best.values.isfinite(), NO_TOKEN)


def draw(logits_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """One token a row by inverting the cumulative distribution at one uniform number in [0, 1), or `NO_TOKEN` [B].

    float64, so that a token of zero probability is never drawn and the order of summation does not show.
    """
    cumulative_BV = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    total_B = cumulative_BV[:, -1]
    target_B1 = (uniforms_B * total_B)[:, None]
    token_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
    return token_B.masked_fill(total_B.isnan(), NO_TOKEN)
