"""The mathematics of a Gaussian latent: pure functions over tensors.

Shapes: B batch, N texts of a set, C of them at a time, Z latent width, K path steps.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptvae_cli.config import PathKind
from gptvae_cli.errors import ConfigError

LEAST_NATS = 1.0
"""Nats per text: the least information of a latent in use, and the least that another text's costs the decoder."""


def reparameterize(mean_BZ: Tensor, log_var_BZ: Tensor, noise_BZ: Tensor) -> Tensor:
    """A sample `mean + std * noise` that gradients flow through [B Z].

    Source: Kingma and Welling 2013 (arXiv 1312.6114), eq. 4.
    """
    return mean_BZ + (0.5 * log_var_BZ).exp() * noise_BZ


def kl_to_standard_normal(mean_BZ: Tensor, log_var_BZ: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) of every dimension, in nats [B Z].

    Source: Kingma and Welling 2013 (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (log_var_BZ.exp() + mean_BZ.square() - log_var_BZ - 1.0)


def free_bits(mean_kl_Z: Tensor, *, floor: float, rate: float) -> Tensor:
    """KL with a floor under every dimension, and one under their sum, in nats per text (a scalar).

    Args:
        mean_kl_Z: KL of every dimension, nats; the mean over a batch is taken before the floor, so that a dimension may
            tell texts apart by spending more on one than on another.
        floor: nats per dimension that cost nothing.
        rate: nats per text that cost nothing, of all dimensions together.

    Source: Kingma et al. 2016 (arXiv 1606.04934), eq. 15, for the first.
    """
    return mean_kl_Z.clamp(min=floor).sum().clamp(min=rate)


def mutual_information(mean_NZ: Tensor, log_var_NZ: Tensor, sample_NZ: Tensor, *, chunk: int = 256) -> float:
    """Monte Carlo estimate of I(text; z) in nats, under the aggregate posterior of these N texts.

    It is the mean of `pointwise_information`. It cannot exceed ln N, so judge it against min(KL, ln N).

    Source: Hoffman and Johnson 2016, "ELBO surgery"; Dieng et al. 2019 (arXiv 1807.04863), eq. 8.
    """
    return float(pointwise_information(mean_NZ, log_var_NZ, sample_NZ, chunk=chunk).mean())


def pointwise_information(mean_NZ: Tensor, log_var_NZ: Tensor, sample_NZ: Tensor, *, chunk: int = 256) -> Tensor:
    """What one sample z_i tells of its text, log q(z_i | x_i) - log (1/N sum_j q(z_i | x_j)), in nats [N].

    Args:
        mean_NZ, log_var_NZ: posteriors of the texts.
        sample_NZ: one sample of each.
        chunk: samples that are looked at together.
    """
    mean_NZ, log_var_NZ, sample_NZ = mean_NZ.double(), log_var_NZ.double(), sample_NZ.double()
    inverse_var_NZ = (-log_var_NZ).exp()
    # The quadratic form sum_z (s - m)^2 / v is expanded into matrix products: N x N x Z would not fit.
    scale_N = (mean_NZ.square() * inverse_var_NZ + log_var_NZ).sum(-1)
    found = []
    for start in range(0, len(sample_NZ), chunk):
        sample_CZ = sample_NZ[start : start + chunk]
        log_density_CN = -0.5 * (
            sample_CZ.square() @ inverse_var_NZ.T - 2 * sample_CZ @ (mean_NZ * inverse_var_NZ).T + scale_N
        )
        own_C = log_density_CN.diagonal(offset=start)
        found.append(own_C - torch.logsumexp(log_density_CN, dim=-1))
    return torch.cat(found) + math.log(len(sample_NZ))


def has_collapsed(information: float, most: float, least: float = LEAST_NATS) -> bool:
    """Whether a latent carries next to nothing: less than a nat, or, where a few texts cannot show as much, than half
    of what they can.

    Args:
        information: mutual information of latent and text, in nats.
        most: that the texts can show which it was estimated over, see `entropy`.
        least: in place of the nat.
    """
    return most > 0 and information < min(least, 0.5 * most)


def entropy(keys_N: npt.NDArray[np.int64]) -> float:
    """What the mutual information over texts can be at most: their entropy in nats, ln N where no two are equal.

    Args:
        keys_N: of the texts; equal texts have equal ones.
    """
    shares = np.unique(keys_N, return_counts=True)[1] / len(keys_N)
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def active_dimensions(mean_NZ: Tensor, threshold: float) -> int:
    """Dimensions whose posterior mean varies over the texts by more than `threshold` (a variance).

    Source: Burda et al. 2015 (arXiv 1509.00519), section 5.2, with 0.01.
    """
    return int((mean_NZ.var(dim=0, unbiased=False) > threshold).sum())


def lerp(start_Z: Tensor, end_Z: Tensor, steps: int) -> Tensor:
    """Points on the straight line between two latents, both ends counted and exact [K Z]."""
    weight_K1 = _weights(steps).to(start_Z)
    path_KZ: Tensor = start_Z + weight_K1 * (end_Z - start_Z)
    path_KZ[-1] = end_Z
    return path_KZ


def slerp(start_Z: Tensor, end_Z: Tensor, steps: int) -> Tensor:
    """Points on the arc between two latents: angle spherical, norm linear; both ends counted and exact [K Z].

    A straight line between two draws of a wide Gaussian passes through its empty middle, an arc does not.
    Where no arc is defined (parallel, opposite or zero ends) the path is the straight line.

    Source: Shoemake 1985; White 2016 (arXiv 1609.04468) for latents.
    """
    start_norm, end_norm = start_Z.double().norm(), end_Z.double().norm()
    if start_norm == 0 or end_norm == 0:
        return lerp(start_Z, end_Z, steps)
    start_unit_Z, end_unit_Z = start_Z.double() / start_norm, end_Z.double() / end_norm
    # The half-angle form keeps its digits near 0 and pi, where acos of the dot product loses half of them.
    angle = 2 * torch.atan2((start_unit_Z - end_unit_Z).norm(), (start_unit_Z + end_unit_Z).norm())
    if angle.sin() < 1e-6:
        return lerp(start_Z, end_Z, steps)
    weight_K1 = _weights(steps).double().to(start_Z.device)
    direction_KZ = ((1 - weight_K1) * angle).sin() * start_unit_Z + (weight_K1 * angle).sin() * end_unit_Z
    norm_K1 = (1 - weight_K1) * start_norm + weight_K1 * end_norm
    path_KZ: Tensor = (norm_K1 * direction_KZ / angle.sin()).to(start_Z)
    path_KZ[0], path_KZ[-1] = start_Z, end_Z
    return path_KZ


def path(points_NZ: Tensor, steps: int, kind: PathKind) -> Tensor:
    """A path through N points in order; `steps` counts both ends of every segment, joints appear once.

    Args:
        points_NZ: at least two latents.
        steps: points of one segment, at least 2.

    Returns:
        ((N - 1) * (steps - 1) + 1 latents) [K Z].

    Raises:
        ConfigError: for fewer points or steps, or another kind of path.
    """
    if kind not in get_args(PathKind):
        raise ConfigError(f"path is {kind!r}, it must be one of {', '.join(get_args(PathKind))}")
    if len(points_NZ) < 2:
        raise ConfigError(f"a path needs at least 2 latents, found {len(points_NZ)}")
    between = slerp if kind == "slerp" else lerp
    segments = [between(a, b, steps) for a, b in pairwise(points_NZ)]
    return torch.cat([segments[0], *(segment[1:] for segment in segments[1:])])


def _weights(steps: int) -> Tensor:
    if steps < 2:
        raise ConfigError(f"steps is {steps}, it must be at least 2: both ends are counted")
    return torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
