"""Latents that are fitted to their texts, against closed forms and against the model's own plain path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from gptvae_cli.model import GPTVAE
from gptvae_cli.refinement import GUIDANCE, refined

pytestmark = pytest.mark.usefixtures("one_thread")

TinyModel = Callable[..., GPTVAE]
PAD, BOS, EOS = 17, 18, 19
UNSEEN = -0.4
"""The logit of a token that `Coin` makes without a latent."""


class Coin(nn.Module):
    """A decoder of two tokens, whose every logit of the first is the first number of the latent."""

    pad_id = -1

    def hidden(self, tokens_BT: Tensor, latents_BZ: Tensor, keep_B: Tensor | None = None) -> Tensor:
        seen_B1 = latents_BZ[:, :1] if keep_B is None else torch.where(keep_B[:, None], latents_BZ[:, :1], UNSEEN)
        return seen_B1[:, None].expand(*tokens_BT.shape, 1)

    def logits(self, hidden_BT1: Tensor) -> Tensor:
        return F.pad(hidden_BT1, (0, 1))


def flipped(rows: list[list[int]], start_BZ: Tensor, *, guided: bool) -> Tensor:
    return refined(cast("GPTVAE", Coin()), torch.tensor(rows), start_BZ, guided=guided)


@pytest.mark.parametrize("guided", [False, True])
def test_a_latent_ends_where_its_text_is_likeliest(guided: bool) -> None:
    """Three of four tokens are the first: its odds are to be 3. Under guidance the logit is extrapolated. As near as
    this come ten steps."""
    rows = [[0, *[0, 0, 1, 0]], [0, *[1, 1, 0, 1]]]
    found_BZ = flipped(rows, torch.zeros(2, 4), guided=guided)
    for latent_Z, odds in zip(found_BZ, (3, 1 / 3), strict=True):
        best = math.log(odds)
        if guided:
            best = UNSEEN + (best - UNSEEN) / GUIDANCE
        assert latent_Z.tolist() == pytest.approx([best, 0, 0, 0], abs=0.1)


def test_a_latent_does_not_grow_beyond_those_of_the_prior_or_itself() -> None:
    """A text of one kind of token would be likeliest for an infinite one."""
    found_BZ = flipped([[0, 0, 0], [0, 0, 0]], torch.tensor([[0.0, 1.9, 0.0, 0.0], [2.0, 2.0, 1.0, 0.0]]), guided=False)
    assert found_BZ.norm(dim=-1).tolist() == pytest.approx([2, 3])
    assert (found_BZ[:, 0] > torch.tensor([0.5, 2.2])).all()


def test_a_latent_that_cannot_get_better_stays() -> None:
    best_BZ = torch.tensor([[0.0, 0.3, -0.2, 0.1]])
    assert torch.equal(flipped([[0, 0, 1]], best_BZ, guided=False), best_BZ)


@pytest.mark.parametrize("conditioning", ["token", "bos"])
@pytest.mark.parametrize("guided", [False, True])
def test_texts_are_likelier_than_from_where_it_began(tiny_model: TinyModel, guided: bool, conditioning: str) -> None:
    """By the layers of x-transformers, and a row is not influenced by its neighbours."""
    model = tiny_model(conditioning=conditioning)
    tokens_BT, start_BZ = texts(9), 0.5 * torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        found_BZ = refined(model, tokens_BT, start_BZ, guided=guided)
    nats_before_B, nats_B = (nats(model, tokens_BT, z_BZ, guided=guided) for z_BZ in (start_BZ, found_BZ))
    assert (nats_B <= nats_before_B + 1e-3).all()
    assert (nats_B < nats_before_B - 0.5).float().mean() > 0.7
    assert (found_BZ.norm(dim=-1) <= 8**0.5 + 1e-4).all()
    for row in range(9):
        length = int((tokens_BT[row] != PAD).sum())
        alone_BZ = refined(model, tokens_BT[row : row + 1, :length], start_BZ[row : row + 1], guided=guided)
        assert_close(alone_BZ[0], found_BZ[row], atol=2e-3, rtol=0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_all_around_does_not_blur_it(tiny_model: TinyModel) -> None:
    model, tokens_BT, start_BZ = tiny_model(), texts(4), torch.zeros(4, 8)
    expected_BZ = refined(model, tokens_BT, start_BZ, guided=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.frozen():
        model.hidden(tokens_BT, start_BZ)
        assert_close(refined(model, tokens_BT, start_BZ, guided=True), expected_BZ)


def test_a_row_without_a_token_to_predict_keeps_its_latent(tiny_model: TinyModel) -> None:
    start_BZ = torch.randn(2, 8, generator=torch.Generator().manual_seed(2))
    tokens_BT = torch.tensor([[BOS, PAD, PAD], [BOS, 3, EOS]])
    found_BZ = refined(tiny_model(), tokens_BT, start_BZ, guided=True)
    assert torch.equal(found_BZ[0], start_BZ[0])
    assert not torch.equal(found_BZ[1], start_BZ[1])
    assert torch.equal(refined(tiny_model(), tokens_BT[:1, :1], start_BZ[:1], guided=True), start_BZ[:1])


def texts(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(0, 17, (length,), generator=generator) for length in range(1, rows + 1)]
    ended = [torch.cat([torch.tensor([BOS]), text_T, torch.tensor([EOS])]) for text_T in made]
    return nn.utils.rnn.pad_sequence(ended, batch_first=True, padding_value=PAD)


@torch.no_grad()
def nats(model: GPTVAE, tokens_BT: Tensor, latents_BZ: Tensor, *, guided: bool) -> Tensor:
    """Cross-entropy of each row, its logits computed without the fused path."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    logits_BTV: Any = model.logits(model.hidden(inputs_BT, latents_BZ, plain=True))
    if guided:
        nobody_B = torch.zeros(len(tokens_BT), dtype=torch.bool)
        without_BTV = model.logits(model.hidden(inputs_BT, latents_BZ, nobody_B, plain=True))
        logits_BTV = (1 - GUIDANCE) * without_BTV + GUIDANCE * logits_BTV
    log_probs_BTV = logits_BTV.log_softmax(-1)
    real_BT = targets_BT != PAD
    picked_BT = log_probs_BTV.gather(-1, targets_BT.clamp(max=EOS)[..., None])[..., 0]
    return cast("Tensor", -(picked_BT * real_BT).sum(-1))
