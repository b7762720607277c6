"""Prompts continued as `generate` of x-transformers' GPTVAE continues them, by our own decoding.

Shapes: B rows, T tokens, Z latent width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptvae_cli import decoding
from gptvae_cli.engines import Row
from gptvae_cli.errors import ConfigError

if TYPE_CHECKING:
    from gptvae_cli.model import GPTVAE


def continued(
    model: GPTVAE,
    prompts: Tensor | Sequence[Tensor],
    seq_len: int,
    latents: Tensor | None,
    *,
    eos_token: int | None,
    temperature: float,
    prompt_lens: Tensor | None,
    filter_logits_fn: Callable[..., Tensor],
    filter_kwargs: Mapping[str, Any],
    cache_kv: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """The new tokens, see `GPTVAE.generate`. The model is in eval mode."""
    contexts = _contexts(prompts, prompt_lens, model.bos_id)
    if latents is not None and latents.ndim == 1:
        latents = latents.expand(len(contexts), -1)
    if latents is not None and len(contexts) == 1:
        contexts = contexts * len(latents)
    if latents is not None and len(contexts) != len(latents):
        raise ConfigError(f"found {len(contexts)} prompts and {len(latents)} latents, they must be as many")
    if not contexts:
        return torch.empty(0, seq_len, dtype=torch.long, device=model.device)

    uniforms_BT = None
    if temperature != 0:
        uniforms_BT = torch.rand(len(contexts), seq_len, generator=generator, dtype=torch.float64)

    def choose(logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
        if uniforms_BT is None:
            return decoding.greedy(logits_BV)
        # Not in inference mode, as in the seed class: what a function keeps can be used for gradients then.
        with torch.inference_mode(False), torch.no_grad():
            filtered_BV = filter_logits_fn(logits_BV.clone(), **filter_kwargs) / temperature
        uniforms_B = torch.stack([uniforms_BT[row.index, len(row.new)] for row in rows])
        return decoding.draw(filtered_BV, uniforms_B.to(logits_BV.device))

    rows = [
        Row(index, context, None if latents is None else latents[index], seq_len)
        for index, context in enumerate(contexts)
    ]
    done: Iterable[Row] = rows
    if seq_len > 0:
        done = decoding.run(model, rows, choose, eos_id=eos_token, batch_size=len(rows), cached=cache_kv)
    # A row keeps its EOS here, as in the seed class; what stands behind it is padding.
    new = [torch.tensor(row.new, dtype=torch.long) for row in sorted(done, key=lambda row: row.index)]
    padded_BT = nn.utils.rnn.pad_sequence(new, batch_first=True, padding_value=model.pad_id).to(model.device)
    single = isinstance(prompts, Tensor) and prompts.ndim == 1 and len(rows) == 1
    return padded_BT[0] if single else padded_BT


def _contexts(prompts: Tensor | Sequence[Tensor], prompt_lens: Tensor | None, bos_id: int | None) -> list[list[int]]:
    """What each row goes on from."""
    if isinstance(prompts, Tensor) and prompts.ndim == 1:
        prompts = prompts[None]
    contexts: list[list[int]] = [row.tolist() for row in prompts]
    if prompt_lens is not None:
        lengths = prompt_lens.flatten().tolist()
        if len(lengths) != len(contexts):
            raise ConfigError(f"found {len(contexts)} prompts and {len(lengths)} prompt_lens, they must be as many")
        for row, length in zip(contexts, lengths, strict=True):
            if not 0 <= length <= len(row):
                raise ConfigError(f"found {length} in prompt_lens, for a prompt of {len(row)} tokens")
        contexts = [row[:length] for row, length in zip(contexts, lengths, strict=True)]
    for context in contexts:
        if not context:
            if bos_id is None:
                raise ConfigError("found an empty prompt, a model without a bos_id needs at least one token")
            context.append(bos_id)
    return contexts
