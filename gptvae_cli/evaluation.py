"""What the latent carries: figures of texts, in nats per text.

A text's noise is keyed by its own tokens. So what is measured of it is a function of the text, the model and the
seed, whatever the order of the texts and the batches they are in; but for the cross-entropy with another text's z, of
which it takes one from beside it.

Shapes: B batch, N texts, T tokens, K samples, Z latent width, W proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptvae_cli.config import SampleConfig
from gptvae_cli.constraint import Constraint
from gptvae_cli.decoding import Request, decode
from gptvae_cli.device import autocast, moved, tokens_together
from gptvae_cli.latent import active_dimensions, entropy, mutual_information
from gptvae_cli.model import GPTVAE, Posterior
from gptvae_cli.noise import Purpose, stream
from gptvae_cli.objective import Batch, cross_entropy_BT

Keys = npt.NDArray[np.int64]

PROPOSAL_WIDTHS = (1.0, 1.3)
"""Of the proposals of importance sampling, in standard deviations of the posterior. Encoders learn posteriors that are
too narrow, which the reverse KL prefers to too wide ones; wider ones among the samples find what these leave out
(`tests/benchmarks/latent/gaps.txt`)."""


@dataclass(frozen=True)
class Figures:
    """Means over the texts of one set, in nats per text; EOS is counted as a token and BOS is not.

    Args:
        texts: how many.
        tokens: target tokens, of all of them.
        cross_entropy: given a sample of the text's own posterior.
        cross_entropy_shuffled: given another text's sample.
        cross_entropy_without: given no latent.
        kl: raw KL of the posterior from the prior, never the excess over a floor.
        mutual_information: between text and latent.
        active_001, active_02: dimensions whose posterior mean has a variance above 0.01 and above 0.2.
        entropy: of the texts, in nats: ln(texts) where no two are equal. More information they cannot show.
    """

    texts: int
    tokens: int
    cross_entropy: float
    cross_entropy_shuffled: float
    cross_entropy_without: float
    kl: float
    mutual_information: float
    active_001: int
    active_02: int
    entropy: float

    @property
    def nll_bound(self) -> float:
        """Negative ELBO: an upper bound of the NLL."""
        return self.cross_entropy + self.kl


@dataclass(frozen=True, eq=False)
class TextFigures:
    """What was measured of every text, in the order of the batches: nats per text, float64 [N], on the CPU.

    Args:
        cross_entropy_N, cross_entropy_shuffled_N, cross_entropy_without_N, kl_N: as in `Figures`.
        posterior: of each text, float32 [N Z].
        sample_NZ: the latent that was drawn from it.
    """

    cross_entropy_N: Tensor
    cross_entropy_shuffled_N: Tensor
    cross_entropy_without_N: Tensor
    kl_N: Tensor
    posterior: Posterior
    sample_NZ: Tensor


def measure(
    model: GPTVAE,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    without_latent: bool = False,
) -> Figures:
    """Figures over these batches; two calls agree.

    Args:
        model: is put into eval mode and left as it was.
        batches: of whole texts, on any device.
        seed: of the latents' noise.
        dtype: bfloat16 computes under autocast.
        without_latent: the model has not learnt what a latent is: its decoder alone is measured, and what the latent
            carries, and costs, is 0.
    """
    tokens = sum(batch.target_tokens for batch in batches)
    if without_latent:
        nats_N = measure_without_latent(model, batches, dtype=dtype)
        mean = float(nats_N.mean())
        return Figures(
            texts=len(nats_N),
            tokens=tokens,
            cross_entropy=mean,
            cross_entropy_shuffled=mean,
            cross_entropy_without=mean,
            kl=0.0,
            mutual_information=0.0,
            active_001=0,
            active_02=0,
            entropy=entropy(read_keys_of(batches, model.pad_id)),
        )
    found = measure_texts(model, batches, seed=seed, dtype=dtype)
    mean_NZ = found.posterior.mean_BZ
    return Figures(
        texts=len(mean_NZ),
        tokens=tokens,
        cross_entropy=float(found.cross_entropy_N.mean()),
        cross_entropy_shuffled=float(found.cross_entropy_shuffled_N.mean()),
        cross_entropy_without=float(found.cross_entropy_without_N.mean()),
        kl=float(found.kl_N.mean()),
        mutual_information=mutual_information(mean_NZ, found.posterior.log_var_BZ, found.sample_NZ),
        active_001=active_dimensions(mean_NZ, 0.01),
        active_02=active_dimensions(mean_NZ, 0.2),
        entropy=entropy(read_keys_of(batches, model.pad_id)),
    )


@torch.no_grad()
def measure_texts(
    model: GPTVAE, batches: Sequence[Batch], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> TextFigures:
    """What `measure` takes the mean of, with the same arguments."""
    with _evaluating(model, dtype):
        posteriors = [model.posterior(batch.encoder_BT.to(model.device)).in_float32() for batch in batches]
        posterior = Posterior(torch.cat([p.mean_BZ for p in posteriors]), torch.cat([p.log_var_BZ for p in posteriors]))
        keys_N = np.concatenate([keys_of(batch, model.pad_id) for batch in batches])
        noise = [stream(seed, Purpose.VALIDATION, int(key)) for key in keys_N]
        noise_NZ = torch.from_numpy(np.stack([n.standard_normal(model.dim_latent, dtype="float32") for n in noise]))
        sample_NZ = posterior.sample(noise_NZ.to(model.device))
        lengths_N = torch.cat([(batch.encoder_BT != model.pad_id).sum(-1) for batch in batches]).cpu().numpy()
        others_N = _others(read_keys_of(batches, model.pad_id), lengths_N)
        others_NZ = sample_NZ[torch.from_numpy(others_N).to(model.device)]
        right, shuffled, without = [], [], []
        start = 0
        for batch in batches:
            batch = batch.to(model.device)
            here = slice(start, start + len(batch.tokens_BT))
            start = here.stop
            nobody_B = torch.zeros(len(batch.tokens_BT), dtype=torch.bool, device=model.device)
            right.append(_nats_B(model, batch.tokens_BT, sample_NZ[here]))
            shuffled.append(_nats_B(model, batch.tokens_BT, others_NZ[here]))
            without.append(_nats_B(model, batch.tokens_BT, sample_NZ[here], nobody_B))
    return TextFigures(
        cross_entropy_N=torch.cat(right).cpu(),
        cross_entropy_shuffled_N=torch.cat(shuffled).cpu(),
        cross_entropy_without_N=torch.cat(without).cpu(),
        kl_N=posterior.kl_BZ().double().sum(-1).cpu(),
        posterior=Posterior(posterior.mean_BZ.cpu(), posterior.log_var_BZ.cpu()),
        sample_NZ=sample_NZ.cpu(),
    )


@torch.no_grad()
def measure_without_latent(model: GPTVAE, batches: Sequence[Batch], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nats of every text for a model that was trained without a latent, float64 [N]; this is its exact NLL.

    Args:
        model: is put into eval mode and left as it was.
        batches: of whole texts, on any device.
        dtype: bfloat16 computes under autocast.
    """
    with _evaluating(model, dtype):
        return torch.cat([_nats_B(model, batch.to(model.device).tokens_BT, None).cpu() for batch in batches])


