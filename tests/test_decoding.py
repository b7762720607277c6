"""Decoding: the cached path against the plain one, the independence of rows, and the choice of a token.

`PlainDecoder` on one row at a time is the reference: it reads every row from its first token through x-transformers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gptvae_cli import decoding, engines, products
from gptvae_cli.config import SampleConfig
from gptvae_cli.constraint import Constraint
from gptvae_cli.decoding import Request, decode, draw, filter_logits, run
from gptvae_cli.engines import Row
from gptvae_cli.errors import CheckpointError
from gptvae_cli.model import GPTVAE
from tests.pretended_gpu import pretended_gpu

PAD, BOS, EOS = 17, 18, 19
WINDOW = 16
GREEDY = SampleConfig(greedy=True, max_tokens=40)
SAMPLED = SampleConfig(seed=7, temperature=1.5, max_tokens=40)

TinyModel = Callable[..., GPTVAE]


def never(*tokens: int) -> Constraint:
    """Anything but these, padding and BOS."""
    return Constraint([b""] * (EOS + 1), never=[PAD, BOS, *tokens], eos_id=EOS)


def some_requests(count: int, *, latents: str = "mixed", width: int = 8, seed: int = 0) -> list[Request]:
    """Prompts of 0 to 12 tokens; every third row has no latent where they are mixed."""
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for row in range(count):
        length = int(torch.randint(0, 13, (), generator=generator))
        prompt = torch.randint(0, PAD, (length,), generator=generator).tolist()
        latent_Z = 3 * torch.randn(width, generator=generator)
        none = latents == "none" or (latents == "mixed" and row % 3 == 1)
        requests.append(Request(row, 0, None if none else latent_Z, prompt))
    return requests


def greedy_logits(
    model: GPTVAE, requests: Sequence[Request], *, batch_size: int, cached: bool, max_new: int
) -> dict[int, tuple[list[int], Tensor]]:
    """The tokens of every row, and the logits [T V] that each was chosen from."""
    seen: dict[int, list[Tensor]] = {request.row: [] for request in requests}

    def choose(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
        for row, logits_V in zip(rows, logits_BV, strict=True):
            seen[row.index].append(logits_V.clone())
        return logits_BV.argmax(dim=-1)

    rows = [
        # Rows end at different times, so that others move up and new ones join behind them.
        Row(request.row, [BOS, *request.prompt], request.latent, 3 + (request.row * 11) % max_new)
        for request in requests
    ]
    done = run(model, rows, choose, eos_id=None, batch_size=batch_size, cached=cached)
    return {row.index: (row.new, torch.stack(seen[row.index])) for row in done}


# The cached path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "latents", "batch_size"),
    [
        ({}, "mixed", 8),
        ({}, "mixed", 3),
        ({}, "mixed", 12),
        ({}, "all", 4),
        ({}, "none", 4),
        ({"depth": 1, "heads": 3, "attn_dim_head": 12}, "mixed", 5),
        ({"depth": 4, "heads": 2, "attn_dim_head": 64, "dim": 48}, "mixed", 3),
        ({"heads": 1, "attn_dim_head": 32}, "mixed", 3),
        ({"dim_latent": 3, "max_seq_len": 5}, "mixed", 4),
        ({"max_seq_len": 64}, "mixed", 1),
        ({"conditioning": "bos"}, "mixed", 3),
        ({"conditioning": "bos"}, "all", 8),
        ({"conditioning": "bos", "max_seq_len": 5}, "mixed", 1),
    ],
    ids=[
        "mixed",
        "stream",
        "many",
        "latents",
        "no-latents",
        "partly-rotated",
        "deep",
        "one-head",
        "short-window",
        "one-by-one",
        "bos",
        "bos-latents",
        "bos-short-window",
    ],
)
def test_cached_logits_and_greedy_tokens_equal_the_plain_path(
    tiny_model: TinyModel, shape: dict[str, Any], latents: str, batch_size: int
) -> None:
    """Ragged prompts, rows that join and leave a small batch, and texts of three windows."""
    model = tiny_model(**shape)
    requests = some_requests(9, latents=latents, width=model.dim_latent)
    max_new = 3 * min(model.max_seq_len, WINDOW)
    expected = greedy_logits(model, requests, batch_size=1, cached=False, max_new=max_new)
    found = greedy_logits(model, requests, batch_size=batch_size, cached=True, max_new=max_new)
    assert set(found) == set(expected) == set(range(9))
    for row, (tokens, logits_TV) in found.items():
        assert_close(logits_TV, expected[row][1], rtol=0, atol=1e-4)
        assert tokens == expected[row][0]
    assert len({token for tokens, _ in found.values() for token in tokens}) > 5


needs_packing = pytest.mark.skipif(not products.packing_works(), reason="needs oneDNN, with bfloat16")


@pytest.mark.parametrize("amd", [False, pytest.param(True, marks=needs_packing)])
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_are_written_alike_on_any_processor(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, amd: bool, rows: int
) -> None:
    """However `best_products` lays the weights out there, on three threads."""
    monkeypatch.setattr("gptvae_cli.products.packing_pays", lambda: amd)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    model = tiny_model(dim=192, heads=2)
    requests = some_requests(3, latents="mixed", width=model.dim_latent)
    expected = greedy_logits(model, requests, batch_size=1, cached=False, max_new=9)
    for row, (tokens, logits_TV) in greedy_logits(model, requests, batch_size=rows, cached=True, max_new=9).items():
        assert_close(logits_TV, expected[row][1], rtol=0, atol=1e-4)
        assert tokens == expected[row][0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_cached_logits_under_autocast_are_those_of_float32_rounded(tiny_model: TinyModel, batch_size: int) -> None:
    """The weights are cast once and the residual stream is not, so that errors do not grow from layer to layer."""
    model, requests = tiny_model(depth=4), some_requests(6, latents="all")
    exact = greedy_logits(model, requests, batch_size=3, cached=True, max_new=1)
    with torch.autocast("cpu", torch.bfloat16):
        engine = engines.CachedDecoder(model, batch_size)
        rounded = greedy_logits(model, requests, batch_size=batch_size, cached=True, max_new=1)
    assert {layer.qkv.dtype for layer in engine.stack.layers} == {engine.cache_LXBHSK.dtype} == {torch.bfloat16}
    for row, (_, logits_TV) in rounded.items():
        assert 0 < (logits_TV - exact[row][1]).abs().max() < 0.03 * exact[row][1].abs().max()


def test_the_plain_path_takes_a_batch_of_ragged_rows(tiny_model: TinyModel) -> None:
    model, requests = tiny_model(), some_requests(7)
    alone = greedy_logits(model, requests, batch_size=1, cached=False, max_new=24)
    together = greedy_logits(model, requests, batch_size=4, cached=False, max_new=24)
    for row, (tokens, logits_TV) in together.items():
        assert_close(logits_TV, alone[row][1], rtol=0, atol=1e-4)
        assert tokens == alone[row][0]


def test_a_row_without_a_latent_differs_from_a_latent_of_zero(tiny_model: TinyModel) -> None:
    """No latent is a condition of its own, not the middle of the prior."""
    model = tiny_model()
    requests = [Request(0, 0, None, [1, 2]), Request(1, 0, torch.zeros(8), [1, 2])]
    found = greedy_logits(model, requests, batch_size=2, cached=True, max_new=1)
    assert (found[0][1][0] - found[1][1][0]).abs().max() > 0.01


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
@pytest.mark.parametrize("conditioning", ["token", "bos"])
def test_a_row_beyond_the_window_goes_on_from_its_newer_half_and_its_latent(
    tiny_model: TinyModel, cached: bool, conditioning: str
) -> None:
    """x-transformers' own cache drops the latent there. Where it is added to BOS, that stays in front."""
    model = tiny_model(conditioning=conditioning)
    latent_Z, prompt = some_requests(1, latents="all")[0].latent, [3, 1, 4]
    text = next(decode(model, [Request(0, 0, latent_Z, prompt)], GREEDY, constraint=never(EOS), cached=cached))
    assert len(text) == 40
    context, moves = [BOS, *prompt], 0
    for token in text:
        if len(context) > WINDOW:
            half = WINDOW // 2
            context = [BOS, *context[-half + 1 :]] if conditioning == "bos" else context[-half:]
            moves += 1
        start = model.hidden(torch.tensor([context]), latent_Z[None], plain=True)  # type: ignore[index]
        logits_V = model.logits(start)[0, -1].index_fill(0, torch.tensor([PAD, BOS, EOS]), float("-inf"))
        assert token == int(logits_V.argmax())
        context.append(token)
    assert moves >= 2


# Guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
@pytest.mark.parametrize("conditioning", ["token", "bos"])
@pytest.mark.parametrize("guidance", [0.4, 2.5])
def test_guidance_goes_on_from_the_logits_without_a_latent_through_those_with_it(
    tiny_model: TinyModel, cached: bool, conditioning: str, guidance: float
) -> None:
    """x-transformers reads both rows of a text from their first token; several windows, rows that join and leave."""
    model, requests = tiny_model(conditioning=conditioning), some_requests(7, latents="all")
    sample = SampleConfig(greedy=True, max_tokens=2 * WINDOW, guidance=guidance)
    texts = list(decode(model, requests, sample, constraint=never(), cached=cached, batch_size=3))
    plain = list(decode(model, requests, SampleConfig(greedy=True, max_tokens=2 * WINDOW), constraint=never()))
    assert sum(text != other for text, other in zip(texts, plain, strict=True)) >= 4
    for request, text in zip(requests, texts, strict=True):
        context = [BOS, *request.prompt]
        for token in [*text, EOS][: 2 * WINDOW]:
            if len(context) > WINDOW:
                context = model.conditioning.window(context, WINDOW // 2)
            tokens_1T = torch.tensor([context])
            latent_Z = request.latent
            assert latent_Z is not None
            with_V, without_V = (
                model.logits(model.hidden(tokens_1T, latent_1Z, plain=True))[0, -1]
                for latent_1Z in (latent_Z[None], None)
            )
            logits_V = (1 - guidance) * without_V + guidance * with_V
            logits_V[[PAD, BOS]] = float("-inf")
            assert logits_V[token] >= logits_V.max() - 1e-4
            context.append(token)


def test_no_guidance_at_all_writes_as_without_a_latent(tiny_model: TinyModel) -> None:
    """By the same noise of the tokens; and a text without a latent has nothing to be guided to."""
    model, requests = tiny_model(), some_requests(6)
    without = [Request(request.row, 0, None, request.prompt) for request in requests]
    expected = list(decode(model, without, SAMPLED))
    assert list(decode(model, requests, replace(SAMPLED, guidance=0))) == expected
    assert list(decode(model, without, replace(SAMPLED, guidance=3))) == expected
    assert list(decode(model, requests, SAMPLED)) != expected


def test_a_long_prompt_is_read_from_its_end(tiny_model: TinyModel) -> None:
    model, prompt = tiny_model(), [5, 3, 8] * WINDOW
    texts = [
        next(decode(model, [Request(0, 0, None, tail)], GREEDY)) for tail in (prompt, [9, *prompt], prompt[-WINDOW:])
    ]
    assert texts[0] == texts[1] == texts[2]


def test_decoding_leaves_the_model_fit_for_training(tiny_model: TinyModel) -> None:
    """What is kept between calls must not be made in inference mode: autograd refuses it."""
    model = tiny_model()
    list(decode(model, some_requests(2), GREEDY))
    model.train()
    posterior = model.posterior(torch.tensor([[BOS, 1, 2, EOS]]))
    loss = model.hidden(torch.tensor([[BOS, 1, 2]]), posterior.mean_BZ).sum()
    assert all(
        gradient.isfinite().all()
        for gradient in torch.autograd.grad(loss, list(model.decoder.attn_layers.parameters()))
    )


def test_decoding_reads_the_weights_as_they_are_now(tiny_model: TinyModel) -> None:
    """However they change: by a step, by loading, or behind autograd's back."""
    model, other = tiny_model(), tiny_model(seed=1)
    requests = some_requests(9, latents="all")
    loss = model.hidden(torch.tensor([[BOS, 1, 2]]), None).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.grad is not None], lr=0.1, fused=True)

    def overwrite() -> None:
        for parameter in model.decoder.parameters():
            parameter.data.mul_(-1)

    seen = set()
    changes: list[Callable[[], Any]] = [
        lambda: None,
        optimizer.step,
        lambda: model.load_state_dict(other.state_dict()),
        overwrite,
        model.double,
    ]
    for change in changes:
        change()
        expected = list(decode(model, requests, GREEDY, cached=False))
        for batch_size in (1, 16):
            assert list(decode(model, requests, GREEDY, batch_size=batch_size)) == expected
        seen.add(str(expected))
    assert len(seen) == 4  # the last change is one of type only


