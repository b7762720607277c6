"""The model: an encoder that averages into a Gaussian posterior, and a decoder that reads a sample of it.

`GPTVAE` keeps the contract of `x_transformers.gpt_vae.GPTVAE`: constructor, state dict, losses, greedy text. What it
adds is marked as an addition. This is the only module that imports x-transformers; `fused.py` knows its layers, too.

Shapes: B batch, T tokens, D model width, Z latent width, V vocabulary, L places of dropout.

Source: Zhao et al. 2023 (ACT, arXiv 2304.13705) for the conditional VAE; Kingma et al. 2016 (arXiv 1606.04934) and
FREE Transformer (arXiv 2510.17558) for the floor under the KL.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from gptvae_cli import fused
from gptvae_cli.conditioning import CONDITIONINGS
from gptvae_cli.config import ConditioningName, ModelConfig
from gptvae_cli.continuation import continued
from gptvae_cli.errors import ConfigError, FieldError
from gptvae_cli.latent import kl_to_standard_normal, reparameterize

with warnings.catch_warnings():  # it uses torch.jit.script, of which torch warns, in words that depend on the Python
    warnings.filterwarnings("ignore", "`torch.jit.script` is ")
    from x_transformers.autoregressive_wrapper import FILTER_LOGITS_FN, AutoregressiveWrapper, top_k
    from x_transformers.x_transformers import Decoder, Encoder, TransformerWrapper


STOCK_DEFAULTS: Mapping[str, Any] = {
    "restrict_to_max_seq_len": True,
    "amateur_model": None,
    "contrastive_decode_kwargs": {"beta": 0.5, "alpha": 0.1},
    "return_intermediates": False,
}
"""Of the keywords of x-transformers' `AutoregressiveWrapper.generate` that `GPTVAE.generate` leaves to it, whose
decorators hide its signature."""


_CACHED_RIGHTLY = {
    *("verbose", "disable_abs_pos_emb", "rotary_pos_emb", "rotary_emb_dim", "rotary_interpolation_factor"),
    *("alibi_pos_bias", "rel_pos_bias", "attn_flash", "attn_kv_heads", "attn_one_kv_head", "attn_qk_norm"),
    *("ff_mult", "ff_glu", "ff_swish", "ff_relu_squared", "ff_no_bias", "attn_dropout", "ff_dropout", "layer_dropout"),
    *("pre_norm", "sandwich_norm", "use_rmsnorm", "use_scalenorm", "use_simple_rmsnorm"),
}
"""Keywords of x-transformers' `Decoder` with which its cache of keys and values changes no text. With some others, such
as `shift_tokens` and `orthog_residual`, it does."""


@dataclass(frozen=True)
class Posterior:
    """q(z | text): a diagonal Gaussian for every row."""

    mean_BZ: Tensor
    log_var_BZ: Tensor

    def sample(self, noise_BZ: Tensor) -> Tensor:
        """A latent for every row, from standard normal noise [B Z]."""
        return reparameterize(self.mean_BZ, self.log_var_BZ, noise_BZ)

    def in_float32(self) -> Posterior:
        """The same in float32: under autocast the encoder answers in bfloat16, too coarse to sum a KL in."""
        return Posterior(self.mean_BZ.float(), self.log_var_BZ.float())

    def kl_BZ(self) -> Tensor:
        """KL to the standard normal, nats per row and dimension [B Z]."""
        return kl_to_standard_normal(self.mean_BZ, self.log_var_BZ)


class GPTVAE(nn.Module):
    """A GPT with a Gaussian latent, which is a token before the text as in the seed class, unless told otherwise.

    Args:
        num_tokens: size of the vocabulary V.
        dim: width D of encoder and decoder.
        depth: layers of the decoder.
        enc_depth: layers of the encoder.
        max_seq_len: longest sequence the decoder reads; `generate` goes beyond it with a moving window.
        dim_latent: width Z of the latent; `dim` by default.
        attn_dim_head, heads: width and number of the attention heads.
        enc_kwargs, dec_kwargs: keywords of x-transformers' `Encoder` and `Decoder`; they win over `kwargs`.
        vae_kl_loss_weight: factor of the KL in `forward`.
        vae_kl_div_floor: nats under which a dimension's KL costs nothing in `forward`, per row.
        latents_dropout_prob: share of the rows that train without their latent.
        pad_id: id that marks padding; -1 is allowed.
        encoder: a module `(seq, mask=mask) -> [B D]` in place of the built-in encoder; it gets `pad_id` as it is.
        bos_id: (addition) what an empty prompt starts with.
        conditioning: (addition) how a latent enters the decoder, see `conditioning.py`.
        kwargs: keywords of both `Encoder` and `Decoder`, such as `rotary_pos_emb=True`.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        enc_depth: int,
        max_seq_len: int,
        dim_latent: int | None = None,
        attn_dim_head: int = 64,
        heads: int = 8,
        enc_kwargs: Mapping[str, Any] | None = None,
        dec_kwargs: Mapping[str, Any] | None = None,
        vae_kl_loss_weight: float = 1.0,
        vae_kl_div_floor: float = 0.0,
        latents_dropout_prob: float = 0.5,
        pad_id: int = -1,
        encoder: nn.Module | None = None,
        bos_id: int | None = None,
        conditioning: ConditioningName = "token",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dim_latent = dim if dim_latent is None else dim_latent
        layers: dict[str, Any] = {"dim": dim, "attn_dim_head": attn_dim_head, "heads": heads}
        encoder_options = {**kwargs, **(enc_kwargs or {})}
        decoder_options = {**kwargs, **(dec_kwargs or {})}
        builtin_encoder = encoder is None
        if encoder is None:
            encoder = TransformerWrapper(
                num_tokens=num_tokens,
                max_seq_len=max_seq_len + 1,
                return_only_embed=True,
                average_pool_embed=True,
                attn_layers=Encoder(**{**layers, "depth": enc_depth, **encoder_options}),
            )
        self.encoder = encoder
        self.to_latent_mean_log_variance = nn.Sequential(
            nn.Linear(dim, dim_latent * 2), Rearrange("b (two z) -> two b z", two=2)
        )
        self.from_latent_to_prepend_token = nn.Sequential(nn.Linear(dim_latent, dim), Rearrange("b d -> b 1 d"))
        self.decoder = TransformerWrapper(
            num_tokens=num_tokens,
            max_seq_len=max_seq_len,
            attn_layers=Decoder(**{**layers, "depth": depth, **decoder_options}),
        )
        self.ar_wrapped_decoder = AutoregressiveWrapper(self.decoder, ignore_index=pad_id)
        self.latents_dropout = nn.Dropout(latents_dropout_prob)

        self.config: ModelConfig | None = None
        self.dim_latent = dim_latent
        self.max_seq_len = max_seq_len
        self.pad_id = pad_id
        self.bos_id = bos_id
        self.conditioning = CONDITIONINGS[conditioning]
        self.vae_kl_div_floor = vae_kl_div_floor
        self.vae_kl_loss_weight = vae_kl_loss_weight
        self.keeps_keys = bool(self.decoder.can_cache_kv) and set(decoder_options) <= _CACHED_RIGHTLY
        # The fast path over the same weights, where the layers are of the kind that it computes; a head is pairs of
        # numbers there.
        pairs = attn_dim_head % 2 == 0
        self._encoder_stack: fused.Stack | None = None
        self._decoder_stack: fused.Stack | None = None
        if builtin_encoder and pairs and fused.supports(encoder_options):
            self._encoder_stack = fused.Stack(self.encoder, causal=False)
        if pairs and fused.supports(decoder_options):
            self._decoder_stack = fused.Stack(self.decoder, causal=True)

    @classmethod
    def from_config(cls, config: ModelConfig) -> GPTVAE:
        """The architecture that the tool trains: rotary positions, so that a row whose latent is masked equals a
        row that never had one, and fused attention."""
        model = cls(
            num_tokens=config.num_tokens,
            dim=config.dim,
            depth=config.depth,
            enc_depth=config.enc_depth,
            max_seq_len=config.max_seq_len,
            dim_latent=config.dim_latent,
            attn_dim_head=config.attn_dim_head,
            heads=config.heads,
            pad_id=config.pad_id,
            bos_id=config.bos_id,
            conditioning=config.conditioning,
            rotary_pos_emb=True,
            attn_flash=True,
            verbose=False,  # keeps a warning about small rotary widths off people's terminals
        )
        model.config = config
        return model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def fused_encoder(self) -> fused.Stack | None:
        """(Addition) The fast path over the encoder's weights. None where x-transformers is to compute: for layers of
        another kind, and as soon as a part of the encoder was replaced, hooked into or set otherwise."""
        stack = self._encoder_stack
        return stack if stack is not None and stack.stands_for(self.encoder) else None

    @property
    def fused_decoder(self) -> fused.Stack | None:
        """(Addition) The same of the decoder, whose logits count as a part of it."""
        stack = self._decoder_stack
        return stack if stack is not None and stack.stands_for(self.decoder) else None

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """(Addition) Within, the weights do not change, and passes without gradients read those of the layers once."""
        with ExitStack() as stacks:
            for stack in (self.fused_encoder, self.fused_decoder):
                if stack is not None:
                    stacks.enter_context(stack.frozen())
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """(Addition) Within, every part is in eval mode, and then as it was: a frozen encoder may well be in eval mode
        inside a model that is training."""
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def posterior(self, seq_BT: Tensor, *, plain: bool = False) -> Posterior:
        """(Addition) q(z | text) of padded rows; padding does not change it.

        Args:
            seq_BT: tokens, padded with `pad_id`.
            plain: go through x-transformers even where a fused path exists.
        """
        mask_BT = seq_BT != self.pad_id
        if isinstance(self.encoder, TransformerWrapper):
            # It cannot embed a negative pad id; what stands in its place is masked anyway.
            seq_BT = seq_BT.masked_fill(~mask_BT, max(self.pad_id, 0))
        stack = None if plain else self.fused_encoder
        if stack is None:
            pooled_BD = self.encoder(seq_BT, mask=mask_BT)
        else:
            hidden_BTD = stack(self.encoder.get_submodule("token_emb.emb")(seq_BT), mask_BT)
            pooled_BD = (hidden_BTD * mask_BT[..., None]).sum(dim=1) / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
        mean_BZ, log_var_BZ = self.to_latent_mean_log_variance(pooled_BD)
        return Posterior(mean_BZ, log_var_BZ)

    @overload
    def encode_to_latents(
        self,
        seq: Tensor,
        return_mean_log_var: Literal[False] = False,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...
    @overload
    def encode_to_latents(
        self,
        seq: Tensor,
        return_mean_log_var: Literal[True],
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    def encode_to_latents(
        self,
        seq: Tensor,
        return_mean_log_var: bool = False,
        *,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Latents of padded rows [B Z], by default a random draw of the posterior as the seed class does.

        Args:
            seq: tokens, padded with `pad_id` [B T].
            return_mean_log_var: return `(latents, (mean, log variance))`.
            sample: (addition) False returns the posterior mean, the encoding to store.
            generator: (addition) a CPU generator; without one torch's global state is used, as in the seed class.
        """
        posterior = self.posterior(seq)
        latents_BZ = posterior.mean_BZ
        if sample:
            latents_BZ = posterior.sample(_noise_like(posterior.mean_BZ, generator))
        if not return_mean_log_var:
            return latents_BZ
        return latents_BZ, (posterior.mean_BZ, posterior.log_var_BZ)

    @overload
    def forward(
        self,
        seq: Tensor,
        seq_for_latents: Tensor | None = None,
        return_all_losses: Literal[False] = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        seq: Tensor,
        seq_for_latents: Tensor | None = None,
        *,
        return_all_losses: Literal[True],
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...
    def forward(
        self,
        seq: Tensor,
        seq_for_latents: Tensor | None = None,
        return_all_losses: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """The seed class's loss: cross-entropy in nats per token plus KL in nats per row above the floor.

        The two are in different units, so that the effective beta is the length of the texts: use it to
        reproduce, and `objective.py` to train.

        Args:
            seq: tokens for the decoder, padded with `pad_id` [B T].
            seq_for_latents: tokens for the encoder; `seq` by default [B T'].
            return_all_losses: return `(total, (cross-entropy, KL above the floor))`.
            generator: (addition) a CPU generator for the noise and for the dropping of latents.
        """
        latents_BZ, (mean_BZ, log_var_BZ) = self.encode_to_latents(
            seq if seq_for_latents is None else seq_for_latents, return_mean_log_var=True, generator=generator
        )
        keep_B = ~self._drop_latents(len(seq), latents_BZ.device, generator)
        vector_B1D = self.from_latent_to_prepend_token(latents_BZ)
        ar_loss = self.ar_wrapped_decoder(seq, **self.conditioning.keywords(vector_B1D, keep_B, seq.shape[1]))
        kl_BZ = F.relu(kl_to_standard_normal(mean_BZ, log_var_BZ) - self.vae_kl_div_floor)
        vae_kl_loss = kl_BZ.sum(dim=-1).mean()
        total = ar_loss + vae_kl_loss * self.vae_kl_loss_weight
        return (total, (ar_loss, vae_kl_loss)) if return_all_losses else total

    def hidden(
        self,
        tokens_BT: Tensor,
        latents_BZ: Tensor | None,
        keep_B: Tensor | None = None,
        drop_LBD: Tensor | None = None,
        *,
        plain: bool = False,
    ) -> Tensor:
        """(Addition) The decoder's last hidden states at the tokens' positions [B T D].

        Args:
            tokens_BT: the decoder's input, BOS first; padding goes behind.
            latents_BZ: one latent a row; None leaves its slot out where it has one, which absolute positions notice.
            keep_B: True where a row sees its latent; every row does by default.
            drop_LBD: dropout of the embedded tokens, but not of the latent, then of the decoder's blocks, see
                `fused.Stack`, and of the hidden states, as factors; the fused path alone has it.
            plain: go through x-transformers even where a fused path exists.

        Raises:
            ConfigError: for dropout where there is no fused path.
        """
        tokens_BT = tokens_BT.masked_fill(tokens_BT == self.pad_id, max(self.pad_id, 0))
        vector_B1D = None if latents_BZ is None else self.from_latent_to_prepend_token(latents_BZ)
        way = self.conditioning
        stack = None if plain else self.fused_decoder
        if stack is None:
            if drop_LBD is not None:
                raise ConfigError(
                    "found dropout as factors, which only the fused layers take",
                    hint="use x-transformers' own dropout where parts of the decoder are of another kind",
                )
            keywords = {} if vector_B1D is None else way.keywords(vector_B1D, keep_B, tokens_BT.shape[1])
            hidden_BTD: Tensor = self.decoder(tokens_BT, return_embeddings=True, **keywords)
            return hidden_BTD if vector_B1D is None else hidden_BTD[:, way.slots :]
        embedded_BTD = self.decoder.token_emb.emb(tokens_BT)
        drop_blocks_LBD = None
        if drop_LBD is not None:
            embedded_BTD, drop_blocks_LBD = embedded_BTD * drop_LBD[0, :, None], drop_LBD[1:-1]
        if vector_B1D is None:
            hidden_BTD = stack(embedded_BTD, None, drop_blocks_LBD)
        else:
            entered_BTD = way.enter(embedded_BTD, vector_B1D, keep_B)
            hidden_BTD = way.leave(stack(entered_BTD, None, drop_blocks_LBD), keep_B)
        return hidden_BTD if drop_LBD is None else hidden_BTD * drop_LBD[-1, :, None]

    def last_hidden(
        self, tokens_BT: Tensor, latents_BZ: Tensor | None, keep_B: Tensor | None, cache: Any
    ) -> tuple[Tensor, Any]:
        """(Addition) The decoder's hidden state at the last token [B D], through x-transformers, and its keys and
        values.

        Args:
            tokens_BT, latents_BZ, keep_B: as in `hidden`, without padding.
            cache: what this gave for the same without the last token, or None.
        """
        keywords: dict[str, Tensor | None] = {}
        if latents_BZ is not None:
            vector_B1D = self.from_latent_to_prepend_token(latents_BZ)
            keywords = self.conditioning.keywords(vector_B1D, keep_B, tokens_BT.shape[1])
        hidden_BTD, cache = self.decoder(tokens_BT, cache=cache, return_embeddings_and_intermediates=True, **keywords)
        return hidden_BTD[:, -1], cache

    def logits(self, hidden_D: Tensor) -> Tensor:
        """(Addition) Next-token logits of hidden states of any leading shape [... V]."""
        logits: Tensor = self.decoder.to_logits(hidden_D)
        return logits

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor | Sequence[Tensor],
        seq_len: int,
        latents: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
        seq_for_latents: Tensor | None = None,
        *,
        eos_token: int | None = None,
        temperature: float = 1.0,
        prompt_lens: Tensor | None = None,
        filter_logits_fn: str | Callable[..., Tensor] = top_k,
        filter_kwargs: Mapping[str, Any] | None = None,
        cache_kv: bool = True,
        generator: torch.Generator | None = None,
        **foreign: Any,
    ) -> Tensor:
        """Continues prompts, and returns the new tokens only [B n].

        Takes the keywords of x-transformers' `AutoregressiveWrapper.generate`. Up to `max_seq_len` greedy text is
        the seed class's; a row that outgrows it goes on from the newer half of its tokens and its latent, which the
        seed class loses.

        Args:
            prompts: tokens [B T], one prompt [T], or (addition) a list of prompts of different lengths, which is
                what `prompt_lens` says of a padded tensor. Empty prompts start from `bos_id`.
            seq_len: new tokens at most; fewer are returned once every row has ended.
            latents: [B Z], or one latent [Z] for every prompt; one prompt with B latents is repeated (addition).
            seq_for_latents: tokens to encode the latents from, sampled as in the seed class [B T'].
            eos_token, temperature, prompt_lens, filter_kwargs, cache_kv: as x-transformers takes them.
            filter_logits_fn: likewise. It sees the rows that are computed together: not those that have ended, and on
                their own those that outgrew the decoder.
            generator: (addition) a CPU generator; without one torch's global state is used.
            foreign: other keywords of x-transformers. With a value that is not its default, one hands the whole call
                to x-transformers' own loop. There none of the additions hold: latents are lost beyond `max_seq_len` and
                hidden by `prompt_lens`, and token 0 stands behind `eos_token`.

        Returns:
            New tokens; behind a row's `eos_token` stands `pad_id`. One prompt [T] gives one row [n], as in the seed
            class, unless several latents repeat it.

        Raises:
            ConfigError: for an empty prompt without a `bos_id`; rows, lengths and latents that cannot be matched; a
                filter that is not known; and in x-transformers' loop, which does not know them, for latents that are no
                tokens and a `generator` to choose tokens with.
            CheckpointError: where the logits, or those that a filter leaves, are not finite numbers.
        """
        if isinstance(filter_logits_fn, str):
            if filter_logits_fn not in FILTER_LOGITS_FN:
                allowed = f"{', '.join(FILTER_LOGITS_FN)} or a function"
                raise FieldError("filter_logits_fn", filter_logits_fn, allowed, label="filter_logits_fn")
            filter_logits_fn = FILTER_LOGITS_FN[filter_logits_fn]
        same: dict[str, Any] = {
            "eos_token": eos_token,
            "temperature": temperature,
            "prompt_lens": prompt_lens,
            "filter_logits_fn": filter_logits_fn,
            "filter_kwargs": dict(filter_kwargs or {}),
            "cache_kv": cache_kv,
        }
        foreign = {
            name: value
            for name, value in foreign.items()
            if name not in STOCK_DEFAULTS or value != STOCK_DEFAULTS[name]
        }
        with self.evaluating():
            if seq_for_latents is not None:
                if latents is not None:
                    raise ConfigError("generate takes latents or seq_for_latents, found both")
                latents = self.encode_to_latents(seq_for_latents, generator=generator)
            if latents is not None:
                latents = torch.as_tensor(latents, device=self.device, dtype=next(self.parameters()).dtype)
            if not foreign:
                return continued(self, prompts, seq_len, latents, generator=generator, **same)
            if generator is not None and temperature != 0:
                raise ConfigError(
                    f"found a generator and {', '.join(foreign)}, whose tokens are drawn from torch's global state",
                    hint="leave the generator out, and call torch.manual_seed before",
                )
            prepend = None
            if latents is not None:
                if self.conditioning.slots == 0:
                    raise ConfigError(f"found {', '.join(foreign)}, which only works with latents that are tokens")
                batch = len(prompts) if not isinstance(prompts, Tensor) or prompts.ndim == 2 else 1
                rows_BZ = latents.expand(batch, -1) if latents.ndim == 1 else latents
                prepend = self.from_latent_to_prepend_token(rows_BZ)
            result: Tensor = self.ar_wrapped_decoder.generate(
                prompts, seq_len, prepend_embeds=prepend, **same, **foreign
            )
            return result

    def _drop_latents(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        ones_B = torch.ones(batch, device=device)
        if generator is None or not self.training:
            dropped_B: Tensor = ~self.latents_dropout(ones_B).bool()
            return dropped_B
        return torch.rand(batch, generator=generator).to(device) < self.latents_dropout.p


def _noise_like(mean_BZ: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.randn_like(mean_BZ)
    return torch.randn(mean_BZ.shape, generator=generator).to(mean_BZ)
