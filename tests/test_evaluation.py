"""Figures over a held-out set, recomputed one text at a time from x-transformers and `torch.distributions`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence

from gptvae_cli.constraint import Constraint
from gptvae_cli.evaluation import (
    Figures,
    correct_tokens,
    importance_weighted,
    measure,
    measure_texts,
    measure_without_latent,
    reconstruct,
)
from gptvae_cli.latent import has_collapsed
from gptvae_cli.model import GPTVAE
from gptvae_cli.noise import Purpose, stream
from gptvae_cli.objective import Batch, Noise, objective
from gptvae_cli.schedule import Weights
from tests.conftest import stock_of

PAD, BOS, EOS = 17, 18, 19
COUNT, WIDTH = 12, 8

TinyModel = Callable[..., GPTVAE]


def rows_of(count: int = COUNT, seed: int = 0) -> list[list[int]]:
    """Different rows `BOS text EOS` in order of length, as the batches of an evaluation are."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[BOS, *torch.randint(0, PAD, (i // 2,), generator=generator).tolist(), EOS] for i in range(2, count + 2)]
    assert len({tuple(row) for row in rows}) == count
    return rows


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


def batches_of(rows: Sequence[list[int]], size: int, source: Sequence[list[int]] | None = None) -> list[Batch]:
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        read = None if source is None else padded(source[start : start + size])
        batches.append(Batch(padded(part), read, sum(len(row) - 1 for row in part)))
    return batches


def key(row: Sequence[int]) -> int:
    """What names a text's noise: 63 bits of a hash of its tokens."""
    return int.from_bytes(blake2b(np.array(row, dtype="<i8").tobytes(), digest_size=8).digest(), "little") >> 1


def others_of(rows: Sequence[Sequence[int]]) -> list[int]:
    """For each row the one before it in order of length and key, equal ones counted once."""
    in_order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), key(rows[i])))
    groups = [list(group) for _, group in groupby(in_order, key=lambda i: key(rows[i]))]
    before = {i: groups[number - 1][0] for number, group in enumerate(groups) for i in group}
    return [before[i] for i in range(len(rows))]


@torch.no_grad()
def nats(stock: Any, row: list[int], latent_Z: Tensor | None) -> float:
    prepended = None if latent_Z is None else stock.from_latent_to_prepend_token(latent_Z[None])
    logits_TV = stock.decoder(torch.tensor([row[:-1]]), prepend_embeds=prepended)[0, -(len(row) - 1) :]
    log_probs: Tensor = Categorical(logits=logits_TV).log_prob(torch.tensor(row[1:]))  # type: ignore[no-untyped-call]
    return -log_probs.sum().item()


@torch.no_grad()
def expected_figures(
    model: GPTVAE, rows: Sequence[list[int]], source: Sequence[list[int]] | None, seed: int
) -> Figures:
    """Every figure by its definition, in loops."""
    stock = stock_of(model)
    keys = [key(row) for row in rows]
    if source is not None:
        keys = [(2 * own + key(read)) % 2**63 for own, read in zip(keys, source, strict=True)]
    source = source or rows
    noise_NZ = [stream(seed, Purpose.VALIDATION, each).standard_normal(WIDTH, dtype="float32") for each in keys]
    posteriors = []
    for read in source:
        mean_1Z, log_var_1Z = stock.to_latent_mean_log_variance(stock.encoder(torch.tensor([read])))
        posteriors.append(Normal(mean_1Z[0].double(), (log_var_1Z[0].double() / 2).exp()))
    latents = [q.loc + q.scale * torch.from_numpy(e) for q, e in zip(posteriors, noise_NZ, strict=True)]
    count = len(rows)
    information = 0.0
    for i, z_Z in enumerate(latents):
        densities = [q.log_prob(z_Z).sum().item() for q in posteriors]  # type: ignore[no-untyped-call]
        largest = max(densities)
        aggregate = largest + math.log(sum(math.exp(d - largest) for d in densities) / count)
        information += (densities[i] - aggregate) / count
    variance_Z = torch.stack([q.loc for q in posteriors]).var(dim=0, unbiased=False)
    right = [nats(stock, row, z_Z.float()) for row, z_Z in zip(rows, latents, strict=True)]
    other = [nats(stock, row, latents[i].float()) for row, i in zip(rows, others_of(source), strict=True)]
    without = [nats(stock, row, None) for row in rows]
    return Figures(
        texts=count,
        tokens=sum(len(row) - 1 for row in rows),
        cross_entropy=sum(right) / count,
        cross_entropy_shuffled=sum(other) / count,
        cross_entropy_without=sum(without) / count,
        kl=sum(kl_divergence(q, Normal(0.0, 1.0)).sum().item() for q in posteriors) / count,
        mutual_information=information,
        active_001=sum(value > 0.01 for value in variance_Z.tolist()),
        active_02=sum(value > 0.2 for value in variance_Z.tolist()),
        entropy=math.log(count) - sum(n * math.log(n) for n in Counter(map(tuple, source)).values()) / count,
    )


