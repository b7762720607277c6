"""The training objective, in nats per target token.

    total = (sum of cross-entropy over all rows
             + beta * sum of KL over the rows that kept their latent
             + weight * sum of bag-of-words cross-entropy) / target tokens

Cross-entropy and KL are both sums, so that beta = 1 is the evidence lower bound whatever the length of the texts.
The seed class adds a mean per token to a sum per row instead, which is a beta of about the length of a text; it is
kept, as `objective="stock"`, to reproduce and to compare.

Shapes: B batch, T tokens, N tokens of all rows, C of them at a time, D model width, Z latent width, V vocabulary, L
places of dropout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptvae_cli.device import moved
from gptvae_cli.latent import free_bits
from gptvae_cli.model import GPTVAE
from gptvae_cli.schedule import Weights


@dataclass(frozen=True)
class Batch:
    """Rows `BOS text EOS`, padded behind, and what the encoder reads where that is another text.

    Args:
        tokens_BT: what the decoder learns to write, and what the encoder reads unless `source_BT` is given.
        source_BT: what the encoder reads instead.
        target_tokens: tokens to predict: all but BOS and padding.
    """

    tokens_BT: Tensor
    source_BT: Tensor | None
    target_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        source_BT = None if self.source_BT is None else moved(self.source_BT, device)
        return Batch(moved(self.tokens_BT, device), source_BT, self.target_tokens)

    @property
    def encoder_BT(self) -> Tensor:
        """What the encoder reads."""
        return self.tokens_BT if self.source_BT is None else self.source_BT


@dataclass(frozen=True)
class Noise:
    """Everything random in one pass over a batch.

    Args:
        latent_BZ: standard normal.
        keep_B: True where the decoder sees the latent; None where every row does.
        hide_BT: True where the decoder's input token is hidden (word dropout); None hides nothing.
        drop_LBD: the decoder's dropout, see `GPTVAE.hidden`; None drops nothing.
    """

    latent_BZ: Tensor
    keep_B: Tensor | None = None
    hide_BT: Tensor | None = None
    drop_LBD: Tensor | None = None

    def to(self, device: torch.device) -> Noise:
        """The same noise on another device."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return Noise(**{name: moved(value, device) for name, value in tensors.items() if value is not None})


@dataclass(frozen=True)
class Terms:
    """One pass over a batch: what to differentiate, and the sums to report, which are detached.

    Args:
        total: the objective's share of this batch, nats per target token of the whole step.
        cross_entropy: sum over all rows, nats.
        kl: raw KL, sum over all rows, nats; never the excess over a floor.
        bag_of_words: sum over all rows, nats.
    """

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor
    bag_of_words: Tensor


class BagOfWords(nn.Module):
    """Predicts a text's tokens, without their order, from its latent alone. It teaches the encoder while the decoder
    does not listen yet, and is thrown away after training.

    Source: Zhao et al. 2017 (arXiv 1703.10960), eq. 5.
    """

    def __init__(self, dim_latent: int, num_tokens: int) -> None:
        super().__init__()
        self.to_logits = nn.Linear(dim_latent, num_tokens)

    def forward(self, latents_BZ: Tensor, tokens_BT: Tensor, ignore: tuple[int, ...]) -> Tensor:
        """Sum of the cross-entropy of the tokens that are not ignored, in nats."""
        log_probs_BV = self.to_logits(latents_BZ).float().log_softmax(dim=-1)
        counted_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        for token in ignore:
            counted_BT &= tokens_BT != token
        nats: Tensor = -(log_probs_BV.gather(1, tokens_BT) * counted_BT).sum()
        return nats


