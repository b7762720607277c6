"""Where a model's nats go: what a better encoder, no free bits, and a better prior could gain it at most.

    python -m tests.benchmarks.latent.gaps gptvae-run TRAIN.txt TEST.txt >> tests/benchmarks/latent/gaps.txt

First the gap between the bound and the likelihood (Cremer et al. 2018, arXiv 1801.03558): the posterior of every one of
`--few` test texts is optimised by itself, with as many nats of KL free as the encoder's have, and with none.
What is left to the importance-weighted NLL is that no posterior is a Gaussian. Its own bound depends on where the
latents are drawn: from the posterior, from a wider one, or in turn from several.

Then the gap between posteriors and prior (Hoffman and Johnson 2016, "ELBO surgery"): KL = information + the distance of
the aggregate posterior from the prior. The aggregate is that of `--many` training texts, and the samples are of test
texts, which are not in it; so the information may be more than ln(texts), and is an overestimate (by Jensen's
inequality), as the distance is an underestimate. Densities fitted to samples of the aggregate show how much of the
distance a learnt prior would find, or at least that much.

At the end what `evaluate` would show of a latent of which every nat is information, whose aggregate posterior is the
prior. The estimate is of texts that are in the aggregate, and so an underestimate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal, kl_divergence

from gptvae_cli.config import TextConfig
from gptvae_cli.data import batches_of
from gptvae_cli.evaluation import PROPOSAL_WIDTHS, importance_weighted
from gptvae_cli.header import locate_model
from gptvae_cli.latent import mutual_information
from gptvae_cli.model import GPTVAE, Posterior
from gptvae_cli.objective import Batch, cross_entropy_BT
from gptvae_cli.sampling import Encoder, open_model
from gptvae_cli.text import read_texts


def gaussian(posterior: Posterior) -> Distribution:
    """The posterior in float64."""
    return Independent(Normal(posterior.mean_BZ.double(), (0.5 * posterior.log_var_BZ.double()).exp()), 1)


def log_prob(distribution: Distribution, value: Tensor) -> Tensor:
    """Which torch does not type."""
    density: Tensor = distribution.log_prob(value)
    return density


def terms(model: GPTVAE, tokens_BT: Tensor, posterior: Posterior, samples: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy given samples of the posterior, and its KL, nats per text [B], [B]."""
    tokens_NT = tokens_BT.repeat(samples, 1)
    many = Posterior(posterior.mean_BZ.repeat(samples, 1), posterior.log_var_BZ.repeat(samples, 1))
    latents_NZ = many.sample(torch.randn(many.mean_BZ.shape))
    nats_N = cross_entropy_BT(model, tokens_NT, latents_NZ).sum(-1)
    return nats_N.view(samples, -1).mean(0), posterior.kl_BZ().sum(-1)


def optimised(model: GPTVAE, tokens_BT: Tensor, start: Posterior, free: float, steps: int = 100) -> Posterior:
    """The posteriors of lowest bound, in which KL up to a mean of `free` costs nothing, as in training."""
    mean_BZ = start.mean_BZ.clone().requires_grad_()
    log_var_BZ = start.log_var_BZ.clone().requires_grad_()
    optimizer = torch.optim.Adam([mean_BZ, log_var_BZ])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        nats_B, kl_B = terms(model, tokens_BT, Posterior(mean_BZ, log_var_BZ), 2)
        optimizer.zero_grad()
        (nats_B.mean() + kl_B.mean().clamp(min=free)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Posterior(mean_BZ.detach(), log_var_BZ.detach())


def inference_gaps(model: GPTVAE, batches: list[Batch]) -> Iterable[str]:
    """A line for the encoder's posteriors, two for better ones, and one for none but the prior's Gaussian."""
    names = ("posteriors of the encoder", "optimised, KL as it was", "optimised, any KL")
    rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in names]
    for batch in batches:
        with torch.no_grad():
            ours = model.posterior(batch.tokens_BT).in_float32()
        kl = float(ours.kl_BZ().sum(-1).mean())
        found = (ours, optimised(model, batch.tokens_BT, ours, kl), optimised(model, batch.tokens_BT, ours, 0.0))
        with torch.no_grad():
            for row, posterior in zip(rows, found, strict=True):
                row.append(terms(model, batch.tokens_BT, posterior, 16))
    for name, row in zip(names, rows, strict=True):
        nats, kl = (float(torch.cat(column).mean()) for column in zip(*row, strict=True))
        yield f"{name:<34}  cross-entropy {nats:6.2f}  KL {kl:5.2f}  bound {nats + kl:6.2f}"
    for widths in ((1.0,), (1.2,), (1.3,), PROPOSAL_WIDTHS, (1.0, 1.2, 1.4)):
        nlls = [float(importance_weighted(model, batches, samples, widths=widths).mean()) for samples in (100, 500)]
        name = f"importance-weighted, {', '.join(map(str, widths))} wide"
        yield f"{name:<34}  K = 100: {nlls[0]:6.2f}  K = 500: {nlls[1]:6.2f}"