@pytest.mark.requires_cuda
def test_cached_logits_on_cuda_equal_the_plain_path_on_a_cpu(tiny_model: TinyModel) -> None:
    requests = some_requests(9)
    expected = greedy_logits(tiny_model(), requests, batch_size=1, cached=False, max_new=40)
    found = greedy_logits(tiny_model().to("cuda"), requests, batch_size=4, cached=True, max_new=40)
    for row, (tokens, logits_TV) in found.items():
        assert_close(logits_TV.cpu(), expected[row][1], rtol=0, atol=1e-3)
        assert tokens == expected[row][0]


@pytest.mark.requires_cuda
def test_guided_texts_on_cuda_are_those_of_a_cpu(tiny_model: TinyModel) -> None:
    requests, guided = some_requests(9), replace(GREEDY, guidance=2)
    expected = list(decode(tiny_model(), requests, guided, cached=False))
    assert list(decode(tiny_model().to("cuda"), requests, guided, batch_size=4)) == expected


# Independence and order -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model: TinyModel) -> GPTVAE:
    return tiny_model()


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
def test_sampled_text_does_not_depend_on_the_batch_size(model: GPTVAE, batch_size: int, cached: bool) -> None:
    requests = some_requests(8)
    expected = [next(decode(model, [request], SAMPLED)) for request in requests]
    assert list(decode(model, requests, SAMPLED, batch_size=batch_size, cached=cached)) == expected
    assert len({len(text) for text in expected}) > 3