def cross_entropy_BT(
    model: GPTVAE, tokens_BT: Tensor, latents_BZ: Tensor | None, keep_B: Tensor | None = None
) -> Tensor:
    """Nats of every token but the first, given those before it and the latent, where it is kept; 0 at padding
    [B T-1]."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    hidden_BTD = model.hidden(inputs_BT, latents_BZ, keep_B)
    rows, _ = _logit_rows(hidden_BTD.device, len(model.decoder.to_logits.weight))
    parts = zip(torch.split(hidden_BTD.flatten(0, 1), rows), torch.split(targets_BT.flatten(), rows), strict=True)
    nats = [
        F.cross_entropy(model.logits(hidden_CD), targets_C, ignore_index=model.pad_id, reduction="none")
        for hidden_CD, targets_C in parts
    ]
    return torch.cat(nats).view_as(targets_BT)


def summed_cross_entropy(model: GPTVAE, tokens_BT: Tensor, latents_BZ: Tensor | None, noise: Noise) -> Tensor:
    """The sum of `cross_entropy_BT`, for training: under noise, and the logits of all tokens are never there at once (a
    scalar)."""
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    if noise.hide_BT is not None:
        hide_BT = noise.hide_BT[:, : inputs_BT.shape[1]].clone()
        hide_BT[:, 0] = False  # BOS stays: it is what says that a text begins
        inputs_BT = inputs_BT.masked_fill(hide_BT, model.pad_id)
    hidden_BTD = model.hidden(inputs_BT, latents_BZ, noise.keep_B, noise.drop_LBD)
    nats: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_BTD.flatten(0, 1), model.decoder.to_logits.weight, targets_BT.flatten(), model.pad_id
    )
    return nats


_LOGITS_TOGETHER = {"cpu": (2**23, 2**18), "cuda": (2**26, 2**26)}
"""How many logits one product makes, and how many of them are normalised at once. On a CPU the first number is large,
since after every product the gradient of all weights is added to, and the second fits in the cache; a GPU wants few
kernels, and the logits take a quarter of a gigabyte there."""

_WORDS_TOGETHER = 8
"""The vocabulary is padded to a multiple of this. In float32 MKL is faster then (row `loss` of
`tests/benchmarks/speed/`), and a GPU's matrix units want whole eights."""


def _logit_rows(device: torch.device, words: int) -> tuple[int, int]:
    """How many rows one product makes the logits of, and how many of these are normalised at once."""
    product, few = _LOGITS_TOGETHER.get(device.type, _LOGITS_TOGETHER["cuda"])
    return max(1, product // words), max(1, few // words)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of `hidden @ weight.T`, a few rows at a time.

    The gradient is the probabilities less the targets, which are at hand while the loss is computed; so it is computed
    there, and neither logits nor probabilities are kept. In bfloat16 on a CPU core this takes little more than
    half the time of the product and `F.cross_entropy` (`tests/benchmarks/speed/`).

    Source: Wijmans et al. 2024 (arXiv 2411.09009), without its sorting and filtering.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, pad_id: int) -> Tensor:
        device, words = hidden_ND.device.type, len(weight_VD)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        exact = torch.promote_types(dtype, torch.float32)
        inputs_ND, matrix_VD = hidden_ND.to(dtype), F.pad(weight_VD.to(dtype), (0, 0, 0, -words % _WORDS_TOGETHER))
        real_N1 = (targets_N != pad_id)[:, None]
        targets_N1 = targets_N[:, None].masked_fill(~real_N1, 0)
        hidden_grad_ND = torch.empty_like(inputs_ND)
        weight_grad_VD = torch.zeros_like(matrix_VD, dtype=weight_VD.dtype)
        nats = hidden_ND.new_zeros((), dtype=exact)
        product_rows, few_rows = _logit_rows(hidden_ND.device, words)
        for start in range(0, len(inputs_ND), product_rows):
            here = slice(start, start + product_rows)
            logits_CV = F.linear(inputs_ND[here], matrix_VD)
            parts = (
                torch.split(tensor, few_rows) for tensor in (logits_CV[:, :words], targets_N1[here], real_N1[here])
            )
            for part_CV, targets_C1, real_C1 in zip(*parts, strict=True):
                probs_CV = part_CV.to(exact)
                largest_C1 = probs_CV.amax(dim=-1, keepdim=True)
                target_C1 = probs_CV.gather(1, targets_C1)
                sum_C1 = probs_CV.sub_(largest_C1).exp_().sum(dim=-1, keepdim=True)
                nats += ((sum_C1.log() + largest_C1 - target_C1) * real_C1).sum()
                probs_CV.mul_(real_C1 / sum_C1).scatter_add_(1, targets_C1, -real_C1.to(exact))
                part_CV.copy_(probs_CV)  # the logits' gradient takes their place
            torch.mm(logits_CV, matrix_VD, out=hidden_grad_ND[here])
            weight_grad_VD += logits_CV.T @ inputs_ND[here]
        ctx.save_for_backward(hidden_grad_ND, weight_grad_VD[:words])
        ctx.hidden_dtype = hidden_ND.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, nats_grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad_ND, weight_grad_VD = ctx.saved_tensors
        return hidden_grad_ND.to(ctx.hidden_dtype) * nats_grad, weight_grad_VD * nats_grad, None, None


