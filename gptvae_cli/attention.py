"""Softmax attention, by whatever is fastest: products, or one of torch's fused kernels.

Shapes: B batch, H heads, T queries, S keys, K head width.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH_TOKENS = 128
"""Keys from which on torch's fused kernel attends faster on a CPU than products do, in float32."""
_VECTOR_BYTES = 64
"""Of a vector register of 512 bits."""
_MANY_ROWS = 8
"""Rows from which on products of float32 attend to keys of bfloat16 faster than torch's fused kernel, on a CPU."""
_SWITCH = Lock()


def as_bias(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores of this type: as good as -inf where a position may not be looked at, but finite, for a
    row of nothing but padding would make NaN of it [B 1 1 T]."""
    return torch.zeros_like(mask_BT, dtype=dtype).masked_fill_(~mask_BT, torch.finfo(dtype).min / 2)[:, None, None]


def attend(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None, *, causal: bool) -> Tensor:
    """Softmax attention with scaled queries [B H T K].

    On a CPU, plain products are faster than torch's fused kernel, forward and backward: in bfloat16 3 to 8 times on
    rows of up to 128 tokens, and as fast still on 2,048; in float32 1.3 times on shorter ones (row `attention` of
    `tests/benchmarks/speed/`). A GPU takes the kernel.

    Args:
        bias: added to the scores, very low where a key may not be seen; broadcasts to [B H T S].
        causal: a query sees the keys up to its own position; queries and keys then are the same positions.
    """
    if bias is not None:
        bias = bias.to(q_BHTK.dtype)
    long = q_BHTK.dtype != torch.bfloat16 and k_BHSK.shape[-2] >= _FLASH_TOKENS
    if q_BHTK.device.type != "cpu" or long:
        return attend_by_kernel(q_BHTK, k_BHSK, v_BHSK, bias, causal=causal)
    scores_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2)
    if causal:
        shape = scores_BHTS.shape[-2:]
        future_TS = torch.full(shape, float("-inf"), dtype=q_BHTK.dtype, device=q_BHTK.device).triu(1)
        scores_BHTS = scores_BHTS + future_TS
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    if scores_BHTS.shape[-1] * scores_BHTS.itemsize < _VECTOR_BYTES:
        weights_BHTS: Tensor = _ShortSoftmax.apply(scores_BHTS)  # type: ignore[no-untyped-call]
    else:
        weights_BHTS = scores_BHTS.softmax(dim=-1)
    return weights_BHTS @ v_BHSK


def attend_one(q_BH1K: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None, *, most_rows: int) -> Tensor:
    """As `attend`, for one query a row, in the type of keys and values [B H 1 K].

    Where these are bfloat16 and rows are many, a CPU computes in float32, whatever autocast says: torch's fused kernel
    takes up to twice as long (row `attention-one` of `tests/benchmarks/speed/`).

    Args:
        most_rows: that may be there. The way depends on it, so that a row does not depend on how many others are.
    """
    dtype = k_BHSK.dtype
    if q_BH1K.device.type != "cpu" or dtype != torch.bfloat16 or most_rows < _MANY_ROWS:
        return attend_by_kernel(q_BH1K.to(dtype), k_BHSK, v_BHSK, bias, causal=False)
    with torch.autocast("cpu", enabled=False):
        scores_BH1S = q_BH1K.float() @ k_BHSK.float().transpose(-1, -2)
        if bias is not None:
            scores_BH1S += bias
        return (scores_BH1S.softmax(dim=-1) @ v_BHSK.float()).to(dtype)


def attend_by_kernel(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias: Tensor | None, *, causal: bool) -> Tensor:
    """As `attend`, by one of torch's fused kernels, but not cuDNN's, which torch prefers on recent GPUs: it prepares
    itself anew for every shape, which is every batch of another length and every token that is written. Whether it may
    is a setting of the process: one thread at a time changes it and puts it back."""
    if q_BHTK.device.type == "cpu":
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias, is_causal=causal, scale=1.0)
    with _SWITCH:
        preferred = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=bias, is_causal=causal, scale=1.0)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(preferred)


class _ShortSoftmax(torch.autograd.Function):
    """Softmax of short rows, in float32 at least. Torch's goes over a CPU's rows one by one, and over their numbers
    singly where they are fewer than a vector register holds; written out, all rows are gone over together."""

    @staticmethod
    def forward(ctx: Any, scores_BHTS: Tensor) -> Tensor:
        exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
        weights_BHTS = scores_BHTS.to(exact, copy=True)
        weights_BHTS.sub_(weights_BHTS.amax(dim=-1, keepdim=True)).exp_()
        weights_BHTS.div_(weights_BHTS.sum(dim=-1, keepdim=True))
        ctx.save_for_backward(weights_BHTS)
        return weights_BHTS.to(scores_BHTS.dtype)

    @staticmethod
    def backward(ctx: Any, grad_BHTS: Tensor) -> Tensor:
        weights_BHTS: Tensor = ctx.saved_tensors[0]
        each_BHTS = weights_BHTS * grad_BHTS
        return each_BHTS.sub_(weights_BHTS * each_BHTS.sum(dim=-1, keepdim=True)).to(grad_BHTS.dtype)