def test_sampled_text_does_not_depend_on_order_or_neighbours(model: GPTVAE) -> None:
    requests = some_requests(12)
    texts = dict(zip(range(12), decode(model, requests, SAMPLED, batch_size=3), strict=True))
    shuffled = [requests[i] for i in np.random.default_rng(0).permutation(12)]
    for request, text in zip(shuffled, decode(model, shuffled, SAMPLED, batch_size=3), strict=True):
        assert text == texts[request.row]
    for request, text in zip(requests[::3], decode(model, requests[::3], SAMPLED), strict=True):
        assert text == texts[request.row]


@pytest.mark.parametrize(
    "other",
    [(SampleConfig(seed=8, temperature=1.5, max_tokens=40), 3, 0), (SAMPLED, 4, 0), (SAMPLED, 3, 1)],
    ids=["seed", "row", "copy"],
)
def test_seed_row_and_copy_each_name_another_text(model: GPTVAE, other: tuple[SampleConfig, int, int]) -> None:
    latent_Z = some_requests(1)[0].latent
    first = next(decode(model, [Request(3, 0, latent_Z, [1])], SAMPLED))
    sample, row, copy = other
    assert next(decode(model, [Request(3, 0, latent_Z, [1])], SAMPLED)) == first
    assert next(decode(model, [Request(row, copy, latent_Z, [1])], sample)) != first


def test_a_shorter_limit_gives_the_beginning_of_the_same_text(model: GPTVAE) -> None:
    longer = list(decode(model, some_requests(6), SAMPLED))
    shorter = list(decode(model, some_requests(6), SampleConfig(seed=7, temperature=1.5, max_tokens=4)))
    assert shorter == [text[:4] for text in longer]
    assert any(len(text) > 4 for text in longer)


def test_greedy_text_does_not_depend_on_the_seed(model: GPTVAE) -> None:
    first = list(decode(model, some_requests(3), SampleConfig(greedy=True, seed=1)))
    assert list(decode(model, some_requests(3), SampleConfig(greedy=True, seed=2))) == first


