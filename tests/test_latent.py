"""The mathematics of the latent against `torch.distributions`, closed forms and brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.testing import assert_close

from gptvae_cli.config import PathKind
from gptvae_cli.errors import ConfigError, ExitCode
from gptvae_cli.latent import (
    active_dimensions,
    entropy,
    free_bits,
    has_collapsed,
    kl_to_standard_normal,
    lerp,
    mutual_information,
    path,
    pointwise_information,
    reparameterize,
    slerp,
)

Normal: Any = torch.distributions.Normal  # its methods carry no types
KINDS: tuple[PathKind, ...] = ("slerp", "lerp")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The Gaussian ---------------------------------------------------------------------------------------------------------


def test_kl_equals_torch_distributions() -> None:
    mean_BZ, log_var_BZ = 3 * normal(50, 8, seed=1), 4 * normal(50, 8, seed=2)
    expected_BZ = kl_divergence(Normal(mean_BZ, (log_var_BZ / 2).exp()), Normal(0.0, 1.0))
    assert_close(kl_to_standard_normal(mean_BZ, log_var_BZ), expected_BZ)


def test_kl_of_the_prior_is_zero() -> None:
    assert kl_to_standard_normal(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_a_sample_is_mean_plus_deviation_times_noise() -> None:
    mean_BZ, log_var_BZ, noise_BZ = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    expected_BZ = Normal(mean_BZ, log_var_BZ.exp().sqrt()).icdf(Normal(0.0, 1.0).cdf(noise_BZ))
    assert_close(reparameterize(mean_BZ, log_var_BZ, noise_BZ), expected_BZ)


def test_gradients_flow_through_a_sample() -> None:
    """d z / d mean is 1, d z / d log_var is half of deviation times noise."""
    mean, log_var = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.8, requires_grad=True)
    by_mean, by_log_var = torch.autograd.grad(reparameterize(mean, log_var, torch.tensor(1.7)), [mean, log_var])
    assert float(by_mean) == 1
    assert float(by_log_var) == pytest.approx(0.5 * math.exp(-0.4) * 1.7)


# Free bits ------------------------------------------------------------------------------------------------------------

KL_BZ = torch.tensor([[0.0, 2.0, 0.1], [0.8, 4.0, 0.3]])


@pytest.mark.parametrize(
    ("floor", "rate", "expected"),
    [
        (0.0, 0.0, 0.4 + 3.0 + 0.2),
        (0.5, 0.0, 0.5 + 3.0 + 0.5),
        (10.0, 0.0, 30.0),
        (0.0, 3.5, 0.4 + 3.0 + 0.2),
        (0.0, 3.7, 3.7),
        (0.5, 3.7, 0.5 + 3.0 + 0.5),
        (0.5, 4.1, 4.1),
    ],
)
def test_the_floors_are_under_the_means_and_their_sum(floor: float, rate: float, expected: float) -> None:
    """Dimension 0 spends 0.8 nats on one row and nothing on the other. A floor of 0.5 under each row would charge 0.3
    for telling them apart; under their mean of 0.4 it charges nothing."""
    assert float(free_bits(KL_BZ.mean(dim=0), floor=floor, rate=rate)) == pytest.approx(expected)


def test_what_is_free_gets_no_gradient() -> None:
    kl_BZ = KL_BZ.clone().requires_grad_()
    above, below = (free_bits(kl_BZ.mean(dim=0), floor=0.5, rate=rate) for rate in (3.9, 4.1))
    assert torch.autograd.grad(above, kl_BZ)[0].tolist() == [[0, 0.5, 0], [0, 0.5, 0]]
    assert not torch.autograd.grad(below, kl_BZ)[0].any()


# Mutual information ---------------------------------------------------------------------------------------------------


def posterior(count: int, width: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    mean_NZ = spread * normal(count, width, seed=1)
    log_var_NZ = normal(count, width, seed=2) - 1
    return mean_NZ, log_var_NZ, mean_NZ + (log_var_NZ / 2).exp() * normal(count, width, seed=3)


@pytest.mark.parametrize("chunk", [1, 7, 256])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_mutual_information_equals_brute_force(spread: float, chunk: int) -> None:
    mean_NZ, log_var_NZ, sample_NZ = posterior(40, 5, spread)
    total = 0.0
    for i in range(40):
        densities = [
            float(Normal(mean_NZ[j], (log_var_NZ[j] / 2).exp()).log_prob(sample_NZ[i]).sum()) for j in range(40)
        ]
        total += densities[i] - math.log(np.mean(np.exp(densities)))
    found = mutual_information(mean_NZ, log_var_NZ, sample_NZ, chunk=chunk)
    assert found == pytest.approx(total / 40, rel=1e-9)


def test_mutual_information_of_equal_posteriors_is_zero() -> None:
    mean_NZ, log_var_NZ = normal(1, 6).expand(300, -1), normal(1, 6, seed=1).expand(300, -1)
    sample_NZ = mean_NZ + (log_var_NZ / 2).exp() * normal(300, 6, seed=2)
    assert mutual_information(mean_NZ, log_var_NZ, sample_NZ) == pytest.approx(0, abs=1e-9)


def test_mutual_information_of_posteriors_far_apart_is_the_log_of_their_number() -> None:
    """More cannot be seen in a set of N texts, whatever the KL says."""
    mean_NZ, log_var_NZ = 1000 * normal(300, 6), torch.full((300, 6), -4.0)
    assert mutual_information(mean_NZ, log_var_NZ, mean_NZ) == pytest.approx(math.log(300), rel=1e-9)


@pytest.mark.parametrize(("dimensions", "deviation"), [(1, 0.5), (2, 1.0), (4, 0.8)])
def test_mutual_information_of_a_gaussian_channel_is_its_closed_form(dimensions: int, deviation: float) -> None:
    """With normal means of variance 1 and posteriors of variance v, I is half of ln(1 + 1 / v) in every dimension."""
    mean_NZ = normal(6000, dimensions, seed=3)
    log_var_NZ = torch.full_like(mean_NZ, 2 * math.log(deviation))
    sample_NZ = mean_NZ + deviation * normal(6000, dimensions, seed=4)
    expected = dimensions * 0.5 * math.log(1 + 1 / deviation**2)
    assert mutual_information(mean_NZ, log_var_NZ, sample_NZ) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("dimensions", "log_var"), [(2, -1.0), (8, -0.7)])
def test_the_interval_of_information_is_that_of_other_texts(dimensions: int, log_var: float) -> None:
    """Its estimates over many sets of texts spread as the terms of one set say."""
    estimates, errors = [], []
    for seed in range(300):
        mean_NZ = normal(200, dimensions, seed=3 * seed)
        log_var_NZ = log_var + 0.3 * normal(200, dimensions, seed=3 * seed + 1)
        sample_NZ = mean_NZ + (log_var_NZ / 2).exp() * normal(200, dimensions, seed=3 * seed + 2)
        terms_N = pointwise_information(mean_NZ, log_var_NZ, sample_NZ)
        estimates.append(mutual_information(mean_NZ, log_var_NZ, sample_NZ))
        errors.append(float(terms_N.std()) / math.sqrt(200))
        assert float(terms_N.mean()) == pytest.approx(estimates[-1])
    assert float(np.mean(errors)) == pytest.approx(float(np.std(estimates)), rel=0.15)


def test_kl_is_the_entropy_and_cross_entropy_of_scipy() -> None:
    """In one dimension, integrated: the integral of q ln(q / p)."""
    mean, log_var = 0.7, -0.9
    q, p = scipy.stats.norm(mean, math.exp(log_var / 2)), scipy.stats.norm()
    expected = q.expect(lambda z: q.logpdf(z) - p.logpdf(z))
    assert float(kl_to_standard_normal(torch.tensor(mean), torch.tensor(log_var))) == pytest.approx(expected, rel=1e-5)


def test_mutual_information_of_float32_is_computed_in_float64() -> None:
    mean_NZ, log_var_NZ, sample_NZ = (tensor.float() for tensor in posterior(100, 16, 30.0))
    exact = mutual_information(mean_NZ.double(), log_var_NZ.double(), sample_NZ.double())
    assert mutual_information(mean_NZ, log_var_NZ, sample_NZ) == exact


@pytest.mark.parametrize("threshold", [0.01, 0.2, 1.0])
def test_active_dimensions_equal_numpy(threshold: float) -> None:
    mean_NZ = normal(500, 30) * torch.linspace(0, 1.5, 30)
    expected = int((np.var(mean_NZ.numpy(), axis=0) > threshold).sum())
    assert active_dimensions(mean_NZ, threshold) == expected
    assert 0 < expected < 30


def test_the_variance_is_that_of_these_texts_and_no_estimate_of_that_of_more() -> None:
    assert active_dimensions(torch.tensor([[0.0], [0.28]]), 0.0196 + 1e-6) == 0
    assert active_dimensions(torch.tensor([[0.0], [0.28]]), 0.0196 - 1e-6) == 1


@pytest.mark.parametrize("counts", [[1] * 7, [3, 1], [5], [10, 10, 1]])
def test_what_texts_can_show_is_their_entropy(counts: list[int]) -> None:
    keys_N = np.repeat(np.arange(len(counts)), counts)
    assert entropy(keys_N) == pytest.approx(float(scipy.stats.entropy(counts)))


def test_of_texts_that_are_all_equal_nothing_can_be_said() -> None:
    assert str(entropy(np.zeros(7, dtype=np.int64))) == "0.0"
    assert not any(has_collapsed(information, 0.0) for information in (-1e-9, 0.0, 1e-9))


def test_a_constant_dimension_is_not_active() -> None:
    assert active_dimensions(torch.full((10, 4), 7.0), 0.01) == 0


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [0.5, 30, 90, 120, 179])
def test_slerp_turns_and_stretches_evenly(degrees: float) -> None:
    """In the plane: from angle 0 and norm 2 to the given angle and norm 5, both linear in the step."""
    end = math.radians(degrees)
    path_KZ = slerp(torch.tensor([2.0, 0.0]), torch.tensor([5 * math.cos(end), 5 * math.sin(end)]), 9).double()
    angles_K = torch.atan2(path_KZ[:, 1], path_KZ[:, 0])
    assert_close(path_KZ.norm(dim=-1), torch.linspace(2, 5, 9, dtype=torch.float64), rtol=0, atol=2e-6)
    assert_close(angles_K, torch.linspace(0, end, 9, dtype=torch.float64), rtol=0, atol=2e-6)


def test_slerp_keeps_its_norm_in_many_dimensions_where_lerp_cuts_through_the_middle() -> None:
    start_Z, end_Z = (16 * z / z.norm() for z in (normal(256), normal(256, seed=1)))
    assert_close(slerp(start_Z, end_Z, 11).norm(dim=-1), torch.full((11,), 16.0, dtype=torch.float64))
    assert lerp(start_Z, end_Z, 11).norm(dim=-1).min() < 13


def test_lerp_is_a_straight_line() -> None:
    path_KZ = lerp(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 6.0]), 5)
    assert_close(path_KZ, torch.tensor([[1.0, -2.0], [1.5, 0.0], [2.0, 2.0], [2.5, 4.0], [3.0, 6.0]]))


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ([1.0, 2.0], [2.0, 4.0]),
        ([1.0, 2.0], [-3.0, -6.0]),
        ([0.0, 0.0], [1.0, 1.0]),
        ([1.0, 1.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, 1.0], [1.0, 1.0 + 1e-7]),
    ],
    ids=["parallel", "opposite", "from-zero", "to-zero", "zeros", "all-but-parallel"],
)
def test_slerp_is_the_straight_line_where_there_is_no_arc(start: list[float], end: list[float]) -> None:
    ends = torch.tensor(start), torch.tensor(end)
    assert torch.equal(slerp(*ends, 7), lerp(*ends, 7))
    assert slerp(*ends, 7).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_the_ends_of_a_path_are_exactly_what_went_in(kind: PathKind, dtype: torch.dtype, scale: float) -> None:
    points_NZ = (scale * normal(2, 33)).to(dtype)
    path_KZ = path(points_NZ, 6, kind)
    assert path_KZ.dtype == dtype
    assert path_KZ.isfinite().all()
    assert torch.equal(path_KZ[[0, -1]], points_NZ)


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_through_many_points_visits_each_once(kind: PathKind) -> None:
    points_NZ = normal(4, 5)
    path_KZ = path(points_NZ, 6, kind)
    assert len(path_KZ) == 3 * 5 + 1
    assert torch.equal(path_KZ[::5], points_NZ)
    segment = {"slerp": slerp, "lerp": lerp}[kind](points_NZ[1], points_NZ[2], 6)
    assert torch.equal(path_KZ[5:11], segment)


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_the_ends(kind: PathKind) -> None:
    assert torch.equal(path(normal(3, 4), 2, kind), normal(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_does_not_change_its_points(kind: PathKind) -> None:
    points_NZ = normal(2, 4)
    path(points_NZ, 5, kind)[:] = 0
    assert torch.equal(points_NZ, normal(2, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("points", "steps", "words"), [(2, 1, "steps is 1"), (1, 5, "at least 2 latents, found 1")])
def test_a_path_of_one_point_is_refused(kind: PathKind, points: int, steps: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        path(normal(points, 3), steps, kind)
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_path_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="path is 'spline', it must be one of slerp, lerp"):
        path(torch.ones(2, 3), 3, "spline")  # type: ignore[arg-type]
