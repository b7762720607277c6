"""The transformer layers of x-transformers, over the same weights, as a handful of fused products.

x-transformers' `AttentionLayers` can be almost anything, and pays for it with hundreds of small operations a pass.
This module computes one kind of layer, the one that the tool trains: pre-norm attention with rotary positions, then
a feed-forward. Training, encoding and cached decoding share it; tests hold it equal to x-transformers.

Neighbouring dimensions of a head are a complex number here, and rotating it is one product.

Shapes: B batch, T tokens, N rows or all their tokens, D model width, E all heads side by side, H heads, K head width,
C pairs of a head, S positions, X queries, keys and values, L places of dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptvae_cli.attention import as_bias, attend
from gptvae_cli.products import Linear, best_products
from gptvae_cli.snapshot import Snapshot


def supports(options: Mapping[str, Any]) -> bool:
    """Whether these keywords of x-transformers' `Encoder` or `Decoder` describe the layers computed here."""
    return options.get("rotary_pos_emb") is True and set(options) <= {"rotary_pos_emb", "attn_flash", "verbose"}


@dataclass(frozen=True)
class Layer:
    """Weights of one attention block and one feed-forward block, products that share an input side by side."""

    attn_gamma_D: Tensor
    qkv_ED: Tensor
    attn_out_DE: Tensor
    ff_gamma_D: Tensor
    ff_in: tuple[Tensor, Tensor]
    ff_out: tuple[Tensor, Tensor]


class Turns(NamedTuple):
    """Rotary factors [S C], and the frequencies that they were made of, in which version."""

    turns_SC: Tensor
    of: Tensor
    version: int | None