def test_texts_come_in_the_order_of_the_requests(model: GPTVAE) -> None:
    """Rows end out of order: the later ones wait, and the tokens told on the way say which text is whose."""
    told: dict[int, list[int]] = {}

    def on_token(index: int, token: int) -> None:
        told.setdefault(index, []).append(token)

    texts = list(decode(model, some_requests(10), SAMPLED, batch_size=4, on_token=on_token))
    assert len(texts) == 10
    for index, text in enumerate(texts):
        assert told[index] in (text, [*text, EOS])
    assert any(told[index][-1] == EOS for index in told)


def test_tokens_are_told_as_they_are_chosen(model: GPTVAE) -> None:
    """Two rows take turns; one that waited for the first text to end could not be shown as it is written."""
    order: list[int] = []
    list(decode(model, some_requests(2), GREEDY, on_token=lambda index, token: order.append(index)))
    assert order[:8] == [0, 1] * 4


def test_requests_are_taken_as_places_become_free(model: GPTVAE) -> None:
    """A hundred thousand latents must not be in memory at once."""
    taken = 0

    def requests() -> Iterator[Request]:
        nonlocal taken
        for request in some_requests(50):
            taken += 1
            yield request

    texts = decode(model, requests(), SAMPLED, batch_size=4)
    next(texts)
    assert taken < 50
    assert len(list(texts)) == 49


def test_no_requests_give_no_texts(model: GPTVAE) -> None:
    assert list(decode(model, [], SAMPLED)) == []


# What is never written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
def test_banned_tokens_padding_and_bos_are_never_written(
    model: GPTVAE, sample: SampleConfig, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is made to want them above all else."""
    bias_V = torch.zeros(20)
    bias_V[[PAD, BOS]], bias_V[[3, 11]] = 1000.0, 500.0
    logits, cached_logits = GPTVAE.logits, engines.CachedDecoder._logits
    monkeypatch.setattr(GPTVAE, "logits", lambda self, hidden_D: logits(self, hidden_D) + bias_V)
    monkeypatch.setattr(engines.CachedDecoder, "_logits", lambda self, x_BD: cached_logits(self, x_BD) + bias_V)
    free = [token for text in decode(model, some_requests(8), sample, cached=cached) for token in text]
    assert set(free) == {3, 11}
    texts = list(decode(model, some_requests(8), sample, constraint=never(3, 11), cached=cached))
    assert len({token for text in texts for token in text}) > 3
    assert not {PAD, BOS, 3, 11} & {token for text in texts for token in text}


def test_eos_ends_a_text_and_is_not_part_of_it(model: GPTVAE) -> None:
    texts = list(decode(model, some_requests(8), SAMPLED))
    assert all(EOS not in text for text in texts)
    assert any(len(text) < 40 for text in texts)


@pytest.mark.parametrize("sample", [GREEDY, SampleConfig(temperature=1.5)], ids=["greedy", "sampled"])
def test_max_tokens_is_kept_to(model: GPTVAE, sample: SampleConfig) -> None:
    """Without one, `BOS text EOS` is as long as the model's longest sequence."""
    for limit, expected in ((1, 1), (5, 5), (None, WINDOW - 1), (50, 50)):
        limited = SampleConfig(greedy=sample.greedy, temperature=sample.temperature, max_tokens=limit)
        texts = list(decode(model, some_requests(3), limited, constraint=never(EOS)))
        assert [len(text) for text in texts] == [expected] * 3


# Choosing a token -----------------------------------------------------------------------------------------------------


def numpy_kept(logits_V: npt.NDArray[np.float64], sample: SampleConfig) -> npt.NDArray[np.float64]:
    """The distribution that is left, one token at a time, as the papers state it."""
    weights = {token: math.exp((logit - logits_V.max()) / sample.temperature) for token, logit in enumerate(logits_V)}
    if sample.top_k is not None:
        weights = dict(sorted(weights.items(), key=lambda item: -item[1])[: sample.top_k])
    if sample.top_p is not None:
        total, nucleus, mass = sum(weights.values()), {}, 0.0
        for token, weight in sorted(weights.items(), key=lambda item: -item[1]):
            nucleus[token], mass = weight, mass + weight / total
            if mass >= sample.top_p:
                break
        weights = nucleus
    if sample.min_p is not None:
        weights = {token: w for token, w in weights.items() if w >= sample.min_p * max(weights.values())}
    probs_V = np.zeros(len(logits_V))
    for token, weight in weights.items():
        probs_V[token] = weight / sum(weights.values())
    return probs_V


@pytest.mark.parametrize(
    "sample",
    [
        SampleConfig(),
        SampleConfig(temperature=0.5),
        SampleConfig(temperature=3.0),
        SampleConfig(top_k=1),
        SampleConfig(top_k=7),
        SampleConfig(top_k=1000),
        SampleConfig(top_p=0.01),
        SampleConfig(top_p=0.9),
        SampleConfig(top_p=1.0),
        SampleConfig(min_p=0.05),
        SampleConfig(min_p=1.0),
        SampleConfig(temperature=2.0, top_k=20, top_p=0.8, min_p=0.1),
    ],
    ids=str,
)
def test_filters_equal_a_plain_reading_of_their_papers(sample: SampleConfig) -> None:
    logits_BV = np.random.default_rng(1).normal(0, 2, (25, 50))
    probs_BV = filter_logits(torch.from_numpy(logits_BV), sample).softmax(dim=-1).numpy()
    expected_BV = np.stack([numpy_kept(logits_V, sample) for logits_V in logits_BV])
    assert ((probs_BV > 0) == (expected_BV > 0)).all()
    np.testing.assert_allclose(probs_BV, expected_BV, atol=1e-9)


@pytest.mark.parametrize("sample", [SampleConfig(), SampleConfig(top_p=0.95), SampleConfig(top_k=8, min_p=0.01)])
def test_filters_keep_excluded_tokens_excluded(sample: SampleConfig) -> None:
    logits_BV = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).index_fill(
        -1, torch.tensor([0, 4]), float("-inf")
    )
    probs_BV = filter_logits(logits_BV, sample).softmax(dim=-1)
    assert (probs_BV[:, [0, 4]] == 0).all()
    assert_close(probs_BV.sum(-1), torch.ones(5).double())