@torch.no_grad()
def mean_kl(model: GPTVAE, parts: Iterable[tuple[Batch, Noise]]) -> Tensor:
    """KL of every dimension, in nats, the mean over all rows of a step's parts that keep their latent [Z]."""
    kl_Z, rows = torch.zeros((), device=model.device), torch.zeros((), device=model.device)
    for batch, noise in parts:
        part_Z, part_rows = _kept(model.posterior(batch.encoder_BT).in_float32().kl_BZ(), noise.keep_B)
        kl_Z, rows = kl_Z + part_Z, rows + part_rows
    return kl_Z / rows.clamp(min=1)


def _kept(kl_BZ: Tensor, keep_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL of every dimension, summed over the rows that keep their latent [Z], and how many these are."""
    kept_B = torch.ones_like(kl_BZ[:, 0]) if keep_B is None else keep_B.to(kl_BZ.dtype)
    return (kl_BZ * kept_B[:, None]).sum(dim=0), kept_B.sum()


def objective(
    model: GPTVAE,
    bag_of_words: BagOfWords | None,
    batch: Batch,
    noise: Noise,
    weights: Weights,
    *,
    step_tokens: int | None = None,
    step_rows: int | None = None,
    step_kl_Z: Tensor | None = None,
) -> Terms:
    """The loss of one batch, as the head of this module states it.

    Args:
        model: in training mode or not; nothing here is random beyond `noise`.
        bag_of_words: the auxiliary head, or None.
        batch: on the model's device, as is `noise`.
        noise: the latent's noise and what is dropped.
        weights: of the terms.
        step_tokens, step_rows: target tokens and rows of the whole optimizer step, when this batch is a part of it.
        step_kl_Z: likewise its `mean_kl`: what is free is free of all parts together.
    """
    if weights.language_model:
        cross_entropy = summed_cross_entropy(model, batch.tokens_BT, None, noise)
        nothing = cross_entropy.new_zeros(())
        return Terms(cross_entropy / (step_tokens or batch.target_tokens), cross_entropy.detach(), nothing, nothing)
    posterior = model.posterior(batch.encoder_BT).in_float32()
    latents_BZ = posterior.sample(noise.latent_BZ)
    cross_entropy = summed_cross_entropy(model, batch.tokens_BT, latents_BZ, noise)
    kl_BZ = posterior.kl_BZ()
    bow = cross_entropy.new_zeros(())
    if bag_of_words is not None and weights.bag_of_words > 0:
        config = model.config
        assert config is not None, "the bag of words needs to know the special tokens"
        bow = bag_of_words(latents_BZ, batch.tokens_BT, (config.pad_id, config.bos_id, config.eos_id))
    tokens = step_tokens or batch.target_tokens
    if weights.objective == "stock":
        kl_term = F.relu(kl_BZ - weights.floor).sum() / (step_rows or len(kl_BZ))
        total = cross_entropy / tokens + weights.beta * kl_term
    else:
        sum_Z, rows = _kept(kl_BZ, noise.keep_B)
        mean_Z = sum_Z / rows.clamp(min=1)
        if step_kl_Z is not None:  # the means of the whole step, with the gradient of this part's
            mean_Z = step_kl_Z + mean_Z - mean_Z.detach()
        kl = rows * free_bits(mean_Z, floor=weights.floor, rate=weights.rate)
        total = (cross_entropy + weights.beta * kl) / tokens
    total = total + weights.bag_of_words * bow / tokens
    return Terms(total, cross_entropy.detach(), kl_BZ.detach().sum(), bow.detach())