@torch.no_grad()
def importance_weighted(
    model: GPTVAE,
    batches: Sequence[Batch],
    samples: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    widths: Sequence[float] = PROPOSAL_WIDTHS,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Tensor:
    """NLL of every text by importance sampling around its posterior, float64 [N], on the CPU.

    It is minus the log of the mean weight of `samples` latents. The proposals, posteriors of different widths, take
    turns, and every latent is weighed by the mixture of all of them (the balance heuristic), which leaves the mean
    unbiased: so the expectation bounds the NLL from above, as with the posterior alone, and falls towards it as the
    samples grow. One sample gives the ELBO.

    Args:
        model: is put into eval mode and left as it was.
        batches: of whole texts, on any device.
        samples: K, latents of each text.
        seed: of the latents' noise.
        dtype: bfloat16 computes under autocast; weights are always summed in float64.
        widths: of the proposals, in standard deviations of the posterior.
        on_progress: called with the texts measured so far; half of the latents of some are half of these.

    Source: Burda et al. 2015 (arXiv 1509.00519), eq. 8; the balance heuristic is of Veach and Guibas 1995, "Optimally
    combining sampling techniques for Monte Carlo rendering".
    """
    nll: list[Tensor] = []
    width_K = torch.tensor([widths[i % len(widths)] for i in range(samples)], dtype=torch.float32, device=model.device)
    width_W = torch.tensor(widths, dtype=torch.float64, device=model.device)
    share_W = width_W.new_tensor([len(range(first, samples, len(widths))) / samples for first in range(len(widths))])
    log_share_W = share_W.log() - model.dim_latent * width_W.log()
    with _evaluating(model, dtype):
        for batch in batches:
            random = [stream(seed, Purpose.IMPORTANCE, int(key)) for key in keys_of(batch, model.pad_id)]
            batch = batch.to(model.device)
            posterior = model.posterior(batch.encoder_BT).in_float32()
            done, rows = sum(map(len, nll)), len(batch.tokens_BT)
            together = max(1, tokens_together(model.device) // batch.tokens_BT.numel())
            log_weights: list[Tensor] = []
            for first in range(0, samples, together):
                count = min(together, samples - first)
                shape = (count, model.dim_latent)
                noise = np.stack([text.standard_normal(shape, dtype="float32") for text in random], axis=1)
                noise_KBZ = moved(torch.from_numpy(noise), model.device) * width_K[first : first + count, None, None]
                latents_KBZ = posterior.sample(noise_KBZ)
                nats_N = _nats_B(model, batch.tokens_BT.repeat(count, 1), latents_KBZ.flatten(0, 1))
                # log p(z) - log q(z | text); the normalising constants cancel but for the variances'.
                distance_KB1 = 0.5 * noise_KBZ.double().square().sum(-1, keepdim=True)
                log_proposals_KB = (log_share_W - distance_KB1 / width_W.square()).logsumexp(-1)
                half_KBZ = 0.5 * (posterior.log_var_BZ.double() - latents_KBZ.double().square())
                ratio_KB = half_KBZ.sum(-1) - log_proposals_KB
                log_weights.append(ratio_KB - nats_N.view(count, rows))
                on_progress(done + rows * (first + count) // samples)
            nll.append(math.log(samples) - torch.cat(log_weights).logsumexp(dim=0).cpu())
    return torch.cat(nll)


def keys_of(batch: Batch, pad_id: int) -> Keys:
    """A number for every text that depends on nothing but its tokens, and what the encoder reads where that differs."""
    keys_B = _keys(batch.tokens_BT, pad_id)
    # Texts that share a source have noise of their own; one key is doubled to tell A read from B and B read from A.
    return keys_B if batch.source_BT is None else (2 * keys_B + _keys(batch.source_BT, pad_id)) & (2**63 - 1)


def read_keys_of(batches: Sequence[Batch], pad_id: int) -> Keys:
    """A number for every text that depends on nothing but what the encoder reads of it: of its latent."""
    return np.concatenate([_keys(batch.encoder_BT, pad_id) for batch in batches])


def _keys(tokens_BT: Tensor, pad_id: int) -> Keys:
    rows = (row_T[row_T != pad_id] for row_T in tokens_BT.cpu().numpy())
    digests = b"".join(blake2b(row_T.tobytes(), digest_size=8).digest() for row_T in rows)
    # Not above 2^63: NumPy makes a float of a list that holds both small and larger numbers, and Philox takes a list.
    return (np.frombuffer(digests, dtype="<u8") >> 1).astype(np.int64)


def _others(keys_N: Keys, lengths_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For every text the place of another one, which is not equal and about as long: the next shorter one, of
    the shortest the longest, and of equal texts alone the first [N]."""
    order = np.lexsort((keys_N, lengths_N))
    new = np.append(True, keys_N[order[1:]] != keys_N[order[:-1]])
    first_of_group = order[new]
    others_N = np.empty_like(order)
    others_N[order] = first_of_group[np.cumsum(new) - 2]  # of the group before; the first group has the last one's
    return others_N


def _nats_B(model: GPTVAE, tokens_BT: Tensor, latents_BZ: Tensor | None, keep_B: Tensor | None = None) -> Tensor:
    """Cross-entropy of every row in float64."""
    return cross_entropy_BT(model, tokens_BT, latents_BZ, keep_B=keep_B).double().sum(-1)


@contextmanager
def _evaluating(model: GPTVAE, dtype: torch.dtype) -> Iterator[None]:
    """Eval mode, frozen, and autocast for bfloat16; the model is then left in the mode it was in."""
    with model.evaluating(), autocast(model.device, dtype), model.frozen():
        yield


# Reconstruction -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(model: GPTVAE, tokens_BT: Tensor, *, constraint: Constraint | None = None) -> list[list[int]]:
    """The greedy text of each row's posterior mean: tokens without BOS and EOS.

    Args:
        model: is left in the mode it was in.
        tokens_BT: what the encoder reads, `BOS text EOS`, padded.
        constraint: as `decoding.decode` takes it.
    """
    with _evaluating(model, torch.float32):
        mean_BZ = model.posterior(tokens_BT.to(model.device)).mean_BZ
        return write_greedily(model, mean_BZ, constraint=constraint)


@torch.no_grad()
def write_greedily(
    model: GPTVAE,
    latents_NZ: Tensor,
    *,
    constraint: Constraint | None,
    guidance: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[list[int]]:
    """The greedy text of each latent: tokens without BOS and EOS.

    Args:
        model: is left in the mode it was in.
        latents_NZ: on the model's device.
        constraint: as `decoding.decode` takes it.
        guidance: see `SampleConfig`.
        dtype: bfloat16 computes under autocast.
    """
    requests = (Request(row, 0, latent_Z) for row, latent_Z in enumerate(latents_NZ))
    with _evaluating(model, dtype):
        return list(decode(model, requests, SampleConfig(greedy=True, guidance=guidance), constraint=constraint))


def correct_tokens(text: Sequence[int], written: Sequence[int], whole: bool = True) -> int:
    """How many of a text's tokens stand at the same place in what was written, and its end, where it is `whole`: a text
    that is cut has none. Both are without BOS and EOS."""
    ends_alike = whole and len(text) == len(written)
    return sum(a == b for a, b in zip(text, written, strict=False)) + ends_alike