def assert_equal_figures(found: Figures, expected: Figures, rel: float = 1e-4) -> None:
    for name in Figures.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rel), name


@pytest.mark.parametrize("size", [1, 5, COUNT])
def test_every_figure_is_what_its_definition_says_whatever_the_batch_size(tiny_model: TinyModel, size: int) -> None:
    """Also where a batch is a single row, whose neighbour must not be itself."""
    model, rows = tiny_model(), rows_of()
    found = measure(model, batches_of(rows, size), seed=4)
    expected = expected_figures(model, rows, None, seed=4)
    assert_equal_figures(found, expected)
    assert expected.cross_entropy_shuffled != pytest.approx(expected.cross_entropy, rel=1e-3)
    assert expected.cross_entropy_without != pytest.approx(expected.cross_entropy, rel=1e-3)
    assert expected.active_001 > expected.active_02 > 0
    assert found.nll_bound == found.cross_entropy + found.kl


def test_the_figures_of_aligned_texts_are_those_of_what_the_encoder_reads(tiny_model: TinyModel) -> None:
    """Two of them are of one source: each has a latent of its own from the one posterior."""
    model, rows, source = tiny_model(), rows_of(), rows_of(seed=9)
    source[3] = source[6]
    found = measure(model, batches_of(rows, 4, source), seed=1)
    assert_equal_figures(found, expected_figures(model, rows, source, seed=1))


def test_two_calls_agree_and_another_seed_is_another_sample(tiny_model: TinyModel) -> None:
    model, batches = tiny_model(), batches_of(rows_of(), 5)
    torch.manual_seed(0)
    first = measure(model, batches, seed=2)
    assert measure(model, batches, seed=2) == first
    other = measure(model, batches, seed=3)
    assert other.cross_entropy != first.cross_entropy
    assert other.kl == first.kl


@pytest.mark.parametrize("training", [True, False])
def test_measuring_and_reconstructing_leave_the_model_as_it_was(tiny_model: TinyModel, training: bool) -> None:
    model = tiny_model().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    measure(model, batches_of(rows_of(), 5))
    reconstruct(model, padded(rows_of()))
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state), "nothing global is drawn from"


def test_a_latent_that_says_nothing_is_called_collapsed(tiny_model: TinyModel) -> None:
    model = tiny_model()
    shaken = measure(model, batches_of(rows_of(), 5))
    with torch.no_grad():
        for parameter in model.to_latent_mean_log_variance.parameters():
            parameter.zero_()
    dead = measure(model, batches_of(rows_of(), 5))
    assert dead.mutual_information == pytest.approx(0, abs=1e-6)
    assert (dead.kl, dead.active_001) == (0, 0)
    assert has_collapsed(dead.mutual_information, dead.entropy)
    assert not has_collapsed(shaken.mutual_information, shaken.entropy)


def test_bfloat16_figures_are_near_those_of_float32(tiny_model: TinyModel) -> None:
    """The KL is summed in float32 whatever the model computes in."""
    model, batches = tiny_model(), batches_of(rows_of(), 5)
    exact, coarse = measure(model, batches), measure(model, batches, dtype=torch.bfloat16)
    assert coarse.cross_entropy != exact.cross_entropy
    assert_equal_figures(replace(coarse, active_001=exact.active_001, active_02=exact.active_02), exact, rel=0.05)


# Reconstruction -------------------------------------------------------------------------------------------------------


