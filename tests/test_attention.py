"""Attention, by products or by torch's kernels, against torch's kernel in float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gptvae_cli import attention
from gptvae_cli.attention import attend, attend_one
from tests.pretended_gpu import PretendedGPU, pretended_gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 31, 32, 127, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_torchs_kernel(length: int, causal: bool, dtype: torch.dtype) -> None:
    """Values and gradients, on both sides of the lengths from which on another way is faster."""
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = (torch.randn(3, 2, length, 16, generator=generator).bfloat16() for _ in range(4))
    bias = None if causal else torch.zeros(3, 1, 1, length)
    if bias is not None:
        bias[0, ..., (length + 1) // 2 :] = float("-inf")
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (q / 4, k, v)]
    attended = attend(inputs[0], inputs[1], inputs[2], bias, causal=causal)
    found = [attended, *torch.autograd.grad(attended, inputs, grad.to(dtype))]
    queries, keys, values = (tensor.double().requires_grad_() for tensor in (q / 4, k, v))
    mask = None if bias is None else bias.double()
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal, scale=1.0)
    expected = [attended, *torch.autograd.grad(attended, [queries, keys, values], grad.double())]
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def test_cudnn_does_not_attend_and_is_asked_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """It prepares itself for every shape, and torch prefers it on recent GPUs."""
    allowed: Callable[[], bool] = torch.backends.cuda.cudnn_sdp_enabled
    asked: list[bool] = []

    def kernel(*args: Any, **options: Any) -> torch.Tensor:
        asked.append(allowed())
        if options["is_causal"]:
            raise RuntimeError("as a kernel may")
        result: torch.Tensor = args[0]
        return result

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    before = allowed()
    with pretended_gpu():
        q = torch.randn(1, 1, 200, 16, device="cuda")
        attend(q, q, q, None, causal=False)
        with pytest.raises(RuntimeError, match="as a kernel may"):
            attend(q, q, q, None, causal=True)
    assert (before, asked, allowed()) == (True, [False, False], True)


def test_threads_leave_the_setting_for_cudnn_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the process's: one that found it changed by another would leave it so."""

    def kernel(*args: Any, **options: Any) -> torch.Tensor:
        time.sleep(0.02)
        result: torch.Tensor = args[0]
        return result

    def attended(_: int) -> None:
        with PretendedGPU():
            q = torch.randn(1, 1, 200, 16, device="cuda")
            attend(q, q, q, None, causal=False)

    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    with pretended_gpu(), ThreadPoolExecutor(4) as threads:
        list(threads.map(attended, range(4)))
    assert torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]


def test_on_a_cpu_no_setting_of_the_process_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that set it and set it back would leave it as it was between."""

    def refuse(enabled: bool) -> None:
        raise AssertionError("set for all threads")

    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", refuse)
    q = torch.randn(1, 1, 200, 16)
    assert attend(q, q, q, None, causal=True).shape == q.shape


def test_the_softmax_of_short_rows_is_torchs() -> None:
    """Values and gradients; whatever is added to a row, and where some of it is masked."""
    scores = 30 * torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    scores[0] += 1000
    scores[1, ..., 3:] = float("-inf")
    found = []
    short: Any = attention._ShortSoftmax.apply
    for softmax in (short, lambda scores: scores.softmax(dim=-1)):
        scores.requires_grad_(True)
        weights = softmax(scores)
        found.append((weights, *torch.autograd.grad((weights * torch.arange(7)).sum(), scores)))
    assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "most_rows"), [(1, 1), (3, 3), (3, 8), (1, 8)])
def test_one_query_equals_torchs_kernel(
    rows: int, most_rows: int, masked: bool, dtype: torch.dtype, autocast: bool
) -> None:
    """Keys and values are some slots of a longer cache, as in decoding, and the result has their type, to whose
    nearest numbers it is rounded where it is computed in float32; scores that were rounded are off by twice as much."""
    generator = torch.Generator().manual_seed(rows)
    q, *cache = (torch.randn(rows, 2, slots, 16, generator=generator).bfloat16() for slots in (1, 40, 40))
    k, v = (tensor.to(dtype)[:, :, :33] for tensor in cache)
    bias = None
    if masked:
        bias = torch.zeros(rows, 1, 1, 33, dtype=dtype)
        bias[0, ..., 5:] = float("-inf")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
        found = attend_one(q.float(), k, v, bias, most_rows=most_rows)
    mask = None if bias is None else bias.double()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=1.0)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2.5e-3 if most_rows == 8 else 6e-3
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("most_rows", [5, 8])
def test_a_query_does_not_depend_on_the_other_rows(most_rows: int, dtype: torch.dtype) -> None:
    """Nor on whether there are any: rows leave a batch as they end."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 2, 1, 16, generator=generator)
    k, v = (torch.randn(5, 2, 33, 16, generator=generator).to(dtype) for _ in range(2))
    together = attend_one(q, k, v, None, most_rows=most_rows)
    for rows in (1, 2, 4):
        assert torch.equal(attend_one(q[:rows], k[:rows], v[:rows], None, most_rows=most_rows), together[:rows])