class Stack:
    """The `AttentionLayers` of a `TransformerWrapper` seen as fused layers. Weights are read at every call, so it can
    be trained, except within `frozen`.

    Args:
        wrapper: x-transformers' module, with layers that `supports` names and heads of an even width.
        causal: whether a position sees only those before it.
    """

    def __init__(self, wrapper: Any, *, causal: bool) -> None:
        self.causal = causal
        self._built_from = Snapshot(wrapper)
        layers = wrapper.attn_layers
        self.heads, self.head_width = layers.attn_heads, layers.attn_dim_head
        blocks = list(layers.layers)
        self._blocks = list(zip(blocks[::2], blocks[1::2], strict=True))
        self._final_norm = layers.final_norm
        self._rotary = layers.rotary_pos_emb
        self._turns: Turns | None = None
        self._kept: dict[int, Frozen | None] = {}  # of each thread that is within `frozen`

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files have no part in what is kept for a while, least of all for a thread."""
        return {**vars(self), "_turns": None, "_kept": {}}

    def stands_for(self, wrapper: nn.Module) -> bool:
        """Whether it computes what this module would: the one that it was built from, which has not been changed but
        in its weights, and without active dropout."""
        return wrapper is self._built_from.module and self._built_from.holds()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._final_norm.gamma.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._final_norm.gamma.dtype
        return dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """That of autocast or of the parameters."""
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype

    @property
    def depth(self) -> int:
        return len(self._blocks)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within, passes without gradients share one copy of the weights, made by the first of them in its dtype. What
        is frozen already stays so."""
        thread = get_ident()
        if thread in self._kept:
            yield
            return
        self._kept[thread] = None
        try:
            yield
        finally:
            self._kept.pop(thread, None)

    def read(self) -> list[Layer]:
        """The weights, fused; gradients flow through to the module's parameters."""
        return [self._read(attention, feedforward) for attention, feedforward in self._blocks]

    def turns(self, length: int) -> Tensor:
        """The rotary factors `exp(i * angle)` of positions 0 to `length` - 1, by which queries and keys, as complex
        numbers, are multiplied; 1 where a head is not rotated. In float32 [S C]."""
        frequencies: Tensor = self._rotary.inv_freq
        version = None if frequencies.is_inference() else frequencies._version
        kept = self._turns  # read once, as another thread may put fewer in their place
        if kept is None or len(kept.turns_SC) < length or kept.of is not frequencies or kept.version != version:
            # They are kept for training too, which cannot use what was made in inference mode.
            with torch.inference_mode(False):
                angle_C = frequencies.detach().to(self.device, torch.float32)
                angle_C = F.pad(angle_C, (0, self.head_width // 2 - len(angle_C)))
                positions_S = torch.arange(max(length, 64), device=self.device, dtype=torch.float32)
                angles_SC = positions_S[:, None] * angle_C
                self._turns = kept = Turns(torch.complex(angles_SC.cos(), angles_SC.sin()), frequencies, version)
        return kept.turns_SC[:length]

    def __call__(self, x_BTD: Tensor, mask_BT: Tensor | None = None, drop_LBD: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm [B T D].

        Args:
            x_BTD: embedded tokens.
            mask_BT: True where a position may be looked at; only without `causal`, which needs no mask as padding
                stands behind.
            drop_LBD: dropout of what each of the 2 * depth blocks adds to the residual stream, as factors; the same
                along a row (arXiv 1512.05287).
        """
        if drop_LBD is None and not torch.is_grad_enabled():
            thread = get_ident()
            frozen = self._kept.get(thread) or Frozen(self)
            if thread in self._kept:
                self._kept[thread] = frozen
            return frozen(x_BTD, mask_BT)
        turns_TC = self.turns(x_BTD.shape[1])
        bias = None if mask_BT is None else as_bias(mask_BT, self.product_dtype)
        drop_LB1D = [None] * 2 * len(self._blocks) if drop_LBD is None else drop_LBD[:, :, None].unbind()
        for layer, drop_attn, drop_ff in zip(self.read(), drop_LB1D[::2], drop_LB1D[1::2], strict=True):
            q_BHTK, k_BHTK, v_BHTK = self.project(layer, x_BTD, turns_TC)
            attended_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, bias, causal=self.causal)
            x_BTD = self.finish(layer, x_BTD, attended_BHTK, drop_attn, drop_ff)
        return self.final_norm(x_BTD)

    def project(self, layer: Layer, x_BTD: Tensor, turns_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated and scaled queries, rotated keys, and values [B H T K]."""
        normed_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], weight=layer.attn_gamma_D)
        qkv_BTXHK = F.linear(normed_BTD, layer.qkv_ED).view(*x_BTD.shape[:2], 3, self.heads, self.head_width)
        rotated: tuple[Tensor, Tensor, Tensor] = _Rotation.apply(qkv_BTXHK, turns_TC)  # type: ignore[no-untyped-call]
        return rotated

    def finish(
        self,
        layer: Layer,
        x_BTD: Tensor,
        attended_BHTK: Tensor,
        drop_attn_B1D: Tensor | None = None,
        drop_ff_B1D: Tensor | None = None,
    ) -> Tensor:
        """The rest of a layer behind its attention: output product, residuals, feed-forward [B T D]."""
        x_BTD = _add(x_BTD, F.linear(attended_BHTK.transpose(1, 2).flatten(-2), layer.attn_out_DE), drop_attn_B1D)
        normed_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], weight=layer.ff_gamma_D)
        return _add(x_BTD, F.linear(F.gelu(F.linear(normed_BTD, *layer.ff_in)), *layer.ff_out), drop_ff_B1D)

    def _read(self, attention_block: Any, feedforward_block: Any) -> Layer:
        (attn_norm, _, _), attention, _ = attention_block
        (ff_norm, _, _), feedforward, _ = feedforward_block
        ff_in, ff_out = [module for module in feedforward.modules() if isinstance(module, nn.Linear)]
        scale = self.head_width**-0.5
        out = attention.to_out
        # x-transformers gives a single head no output product.
        out_DE = torch.eye(self.head_width).to(ff_in.weight) if isinstance(out, nn.Identity) else out.weight
        return Layer(
            # x-transformers stores the gain as its distance from 1.
            attn_gamma_D=attn_norm.gamma + 1,
            qkv_ED=torch.cat([attention.to_q.weight * scale, attention.to_k.weight, attention.to_v.weight]),
            attn_out_DE=out_DE,
            ff_gamma_D=ff_norm.gamma + 1,
            ff_in=(ff_in.weight, ff_in.bias),
            ff_out=(ff_out.weight, ff_out.bias),
        )

    def final_norm(self, x_D: Tensor) -> Tensor:
        """The norm behind the last layer, of any leading shape [... D]."""
        return F.layer_norm(x_D, x_D.shape[-1:], weight=self.final_gamma_D())

    def final_gamma_D(self) -> Tensor:
        gamma_D: Tensor = self._final_norm.gamma + 1
        return gamma_D


