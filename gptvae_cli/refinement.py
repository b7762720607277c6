"""Latents from which texts come back more closely than from the means of their posteriors.

An encoder answers for any text in one pass, and of what the decoder could make of a latent it learns only a part
(Cremer et al. 2018, arXiv 1801.03558). Here the decoder itself is asked: each latent goes down the gradient of its own
text's cross-entropy. Semi-amortised inference does the same while a model learns (Kim et al. 2018, arXiv 1802.02550).

Shapes: B batch, T tokens, N tokens of all rows, Z latent width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptvae_cli.model import GPTVAE

STEPS = 10
RATE = 0.3
"""Learning rate of the first step, from which it falls to 0; a latent's dimensions differ by about 1."""
GUIDANCE = 1.5
"""Under which the texts are to come back (see `SampleConfig`): latents that suit 1 and 2 alike
(`tests/benchmarks/latent/refinement.txt`)."""


def refined(model: GPTVAE, tokens_BT: Tensor, latents_BZ: Tensor, *, guided: bool) -> Tensor:
    """Latents under which these rows are likelier, never less likely than under those given, float32 [B Z].

    None is longer than a random latent, whose norm is about the root of Z, or than it was. The loss adds up over rows,
    and Adam scales every number of its own, so that what becomes of a row does not depend on its neighbours but for
    rounding. A row without a token to predict keeps its latent.

    Args:
        model: in eval mode; its weights stay as they are.
        tokens_BT: rows `BOS text EOS`, padded with `pad_id`.
        latents_BZ: where to begin, the means of the posteriors.
        guided: whether the decoder can write without a latent, see `ModelHeader.takes_guidance`.
    """
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    found_BZ = latents_BZ.detach().float().clone()
    if targets_BT.shape[1] == 0:
        return found_BZ
    latents_BZ = found_BZ.clone().requires_grad_()
    longest_B1 = latents_BZ.detach().norm(dim=-1, keepdim=True).clamp(min=latents_BZ.shape[1] ** 0.5)
    least_B = torch.full((len(latents_BZ),), torch.inf, device=latents_BZ.device)
    optimizer = torch.optim.Adam([latents_BZ])
    # In float32 whatever all else is in: bfloat16 is too coarse for what a few steps change. With gradients throughout,
    # as passes without them may read weights that were frozen in bfloat16.
    with torch.autocast(latents_BZ.device.type, enabled=False), torch.enable_grad():
        without_BTV = _logits(model, inputs_BT, latents_BZ, with_latents=False).detach() if guided else None
        for step in range(STEPS + 1):
            logits_BTV = _logits(model, inputs_BT, latents_BZ)
            if without_BTV is not None:
                logits_BTV = torch.lerp(without_BTV, logits_BTV, GUIDANCE)
            nats_N = F.cross_entropy(
                logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=model.pad_id, reduction="none"
            )
            nats_B = nats_N.view_as(targets_BT).sum(-1)
            better_B = nats_B.detach() < least_B
            found_BZ = torch.where(better_B[:, None], latents_BZ.detach(), found_BZ)
            least_B = torch.minimum(least_B, nats_B.detach())
            if step == STEPS:
                break
            # Of the latents alone: the weights, which others may share, get no gradients.
            (latents_BZ.grad,) = torch.autograd.grad(nats_B.sum(), latents_BZ)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.step()
            with torch.no_grad():
                latents_BZ.mul_((longest_B1 / latents_BZ.norm(dim=-1, keepdim=True)).clamp(max=1))
    return found_BZ


def _logits(model: GPTVAE, inputs_BT: Tensor, latents_BZ: Tensor, *, with_latents: bool = True) -> Tensor:
    """Of every next token [B T V]."""
    keep_B = None if with_latents else torch.zeros(len(inputs_BT), dtype=torch.bool, device=inputs_BT.device)
    return model.logits(model.hidden(inputs_BT, latents_BZ, keep_B))