def log_aggregate(sample_NZ: Tensor, posterior: Posterior) -> Tensor:
    """The log density of the mean of these posteriors [N]."""
    parts = []
    for start in range(0, len(sample_NZ), 16):
        inside = log_prob(gaussian(posterior), sample_NZ[start : start + 16, None])
        parts.append(inside.logsumexp(-1) - math.log(len(posterior.mean_BZ)))
    return torch.cat(parts)


def prior_gaps(test: Posterior, train: Posterior) -> Iterable[str]:
    """A line for every size of the aggregate, and for the Gaussians that are fitted to it."""
    posterior = gaussian(test)
    sample_NZ = posterior.sample()
    prior = Independent(Normal(torch.zeros_like(sample_NZ), 1.0), 1)
    prior_N = log_prob(prior, sample_NZ)
    yield f"{'KL from the prior':<34}  {float(kl_divergence(posterior, prior).mean()):.2f}"
    count = len(train.mean_BZ)
    for texts in sorted({min(count, 1000), min(count, 10_000), count}):
        aggregate_N = log_aggregate(sample_NZ, Posterior(train.mean_BZ[:texts], train.log_var_BZ[:texts]))
        information = float((log_prob(posterior, sample_NZ) - aggregate_N).mean())
        distance = float((aggregate_N - prior_N).mean())
        yield f"{f'aggregate of {texts:,} texts':<34}  information {information:5.2f}  distance {distance:5.2f}"
    fitted_NZ = gaussian(train).sample()
    mean_Z, covariance_ZZ = fitted_NZ.mean(0), fitted_NZ.T.cov()
    fits: dict[str, Distribution] = {
        "a Gaussian prior, its own widths": Independent(Normal(mean_Z, covariance_ZZ.diagonal().sqrt()), 1),
        "a Gaussian prior, any covariance": MultivariateNormal(mean_Z, covariance_ZZ),
    }
    for name, density in fits.items():
        yield f"{name:<34}  gains {float((log_prob(density, sample_NZ) - prior_N).mean()):.2f}"


def shown(nats: float, width: int, texts: int = 1000) -> float:
    """The information that is estimated over texts whose posteriors have this KL, all of it information."""
    log_var = -2 * nats / width
    mean_NZ = (1 - math.exp(log_var)) ** 0.5 * torch.randn(texts, width)
    log_var_NZ = torch.full_like(mean_NZ, log_var)
    return mutual_information(mean_NZ, log_var_NZ, Posterior(mean_NZ, log_var_NZ).sample(torch.randn_like(mean_NZ)))


def ideal(width: int) -> Iterable[str]:
    """A line for every KL."""
    for nats in (2, 4, 6, 7, 7.9, 9, 12, 16):
        seen = sum(shown(nats, width) for _ in range(5)) / 5
        share = seen / min(nats, math.log(1000))
        yield f"{f'KL {nats}, all of it information':<34}  1,000 texts show {seen:5.2f}, {share:.0%} of what they may"


def posteriors(encoder: Encoder, texts: Iterable[str]) -> Posterior:
    """Of all texts, in order."""
    found = list(encoder.encode(texts))
    std_NZ = torch.stack([torch.from_numpy(encoding.std_Z) for encoding in found])
    return Posterior(torch.stack([torch.from_numpy(encoding.mean_Z) for encoding in found]), 2 * std_NZ.log())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--few", type=int, default=100, help="texts whose posteriors are optimised")
    parser.add_argument("--many", type=int, default=40_000, help="texts of the aggregate")
    asked = parser.parse_args()
    torch.manual_seed(0)
    saved = open_model(locate_model(asked.model), device="cpu").checkpoint
    model, header = saved.model.eval().requires_grad_(False), saved.header
    encoder = Encoder(saved, header.data.unit)
    config = TextConfig(unit=header.data.unit)
    texts = {
        path: list(islice((text for text in read_texts([str(path)], config) if text), count))
        for path, count in ((asked.train, asked.many), (asked.test, 1000))
    }
    steps, seed = header.training["steps"], header.training["train"]["seed"]
    print(f"# {asked.train.name} and {asked.test.name}, {steps:,} steps, seed {seed}, nats per text")
    batches, _ = batches_of(list(encoder.rows(texts[asked.test][: asked.few])), None, header.model.pad_id, 1024)
    for line in inference_gaps(model, batches):
        print(line, flush=True)
    for line in prior_gaps(posteriors(encoder, texts[asked.test]), posteriors(encoder, texts[asked.train])):
        print(line, flush=True)
    for line in ideal(header.model.dim_latent):
        print(line, flush=True)


if __name__ == "__main__":
    main()