class Heads:
    """A buffer for the queries, keys and values of some positions, and the views of it that every layer uses.

    Args:
        stack: whose heads they belong to.
        shape: of the positions: (rows,) or (rows, tokens).
    """

    def __init__(self, stack: Frozen, shape: tuple[int, ...]) -> None:
        heads, width = stack.heads, stack.head_width
        self.qkv_NE = torch.empty(math.prod(shape), 3 * heads * width, dtype=stack.rotated_dtype, device=stack.device)
        self.qkv_XHK = self.qkv_NE.view(*shape, 3, heads, width)
        self.pairs_XHC = torch.view_as_complex(self.qkv_XHK[..., :2, :, :].view(*shape, 2, heads, width // 2, 2))


class FrozenLayer(NamedTuple):
    """A `Layer` whose matrices are laid out by `Frozen.products`."""

    attn_gamma_D: Tensor
    qkv: Tensor
    attn_out: Tensor
    ff_gamma_D: Tensor
    ff_in: Linear
    ff_out: Linear


class Frozen:
    """A stack for inference: its weights are read once, it works in place, and a layer is as few operations as can be,
    since for a single row starting one costs as much as its arithmetic.

    Products are in `dtype`, see `Stack.product_dtype`; rotations are float32 at least; the residual stream
    has the type of the parameters.

    Args:
        stack: the layers, with heads of an even width. What happens to their weights later does not show.
        rows: positions that will be computed together, many times; 0 for a single pass over any number.
    """

    def __init__(self, stack: Stack, rows: int = 0) -> None:
        self._stack, self.device, self.dtype = stack, stack.device, stack.product_dtype
        self.products = best_products(self.device, self.dtype, rows)
        matrix = self.products.matrix
        self.heads, self.head_width = stack.heads, stack.head_width
        self.rotated_dtype = torch.promote_types(self.dtype, torch.float32)
        self.layers = [
            FrozenLayer(
                attn_gamma_D=layer.attn_gamma_D.detach(),
                qkv=matrix(layer.qkv_ED),
                attn_out=matrix(layer.attn_out_DE),
                ff_gamma_D=layer.ff_gamma_D.detach(),
                ff_in=(matrix(layer.ff_in[0]), layer.ff_in[1].detach().to(self.dtype)),
                ff_out=(matrix(layer.ff_out[0]), layer.ff_out[1].detach()),
            )
            for layer in stack.read()
        ]
        self._final_gamma_D = stack.final_gamma_D().detach()

    def turns(self, length: int) -> Tensor:
        """As `Stack.turns`, to be broadcast over queries and keys and over the heads [S 1 1 C]."""
        return self._stack.turns(length)[:, None, None].to(self.rotated_dtype.to_complex())

    def __call__(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """As `Stack.__call__`, from which nothing flows back."""
        return self.final_norm(self.through(x_BTD, mask_BT))

    def through(self, x_BTD: Tensor, mask_BT: Tensor | None = None, cache_LXBHTK: Tensor | None = None) -> Tensor:
        """The same before the final norm; keys and values of every layer go into the cache, where there is one."""
        rows, length, _ = x_BTD.shape
        bias = None if mask_BT is None else as_bias(mask_BT, self.dtype)
        x_ND, turns_T11C = x_BTD.flatten(0, 1).clone(), self.turns(length)
        room = Heads(self, (rows, length))
        qkv_XBHTK = room.qkv_XHK.permute(2, 0, 3, 1, 4)
        for number, layer in enumerate(self.layers):
            self.project(layer, x_ND, turns_T11C, room)
            if cache_LXBHTK is not None:
                cache_LXBHTK[number] = qkv_XBHTK[1:]
            q_BHTK, k_BHTK, v_BHTK = qkv_XBHTK.to(self.dtype)
            attended_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, bias, causal=self._stack.causal)
            self.finish(layer, x_ND, attended_BHTK.transpose(1, 2).reshape(len(x_ND), -1))
        return x_ND.view_as(x_BTD)

    def project(self, layer: FrozenLayer, x_ND: Tensor, turns_11C: Tensor, into: Heads) -> None:
        """Rotated and scaled queries, rotated keys, and values."""
        normed_ND = F.layer_norm(x_ND, x_ND.shape[-1:], weight=layer.attn_gamma_D)
        self.products.write_product(into.qkv_NE, normed_ND.to(self.dtype), layer.qkv)
        into.pairs_XHC.mul_(turns_11C)

    def finish(self, layer: FrozenLayer, x_ND: Tensor, attended_NE: Tensor) -> None:
        """The rest of a layer behind its attention, in place: output product, residuals, feed-forward."""
        self.products.add_product(x_ND, attended_NE, layer.attn_out)
        normed_ND = F.layer_norm(x_ND, x_ND.shape[-1:], weight=layer.ff_gamma_D).to(self.dtype)
        self.products.add_feedforward(x_ND, normed_ND, layer.ff_in, layer.ff_out)

    def final_norm(self, x_D: Tensor) -> Tensor:
        """The norm behind the last layer, of any leading shape [... D]."""
        return F.layer_norm(x_D, x_D.shape[-1:], weight=self._final_gamma_D)


class _Rotation(torch.autograd.Function):
    """Queries and keys, rotated in float32 at least, and values, head by head and contiguous [B H T K], of what one
    product gave [B T X H K]. Written out, since autograd goes over memory more often, which takes half as long
    again (`tests/benchmarks/speed/`)."""

    @staticmethod
    def forward(ctx: Any, qkv_BTXHK: Tensor, turns_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_XBHTK = qkv_BTXHK.permute(2, 0, 3, 1, 4)
        ctx.turns_TC = turns_TC
        q_BHTK, k_BHTK = _rotated(qkv_XBHTK[0], qkv_XBHTK[1], turns_TC).to(qkv_BTXHK.dtype)
        return q_BHTK, k_BHTK, qkv_XBHTK[2].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads_BHTK: Tensor) -> tuple[Tensor, None]:
        q_BHTK, k_BHTK, v_BHTK = grads_BHTK
        rows, heads, length, width = v_BHTK.shape
        grad_BTXHK = v_BHTK.new_empty(rows, length, 3, heads, width)
        grad_XBHTK = grad_BTXHK.permute(2, 0, 3, 1, 4)
        grad_XBHTK[:2] = _rotated(q_BHTK, k_BHTK, ctx.turns_TC.conj())
        grad_XBHTK[2] = v_BHTK
        return grad_BTXHK, None


def _rotated(q_BHTK: Tensor, k_BHTK: Tensor, turns_TC: Tensor) -> Tensor:
    """Both, rotated, in float32 at least [2 B H T K]."""
    exact = torch.promote_types(q_BHTK.dtype, torch.float32)
    qk_XBHTK = torch.empty(2, *q_BHTK.shape, dtype=exact, device=q_BHTK.device)
    qk_XBHTK[0], qk_XBHTK[1] = q_BHTK, k_BHTK
    torch.view_as_complex(qk_XBHTK.view(*qk_XBHTK.shape[:-1], -1, 2)).mul_(turns_TC.to(exact.to_complex()))
    return qk_XBHTK


def _add(x_BTD: Tensor, block_BTD: Tensor, drop_B1D: Tensor | None) -> Tensor:
    return x_BTD + block_BTD if drop_B1D is None else x_BTD + block_BTD * drop_B1D