@pytest.fixture
def learnt(tiny_model: TinyModel) -> tuple[GPTVAE, list[list[int]]]:
    """A model that has learnt a few rows by heart, from their latents' means."""
    rows = rows_of()
    model = tiny_model(seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = batches_of(rows, len(rows))[0]
    noise = Noise(torch.zeros(len(rows), WIDTH))
    for _ in range(150):
        loss = objective(model, None, batch, noise, Weights("elbo", 0.0, 0.0, 0.0)).total
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, rows


def test_a_model_that_knows_its_texts_gives_them_back(learnt: tuple[GPTVAE, list[list[int]]]) -> None:
    """Ragged rows together, each without its BOS, EOS and padding."""
    model, rows = learnt
    assert reconstruct(model, padded(rows)) == [row[1:-1] for row in rows]
    assert reconstruct(model, padded(rows[::-1])) == [row[1:-1] for row in rows[::-1]]


def test_padding_behind_a_row_does_not_change_its_reconstruction(learnt: tuple[GPTVAE, list[list[int]]]) -> None:
    model, rows = learnt
    longer = torch.nn.functional.pad(padded(rows), (0, 5), value=PAD)
    assert reconstruct(model, longer) == [row[1:-1] for row in rows]
    assert [reconstruct(model, padded([row]))[0] for row in rows] == [row[1:-1] for row in rows]


def test_banned_tokens_are_not_written(learnt: tuple[GPTVAE, list[list[int]]]) -> None:
    model, rows = learnt
    banned = rows[-1][1]
    constraint = Constraint([b""] * (EOS + 1), never=[PAD, BOS, banned], eos_id=EOS)
    written = reconstruct(model, padded(rows), constraint=constraint)
    assert all(banned not in text for text in written)
    assert written != [row[1:-1] for row in rows]


def grid(dimensions: int) -> tuple[Tensor, float]:
    """Points of a grid over the prior, and the logarithm of the volume that each stands for."""
    line_G = torch.linspace(-5.5, 5.5, 111 if dimensions == 1 else 45)
    points_GZ = torch.cartesian_prod(*[line_G] * dimensions).view(-1, dimensions)
    return points_GZ, dimensions * math.log(float(line_G[1] - line_G[0]))


@torch.no_grad()
def quadrature(stock: Any, row: list[int], dimensions: int) -> float:
    """-log of the integral of p(text | z) p(z) over z."""
    points_GZ, log_volume = grid(dimensions)
    tokens_GT = torch.tensor([row] * len(points_GZ))
    logits_GTV = stock.decoder(tokens_GT[:, :-1], prepend_embeds=stock.from_latent_to_prepend_token(points_GZ))
    log_probs_GT = logits_GTV[:, -(len(row) - 1) :].log_softmax(-1).gather(2, tokens_GT[:, 1:, None])[..., 0]
    log_prior_G = Normal(0.0, 1.0).log_prob(points_GZ).sum(-1)  # type: ignore[no-untyped-call]
    return -float((log_probs_GT.double().sum(-1) + log_prior_G).logsumexp(0)) - log_volume


@pytest.mark.parametrize("dimensions", [1, 2])
def test_importance_weighted_nll_agrees_with_quadrature(tiny_model: TinyModel, dimensions: int) -> None:
    """With one or two latent dimensions the integral over the prior can be taken on a grid."""
    model = tiny_model(dim_latent=dimensions)
    with torch.no_grad():  # a posterior that covers the true one: heavy weights would need millions of samples
        for parameter in model.to_latent_mean_log_variance.parameters():
            parameter.mul_(0.2)
    stock = stock_of(model)
    rows = rows_of(3)
    nll_N = importance_weighted(model, batches_of(rows, 4), 4000, seed=0)
    bound_N = importance_weighted(model, batches_of(rows, 4), 1, seed=0)
    for row, nll, bound in zip(rows, nll_N.tolist(), bound_N.tolist(), strict=True):
        assert nll == pytest.approx(quadrature(stock, row, dimensions), abs=0.03)
        assert abs(bound - nll) > 0.03, "else one sample would do, and this would test nothing"


def test_more_samples_come_closer_and_one_is_the_elbo(tiny_model: TinyModel) -> None:
    model = tiny_model()
    batches = batches_of(rows_of(), 5)
    nlls = [float(importance_weighted(model, batches, samples, seed=1).mean()) for samples in (1, 20, 400)]
    assert nlls[0] > nlls[1] > nlls[2]
    bounds = [float(importance_weighted(model, batches, 1, seed=seed).mean()) for seed in range(60)]
    figures = [measure(model, batches, seed=seed).nll_bound for seed in range(60)]
    assert sum(bounds) / 60 == pytest.approx(sum(figures) / 60, rel=0.02)


@pytest.mark.parametrize(("samples", "widths"), [(5, (1.0, 1.3)), (7, (0.8, 1.0, 2.0)), (4, (1.0,)), (1, (1.0, 1.3))])
def test_latents_are_weighed_by_the_mixture_they_are_drawn_from(
    tiny_model: TinyModel, samples: int, widths: tuple[float, ...]
) -> None:
    """By the densities of torch.distributions, text by text; turns that do not come out even have uneven shares."""
    model, rows = tiny_model(), rows_of(4)
    stock = stock_of(model)
    nll_N = importance_weighted(model, batches_of(rows, 2), samples, seed=3, widths=widths)
    width_K = torch.tensor((widths * samples)[:samples])
    for row, nll in zip(rows, nll_N.tolist(), strict=True):
        posterior = model.posterior(torch.tensor([row]))
        mean_Z, std_Z = posterior.mean_BZ[0].detach().double(), (0.5 * posterior.log_var_BZ[0].detach().double()).exp()
        noise_KZ = torch.from_numpy(
            stream(3, Purpose.IMPORTANCE, key(row)).standard_normal((samples, model.dim_latent), dtype="float32")
        )
        latents_KZ = mean_Z + std_Z * noise_KZ * width_K[:, None]
        parts_K = Independent(Normal(mean_Z.expand_as(latents_KZ), std_Z * width_K[:, None]), 1)
        proposal = MixtureSameFamily(Categorical(torch.ones(samples, dtype=torch.float64)), parts_K)
        nats_K = torch.tensor([nats(stock, row, latent_Z) for latent_Z in latents_KZ.float()], dtype=torch.float64)
        log_prior_K = Normal(0.0, 1.0).log_prob(latents_KZ).sum(-1)  # type: ignore[no-untyped-call]
        log_weights_K = log_prior_K - proposal.log_prob(latents_KZ) - nats_K  # type: ignore[no-untyped-call]
        assert nll == pytest.approx(math.log(samples) - float(log_weights_K.logsumexp(0)), rel=1e-5)


def test_importance_weighting_does_not_depend_on_how_samples_are_split(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splitting only bounds memory; the noise is drawn in the same order."""
    model, batches = tiny_model(), batches_of(rows_of(), 5)
    together = importance_weighted(model, batches, 12)
    monkeypatch.setattr("gptvae_cli.evaluation.tokens_together", lambda device: 1)
    apart = importance_weighted(model, batches, 12)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)


def test_progress_counts_what_is_done_of_a_batch(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred latents of a batch take ten seconds, in which people would wonder."""
    model, batches = tiny_model(), batches_of(rows_of(8), 4)
    monkeypatch.setattr("gptvae_cli.evaluation.tokens_together", lambda device: 0)  # one latent a text at a time
    told: list[int] = []
    importance_weighted(model, batches, 4, on_progress=told.append)
    assert told == [1, 2, 3, 4, 5, 6, 7, 8]


def test_what_is_measured_of_a_text_depends_neither_on_order_nor_on_batches(tiny_model: TinyModel) -> None:
    """Also of texts that occur twice: another text's latent is never that of an equal one."""
    model, rows = tiny_model(), rows_of()
    rows = sorted([*rows, rows[3], rows[3], rows[7]], key=len)
    backwards = rows[::-1]

    def found(rows: list[list[int]], size: int) -> list[Tensor]:
        measured = measure_texts(model, batches_of(rows, size), seed=6)
        nll_N = importance_weighted(model, batches_of(rows, size), 5, seed=6)
        return [
            nll_N,
            measured.cross_entropy_N,
            measured.cross_entropy_shuffled_N,
            measured.cross_entropy_without_N,
            measured.kl_N,
            measured.sample_NZ,
        ]

    for one, other in zip(found(rows, 4), found(backwards, 7), strict=True):
        torch.testing.assert_close(one, other.flip(0), rtol=1e-4, atol=1e-5)
    right_N, shuffled_N = found(rows, 4)[1:3]
    assert (right_N - shuffled_N).abs().min() > 1e-3


def test_a_model_without_a_latent_is_measured_as_the_language_model_that_it_is(tiny_model: TinyModel) -> None:
    model, rows = tiny_model(), rows_of()
    found_N = measure_without_latent(model, batches_of(rows, 5))
    stock = stock_of(model)
    torch.testing.assert_close(
        found_N, torch.tensor([nats(stock, row, None) for row in rows]).double(), rtol=1e-4, atol=0
    )
    figures, alone = measure(model, batches_of(rows, 5)), measure(model, batches_of(rows, 5), without_latent=True)
    assert (alone.texts, alone.tokens) == (figures.texts, figures.tokens)
    assert alone.nll_bound == alone.cross_entropy_without == float(found_N.mean())
    assert alone.cross_entropy_without == pytest.approx(figures.cross_entropy_without, rel=1e-5)
    assert figures.kl > 0, "that of an encoder which has learnt nothing"
    assert (alone.kl, alone.mutual_information, alone.active_001, alone.active_02) == (0, 0, 0, 0)


def test_a_reconstruction_is_counted_place_by_place() -> None:
    """The end of a text is a place of its own."""
    assert correct_tokens([1, 2, 3], [1, 9, 9, 9]) == 1
    assert correct_tokens([1, 2, 3], [9, 2, 9]) == 2
    assert correct_tokens([4], [4]) == 2
    assert correct_tokens([], []) == 1
    assert correct_tokens([1, 2], []) == 0
    assert correct_tokens([1, 2, 3], [1, 9, 3], False) == 2
