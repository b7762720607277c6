"""Figures over a held-out set, recomputed one text at a time from x-transformers and `torch.distributions`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from gptvae_cli.evaluation import Figures, Reconstruction, compare, importance_weighted, measure, reconstruct
from gptvae_cli.model import GPTVAE
from gptvae_cli.noise import Purpose, stream
from gptvae_cli.objective import Batch, Noise, Weights, objective
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


@torch.no_grad()
def nats(stock: Any, row: list[int], latent_Z: Tensor | None) -> float:
    prepended = None if latent_Z is None else stock.from_latent_to_prepend_token(latent_Z[None])
    logits_TV = stock.decoder(torch.tensor([row[:-1]]), prepend_embeds=prepended)[0, -(len(row) - 1) :]
    log_probs: Tensor = Categorical(logits=logits_TV).log_prob(torch.tensor(row[1:]))  # type: ignore[no-untyped-call]
    return -log_probs.sum().item()


@torch.no_grad()
def expected_figures(model: GPTVAE, rows: Sequence[list[int]], source: Sequence[list[int]], seed: int) -> Figures:
    """Every figure by its definition, in loops."""
    stock = stock_of(model)
    noise_NZ = stream(seed, Purpose.VALIDATION).standard_normal((len(rows), WIDTH), dtype="float32")
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
    other = [nats(stock, row, latents[i - 1].float()) for i, row in enumerate(rows)]
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
    )


def assert_equal_figures(found: Figures, expected: Figures, rel: float = 1e-4) -> None:
    for name in Figures.__dataclass_fields__:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rel), name


@pytest.mark.parametrize("size", [1, 5, COUNT])
def test_every_figure_is_what_its_definition_says_whatever_the_batch_size(tiny_model: TinyModel, size: int) -> None:
    """Also where a batch is a single row, whose neighbour must not be itself."""
    model, rows = tiny_model(), rows_of()
    found = measure(model, batches_of(rows, size), seed=4)
    expected = expected_figures(model, rows, rows, seed=4)
    assert_equal_figures(found, expected)
    assert expected.cross_entropy_shuffled != pytest.approx(expected.cross_entropy, rel=1e-3)
    assert expected.cross_entropy_without != pytest.approx(expected.cross_entropy, rel=1e-3)
    assert expected.active_001 > expected.active_02 > 0
    assert found.nll_bound == found.cross_entropy + found.kl


def test_the_figures_of_aligned_texts_are_those_of_what_the_encoder_reads(tiny_model: TinyModel) -> None:
    model, rows, source = tiny_model(), rows_of(), rows_of(seed=9)
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
    reconstruct(model, [torch.tensor(row) for row in rows_of()])
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
    assert dead.collapsed
    assert not shaken.collapsed
    assert replace(dead, mutual_information=1.0).collapsed is False
    assert replace(dead, kl=50.0, mutual_information=0.99).collapsed, "a KL without information is no latent"


def test_bfloat16_figures_are_near_those_of_float32(tiny_model: TinyModel) -> None:
    """The KL is summed in float32 whatever the model computes in."""
    model, batches = tiny_model(), batches_of(rows_of(), 5)
    exact, coarse = measure(model, batches), measure(model, batches, precision=torch.bfloat16)
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
    tensors = [torch.tensor(row) for row in rows]
    assert reconstruct(model, tensors) == [row[1:-1] for row in rows]
    assert reconstruct(model, tensors[::-1]) == [row[1:-1] for row in rows[::-1]]


def test_padding_behind_a_row_does_not_change_its_reconstruction(learnt: tuple[GPTVAE, list[list[int]]]) -> None:
    model, rows = learnt
    assert reconstruct(model, list(padded(rows))) == [row[1:-1] for row in rows]


def test_banned_tokens_are_not_written(learnt: tuple[GPTVAE, list[list[int]]]) -> None:
    model, rows = learnt
    banned = rows[-1][1]
    written = reconstruct(model, [torch.tensor(row) for row in rows], banned=[banned])
    assert all(banned not in text for text in written)
    assert written != [row[1:-1] for row in rows]


def test_importance_weighted_nll_agrees_with_quadrature(tiny_model: TinyModel) -> None:
    """With one latent dimension the integral over the prior can be taken on a grid."""
    model = tiny_model(dim_latent=1)
    with torch.no_grad():  # a posterior that covers the true one: heavy weights would need millions of samples
        for parameter in model.to_latent_mean_log_variance.parameters():
            parameter.mul_(0.2)
    stock = stock_of(model)
    rows = rows_of(3)
    grid_G = torch.linspace(-6, 6, 121)
    step = float(grid_G[1] - grid_G[0])
    log_prior_G = -0.5 * grid_G.square() - 0.5 * math.log(2 * math.pi)
    expected = []
    for row in rows:
        log_likelihood_G = torch.tensor([-nats(stock, row, z[None]) for z in grid_G])
        expected.append(-float(torch.logsumexp((log_likelihood_G + log_prior_G).double(), dim=0)) - math.log(step))
    estimate = importance_weighted(model, batches_of(rows, 4), 4000, seed=0)
    assert estimate.texts == len(rows)
    assert estimate.nll == pytest.approx(sum(expected) / len(rows), abs=0.02)


def test_more_samples_come_closer_and_one_is_the_elbo(tiny_model: TinyModel) -> None:
    model = tiny_model()
    batches = batches_of(rows_of(), 5)
    nlls = [importance_weighted(model, batches, samples, seed=1).nll for samples in (1, 20, 400)]
    assert nlls[0] > nlls[1] > nlls[2]
    bounds = [importance_weighted(model, batches, 1, seed=seed).nll for seed in range(60)]
    figures = [measure(model, batches, seed=seed).nll_bound for seed in range(60)]
    assert sum(bounds) / 60 == pytest.approx(sum(figures) / 60, rel=0.02)


def test_importance_weighting_does_not_depend_on_how_samples_are_split(tiny_model: TinyModel) -> None:
    """Splitting only bounds memory; the noise is drawn in the same order."""
    model, batches = tiny_model(), batches_of(rows_of(), 5)
    together, apart = (importance_weighted(model, batches, 12, most_rows=rows) for rows in (1000, 7))
    assert together.nll == pytest.approx(apart.nll, rel=1e-5)


def test_a_reconstruction_is_counted_place_by_place() -> None:
    """Of the six tokens of two texts, ends counted, three stand in their places."""
    assert compare([[1, 2, 3], [4]], [[1, 9, 9, 9], [4]]) == Reconstruction(2, 3 / 6, 1 / 2)
    assert compare([[]], [[]]) == Reconstruction(1, 1.0, 1.0)
    assert compare([[1, 2]], [[]]) == Reconstruction(1, 0.0, 0.0)