@pytest.mark.parametrize("temperature", [sys.float_info.min, 1e-45, 1e-30, 1e30, 1e39, 1e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temperature_overflows(temperature: float, dtype: torch.dtype) -> None:
    """In float32 a logit over 1e-40 is infinite, and minus infinity over 1e39 is not a number."""
    logits_BV = torch.tensor([[3.0, 2.0, float("-inf"), -5.0]], dtype=dtype)
    probs = filter_logits(logits_BV, SampleConfig(temperature=temperature)).softmax(dim=-1)[0].tolist()
    assert probs == pytest.approx([1, 0, 0, 0] if temperature < 1 else [1 / 3, 1 / 3, 0, 1 / 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_greedy_takes_the_first_of_the_likeliest(dtype: torch.dtype) -> None:
    logits_BV = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    logits_BV[0, [7, 3]], logits_BV[1, [0, 49]] = 9.0, 9.0
    expected = [row.index(max(row)) for row in logits_BV.tolist()]
    assert decoding.greedy(logits_BV).tolist() == expected
    assert expected[:2] == [3, 0]


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("way", ["greedy", "drawn", "filtered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_token_is_chosen_where_logits_are_no_numbers(way: str, dtype: torch.dtype) -> None:
    """The other rows do not notice; a token that is the only one left is as good as any."""
    logits_BV = torch.tensor(
        [[0, 9, 0], [NAN] * 3, [-INF] * 3, [0, INF, 0], [9, NAN, 0], [-INF, -INF, -30], [-INF, NAN, -INF]], dtype=dtype
    )
    expected = [1, -1, -1, -1, -1, 2, -1]
    if way == "greedy":
        assert decoding.greedy(logits_BV).tolist() == expected
        return
    if way == "filtered":
        logits_BV = filter_logits(logits_BV, SampleConfig(temperature=0.5, top_k=2, top_p=0.9, min_p=0.01))
    for uniform in (0.0, 0.5, 1 - 2**-53) if way == "filtered" else (0.5,):
        assert draw(logits_BV, torch.full((7,), uniform, dtype=torch.float64)).tolist() == expected


def test_that_logits_are_no_numbers_is_told_with_the_tokens() -> None:
    """A GPU is not waited for."""
    with pretended_gpu() as gpu:
        logits_BV = torch.tensor([[0.0, NAN], [0.0, 1.0]]).to("cuda")
        tokens = [decoding.greedy(logits_BV), draw(logits_BV, torch.zeros(2, dtype=torch.float64).to("cuda"))]
        assert not gpu.waits
    assert [token_B.tolist() for token_B in tokens] == [[-1, 1], [-1, 0]]


@pytest.mark.parametrize("sample", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
def test_weights_that_are_too_large_write_nothing(model: GPTVAE, sample: SampleConfig, cached: bool) -> None:
    model.decoder.to_logits.weight.data.fill_(3e38)
    with pytest.raises(CheckpointError, match="the logits of a token are not finite numbers: the weights of the model"):
        list(decode(model, some_requests(3), sample, cached=cached))


@pytest.mark.parametrize("sample", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_only_token_that_is_allowed_is_written(model: GPTVAE, sample: SampleConfig) -> None:
    only = never(*(token for token in range(PAD) if token != 5), EOS)
    assert list(decode(model, some_requests(3), sample, constraint=only)) == [[5] * 40] * 3


def test_draws_follow_the_distribution() -> None:
    """Chi-square with 9 degrees of freedom: 27.9 is exceeded once in a thousand seeds."""
    probs_V = np.array([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.03, 0.015, 0.005])
    uniforms = np.random.default_rng(0).random(20_000)
    logits_BV = torch.from_numpy(np.log(probs_V)).expand(len(uniforms), -1)
    counts = np.bincount(draw(logits_BV, torch.from_numpy(uniforms)).numpy(), minlength=10)
    expected = probs_V * len(uniforms)
    assert ((counts - expected) ** 2 / expected).sum() < 27.9


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits_BV = torch.tensor([0.25, 0.5, 0.25]).log().expand(6, -1)
    uniforms_B = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.9999], dtype=torch.float64)
    assert draw(logits_BV, uniforms_B).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("uniform", [0.0, 5e-324, 0.5, 1 - 2**-53])
def test_a_token_of_no_probability_is_never_drawn(uniform: float) -> None:
    """At either edge of the unit interval, for excluded tokens in front, between and behind."""
    generator = torch.Generator().manual_seed(3)
    logits_BV = 4 * torch.randn(200, 31, generator=generator)
    logits_BV = logits_BV.masked_fill(torch.rand(200, 31, generator=generator) < 0.5, float("-inf"))
    logits_BV[:, [0, 30]] = float("-inf")
    tokens_B = draw(logits_BV, torch.full((200,), uniform, dtype=torch.float64))
    assert logits_BV.gather(1, tokens_B[:, None]).isfinite().all()


def test_the_edges_of_the_unit_interval_draw_the_first_and_the_last_token() -> None:
    logits_BV = torch.tensor([[float("-inf"), 0.0, 1.0, -3.0, float("-inf")]])
    assert draw(logits_BV, torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    assert draw(logits_BV, torch.full((1,), 1 - 2**-53, dtype=torch.float64)).tolist() == [3]


def test_what_has_come_is_written_before_more_is_waited_for(tiny_model: TinyModel) -> None:
    """And what comes together is written together; all are the same texts."""
    model, requests = tiny_model(), some_requests(7)
    expected = list(decode(model, requests, GREEDY))
    arriving = [None, None, requests[0], None, *requests[1:4], None, *requests[4:], None]
    taken = -1

    def counted() -> Iterator[Request | None]:
        nonlocal taken
        for taken, request in enumerate(arriving, 1):  # noqa: B007
            yield request

    texts, seen = [], []
    for text in decode(model, counted(), GREEDY, batch_size=4):
        texts.append(text)
        seen.append(taken)
    assert texts == expected
    assert seen[:4] == [4, 8, 8, 8], "up to the next that has to be waited for"
    assert taken == len(arriving)
