"""What the latent carries: figures over a held-out set, in nats per text.

Shapes: B batch, N texts, T tokens, Z latent width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gptvae_cli.config import SampleConfig
from gptvae_cli.data import batches_of
from gptvae_cli.decoding import Request, decode
from gptvae_cli.latent import COLLAPSED_NATS, active_dimensions, mutual_information
from gptvae_cli.model import GPTVAE, Posterior
from gptvae_cli.noise import Purpose, stream
from gptvae_cli.objective import Batch, Noise, cross_entropy_BT
from gptvae_cli.tokenizer import Tokenizer


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
        mutual_information: between text and latent, at most ln(texts).
        active_001, active_02: dimensions whose posterior mean has a variance above 0.01 and above 0.2.
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

    @property
    def nll_bound(self) -> float:
        """Negative ELBO: an upper bound of the NLL."""
        return self.cross_entropy + self.kl

    @property
    def collapsed(self) -> bool:
        """Whether the latent carries next to nothing."""
        return self.mutual_information < COLLAPSED_NATS


@dataclass(frozen=True)
class Reconstruction:
    """How well greedy texts from the posterior mean give the texts back.

    Args:
        texts: how many.
        token_accuracy: share of the texts' tokens, ends counted, that stand at the same place.
        exact: share of the texts that came back whole.
    """

    texts: int
    token_accuracy: float
    exact: float


def compare(texts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> Reconstruction:
    """Texts beside what was written from their latents, both as tokens without BOS and EOS."""
    correct = tokens = exact = 0
    for text, other in zip(texts, written, strict=True):
        tokens += len(text) + 1
        correct += sum(a == b for a, b in zip(text, other, strict=False)) + (len(text) == len(other))
        exact += list(text) == list(other)
    return Reconstruction(len(texts), correct / tokens, exact / len(texts))


@torch.no_grad()
def reconstruct(model: GPTVAE, rows: Sequence[Tensor], *, banned: Sequence[int] = ()) -> list[list[int]]:
    """The greedy text of each row's posterior mean: tokens without BOS and EOS.

    Args:
        model: is left in the mode it was in.
        rows: what the encoder reads, `BOS text EOS`, one tensor [T] a text.
        banned: tokens that are never written.
    """
    config = model.config
    assert config is not None
    was_training = model.training
    model.eval()
    try:
        tokens_BT = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=config.pad_id)
        mean_BZ = model.posterior(tokens_BT.to(model.device)).mean_BZ
        requests = (Request(row, 0, (), latent_Z) for row, latent_Z in enumerate(mean_BZ))
        return list(decode(model, requests, SampleConfig(greedy=True), banned=banned))
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Likelihood:
    """Mean negative log-likelihood over texts, nats per text, and the standard error of that mean over the texts."""

    texts: int
    nll: float
    standard_error: float


@torch.no_grad()
def importance_weighted(
    model: GPTVAE,
    batches: Sequence[Batch],
    samples: int,
    *,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    most_rows: int = 1024,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Likelihood:
    """NLL by importance sampling with the posterior as proposal, the log of the mean weight of `samples` latents.

    Its expectation bounds the NLL from above and falls towards it as the samples grow; one sample gives the ELBO.

    Args:
        model: is put into eval mode and left as it was.
        batches: of whole texts, on any device.
        samples: K, latents of each text.
        seed: of the latents' noise.
        precision: bfloat16 computes under autocast; weights are always summed in float64.
        most_rows: texts times samples that the decoder reads at once.
        on_progress: called with the texts measured so far.

    Source: Burda et al. 2015 (arXiv 1509.00519), eq. 8.
    """
    was_training = model.training
    model.eval()
    random = stream(seed, Purpose.IMPORTANCE)
    nll: list[Tensor] = []
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            for batch in batches:
                batch = batch.to(model.device)
                posterior = model.posterior(batch.encoder_BT).in_float32()
                rows = len(batch.tokens_BT)
                together = max(1, most_rows // rows)
                log_weights: list[Tensor] = []
                for first in range(0, samples, together):
                    count = min(together, samples - first)
                    shape = (count, rows, model.dim_latent)
                    noise_KBZ = torch.from_numpy(random.standard_normal(shape, dtype="float32")).to(model.device)
                    latents_KBZ = posterior.sample(noise_KBZ)
                    tokens_NT = batch.tokens_BT.repeat(count, 1)
                    nats_NT = cross_entropy_BT(model, tokens_NT, latents_KBZ.flatten(0, 1), Noise(noise_KBZ))
                    # log p(z) - log q(z | text); the normalising constants cancel but for the variance's.
                    ratio_KB = 0.5 * (
                        noise_KBZ.double().square() - latents_KBZ.double().square() + posterior.log_var_BZ.double()
                    ).sum(-1)
                    log_weights.append(ratio_KB - nats_NT.double().sum(-1).view(count, rows))
                nll.append(math.log(samples) - torch.cat(log_weights).logsumexp(dim=0))
                on_progress(sum(map(len, nll)))
    finally:
        model.train(was_training)
    nll_N = torch.cat(nll)
    error = float(nll_N.std() / math.sqrt(len(nll_N))) if len(nll_N) > 1 else math.inf
    return Likelihood(len(nll_N), float(nll_N.mean()), error)


@torch.no_grad()
def measure(
    model: GPTVAE, batches: Sequence[Batch], *, seed: int = 0, precision: torch.dtype = torch.float32
) -> Figures:
    """Figures over these batches; the noise is a function of the seed alone, so that two calls agree.

    Args:
        model: is put into eval mode and left as it was.
        batches: of whole texts, in order of length, on any device.
        seed: of the latents' noise.
        precision: bfloat16 computes under autocast.
    """
    was_training = model.training
    model.eval()
    texts = sum(len(batch.tokens_BT) for batch in batches)
    noise_NZ = torch.from_numpy(
        stream(seed, Purpose.VALIDATION).standard_normal((texts, model.dim_latent), dtype="float32")
    ).to(model.device)
    sums = dict.fromkeys(("right", "shuffled", "without"), 0.0)
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            posteriors = [model.posterior(batch.encoder_BT.to(model.device)).in_float32() for batch in batches]
            everything = Posterior(
                torch.cat([p.mean_BZ for p in posteriors]), torch.cat([p.log_var_BZ for p in posteriors])
            )
            latents_NZ = everything.sample(noise_NZ)
            # Batches are in order of length, so the neighbour is another text of about the same length. It may be of
            # another batch: one of a single row would else be given its own latent.
            others_NZ = latents_NZ.roll(1, dims=0)
            start = 0
            for batch in batches:
                batch = batch.to(model.device)
                here = slice(start, start + len(batch.tokens_BT))
                start = here.stop
                nobody_B = torch.zeros(len(batch.tokens_BT), dtype=torch.bool, device=model.device)
                for name, z_BZ, keep_B in (
                    ("right", latents_NZ[here], None),
                    ("shuffled", others_NZ[here], None),
                    ("without", latents_NZ[here], nobody_B),
                ):
                    nats_BT = cross_entropy_BT(model, batch.tokens_BT, z_BZ, Noise(z_BZ, keep_B))
                    sums[name] += float(nats_BT.double().sum())
    finally:
        model.train(was_training)
    return Figures(
        texts=texts,
        tokens=sum(batch.target_tokens for batch in batches),
        cross_entropy=sums["right"] / texts,
        cross_entropy_shuffled=sums["shuffled"] / texts,
        cross_entropy_without=sums["without"] / texts,
        kl=float(everything.kl_BZ().double().sum(-1).mean()),
        mutual_information=mutual_information(everything.mean_BZ, everything.log_var_BZ, latents_NZ),
        active_001=active_dimensions(everything.mean_BZ, 0.01),
        active_02=active_dimensions(everything.mean_BZ, 0.2),
    )


@dataclass(frozen=True)
class Report:
    """All figures of a model on one set of texts.

    Args:
        words: separated by whitespace; the end of a text counts as one.
        bytes: of UTF-8; the end of a text counts as one.
        samples: of each text's importance-weighted likelihood.
        seed: of the latents that were drawn.
    """

    figures: Figures
    likelihood: Likelihood
    reconstruction: Reconstruction
    words: int
    bytes: int
    samples: int
    seed: int

    @property
    def information_share(self) -> float:
        """Mutual information over the most that could be seen, min(KL, ln texts)."""
        return self.figures.mutual_information / max(1e-9, min(self.figures.kl, math.log(self.figures.texts)))

    @property
    def perplexity_per_token(self) -> float:
        return self._perplexity(self.figures.tokens)

    @property
    def perplexity_per_word(self) -> float:
        return self._perplexity(self.words)

    @property
    def bits_per_byte(self) -> float:
        return self.likelihood.nll * self.figures.texts / self.bytes / math.log(2)

    def _perplexity(self, count: int) -> float:
        return math.exp(min(700.0, self.likelihood.nll * self.figures.texts / count))

    def efficiency(self, baseline_nll: float) -> float:
        """Nats that the latent saves the decoder, against a model without one, for each nat of KL."""
        return (baseline_nll - self.figures.cross_entropy) / max(1e-9, self.figures.kl)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        derived = ("information_share", "perplexity_per_token", "perplexity_per_word", "bits_per_byte")
        return {
            **asdict(self.figures),
            "nll_bound": self.figures.nll_bound,
            "collapsed": self.figures.collapsed,
            "iw_nll": self.likelihood.nll,
            "iw_standard_error": self.likelihood.standard_error,
            "iw_samples": self.samples,
            **{name: getattr(self, name) for name in derived},
            "words": self.words,
            "bytes": self.bytes,
            "reconstruction": asdict(self.reconstruction),
            "seed": self.seed,
        }


def evaluate(
    model: GPTVAE,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None = None,
    *,
    samples: int,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
    banned: Sequence[int] = (),
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Report:
    """Every figure over these texts.

    Args:
        model: with a config.
        tokenizer: of the model.
        rows: texts as tokens with their specials, what the decoder writes; at least one.
        sources: what the encoder reads, if not the same.
        samples: K of the importance-weighted likelihood.
        seed: of the latents that are drawn.
        precision: bfloat16 computes under autocast.
        banned: tokens that a reconstruction never holds.
        on_progress: called with the texts measured so far, in the longest part.
    """
    config = model.config
    assert config is not None
    batches = batches_of(rows, sources, config.pad_id, 8192)
    figures = measure(model, batches, seed=seed, precision=precision)
    likelihood = importance_weighted(model, batches, samples, seed=seed, precision=precision, on_progress=on_progress)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        written = reconstruct(model, [torch.tensor(row) for row in sources or rows], banned=banned)
    plain = [[token for token in row if token not in (config.bos_id, config.eos_id)] for row in rows]
    texts = [tokenizer.decode(ids) for ids in plain]
    ends = sum(row[-1] == config.eos_id for row in rows)
    return Report(
        figures=figures,
        likelihood=likelihood,
        reconstruction=compare(plain, written),
        words=sum(len(text.split()) for text in texts) + ends,
        bytes=sum(len(text.encode("utf-8")) for text in texts) + ends,
        samples=samples,
        seed=seed,
    )
