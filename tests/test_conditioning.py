"""The ways of a latent into the decoder, against x-transformers' own class and decoder over the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.testing import assert_close

from gptvae_cli.conditioning import CONDITIONINGS
from gptvae_cli.config import ConditioningName, ModelConfig, from_dict
from gptvae_cli.errors import ConfigError
from gptvae_cli.model import GPTVAE
from tests.conftest import stock_of

TinyModel = Callable[..., GPTVAE]
PAD, BOS, EOS = 17, 18, 19
ROWS = [[BOS, 3, 1, 4, 1, 5, EOS], [BOS, 9, 2, EOS], [BOS, EOS], [BOS, 6, 5, 3, EOS]]
KEEP = [True, False, True, True]

every_path = pytest.mark.parametrize("plain", [True, False], ids=["plain", "fused"])


def tokens() -> Tensor:
    longest = max(map(len, ROWS))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in ROWS])


def latents() -> Tensor:
    return 3 * torch.randn(len(ROWS), 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def expected_logits(stock: Any, row: list[int], latent_Z: Tensor | None) -> Tensor:
    """Of one row without padding, by x-transformers' decoder: BOS, with the latent's vector on it, is put before the
    other tokens as an embedding [T V]."""
    keywords = {}
    if latent_Z is not None:
        vector_11D = stock.from_latent_to_prepend_token(latent_Z[None])
        keywords = {"prepend_embeds": stock.decoder.token_emb(torch.tensor([row[:1]])) + vector_11D}
        row = row[1:]
    logits_TV: Tensor = stock.decoder(torch.tensor([row]), **keywords)[0]
    return logits_TV


@every_path
@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "some"])
def test_a_latent_on_bos_is_an_embedding_that_differs_by_its_vector(
    tiny_model: TinyModel, plain: bool, keep: list[bool] | None
) -> None:
    model = tiny_model(conditioning="bos")
    stock, latents_BZ = stock_of(model), latents()
    keep_B = None if keep is None else torch.tensor(keep)
    logits_BTV = model.logits(model.hidden(tokens(), latents_BZ, keep_B, plain=plain))
    for i, row in enumerate(ROWS):
        expected_TV = expected_logits(stock, row, latents_BZ[i] if keep is None or keep[i] else None)
        assert_close(logits_BTV[i, : len(row)], expected_TV, rtol=0, atol=2e-5)


@every_path
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_no_latent_is_neither_one_of_zero_nor_what_another_row_has(
    tiny_model: TinyModel, conditioning: ConditioningName, plain: bool
) -> None:
    """A learnt null condition, and to every row its own."""
    model, nobody_B = tiny_model(conditioning=conditioning), torch.zeros(len(ROWS), dtype=torch.bool)
    without, nobody, zero, own = (
        model.hidden(tokens(), latents_BZ, keep_B, plain=plain)[:, 0]
        for latents_BZ, keep_B in ((None, None), (latents(), nobody_B), (torch.zeros(4, 8), None), (latents(), None))
    )
    assert_close(nobody, without, rtol=0, atol=1e-5)
    assert ((zero - without).abs().amax(dim=-1) > 0.01).all()
    assert len({tuple(row.round(decimals=3).tolist()) for row in own}) == len(ROWS)


def test_the_seed_classs_loss_takes_either_way(tiny_model: TinyModel) -> None:
    """Mean nats a token, of latents from the global state: as for a token, of which the contract is stock's own."""
    model = tiny_model(conditioning="bos")
    stock, tokens_BT = stock_of(model), tokens()
    torch.manual_seed(5)
    _, (ar_loss, kl_loss) = model(tokens_BT, return_all_losses=True)
    torch.manual_seed(5)
    latents_BZ, (mean_BZ, _) = stock.encode_to_latents(tokens_BT, return_mean_log_var=True)
    nats = [
        -Categorical(logits=expected_logits(stock, row, latent_Z)[:-1]).log_prob(torch.tensor(row[1:]))  # type: ignore[no-untyped-call]
        for row, latent_Z in zip(ROWS, latents_BZ, strict=True)
    ]
    assert_close(ar_loss, torch.cat(nats).mean(), rtol=1e-5, atol=1e-5)
    assert kl_loss > 0
    assert mean_BZ.shape == (len(ROWS), 8)


def test_x_transformers_own_loop_takes_no_latent_that_is_not_a_token(tiny_model: TinyModel) -> None:
    model, prompt_1T = tiny_model(conditioning="bos"), torch.tensor([[BOS]])
    with pytest.raises(ConfigError, match="found restrict_to_max_seq_len, which only works with latents that are tok"):
        model.generate(prompt_1T, 4, latents=latents()[0], restrict_to_max_seq_len=False)
    assert model.generate(prompt_1T, 4, temperature=0.0, restrict_to_max_seq_len=False).shape == (1, 4)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_newest_tokens_fit_the_window(conditioning: ConditioningName) -> None:
    way, context = CONDITIONINGS[conditioning], list(range(10))
    for length in range(2, 13):
        found = way.window(context, length)
        assert len(found) == min(length, 10)
        assert found[1:] == context[len(context) - len(found) + 1 :]
    assert way.window(context, 4)[0] == (6 if conditioning == "token" else 0)


def test_a_model_says_how_its_latent_enters(tiny_config: Callable[..., ModelConfig]) -> None:
    stored = asdict(tiny_config(conditioning="bos"))
    assert from_dict(ModelConfig, stored).conditioning == "bos"
    del stored["conditioning"]
    with pytest.raises(ConfigError, match="needs a value for conditioning"):
        from_dict(ModelConfig, stored)
    with pytest.raises(ConfigError, match="conditioning is 'everywhere'"):
        from_dict(ModelConfig, stored | {"conditioning": "everywhere"})
