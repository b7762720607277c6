"""gptvae against `x_transformers.gpt_vae.GPTVAE`: the same weights or architecture, both sides alternating in one run.

    python -m tests.benchmarks.speed.compare generate-1
    python -m tests.benchmarks.speed.compare all >> tests/benchmarks/speed/results.txt

A row prints the median of each side and of their ratio, with the ratio's range over the rounds; `limit` rows compare
with what this machine can do at most: reading memory, multiplying matrices. Rows that train or
encode real text read `$GPTVAE_TEST_DATA/tatoeba_eng_train.txt`, or `wikisplit_train.txt`.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from x_transformers import gpt_vae as stock_module

from gptvae_cli import objective
from gptvae_cli.attention import attend, attend_by_kernel, attend_one
from gptvae_cli.config import PRESETS, DType, ModelConfig, Preset, TextConfig, TrainConfig
from gptvae_cli.data import batches_of
from gptvae_cli.device import resolve_device, resolve_dtype, tokens_together, tune_cpu
from gptvae_cli.evaluation import measure
from gptvae_cli.fused import _Rotation
from gptvae_cli.learner import Learner
from gptvae_cli.model import GPTVAE
from gptvae_cli.noise import Purpose, row_bits, row_uniforms
from gptvae_cli.objective import Batch, _LinearCrossEntropy
from gptvae_cli.products import PackedProducts, Products, SplitProducts
from gptvae_cli.schedule import Dropout
from gptvae_cli.text import read_texts
from gptvae_cli.tokenizer import Tokenizer
from gptvae_cli.training import _step, _Sums

LAYOUT_WIDTHS = [(256, 768), (1024, 256), (256, 4032), (256, 256), (256, 1024), (512, 512), (512, 1536), (2048, 512)]
"""Of a layer's matrices, and the vocabulary's, as (in, out)."""
Side = Callable[[], float]
"""Does a share of the work and returns how much that was: tokens, texts or runs."""


def compare(name: str, unit: str, sides: dict[str, Side], rounds: int) -> str:
    """Times the sides in turn; the first is ours, the last the reference."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side, work in sides.items():
            began = time.perf_counter()
            amount = work()
            if turn > 0:  # the first round warms up
                rates[side].append(amount / (time.perf_counter() - began))
    lines = []
    ours, *others = sides
    for other in others:
        ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
        lines.append(
            f"{name:<22} {statistics.median(ratios):6.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})"
            f"  {statistics.median(rates[ours]):10,.1f} against {statistics.median(rates[other]):10,.1f} {unit},"
            f" {other}"
        )
    return "\n".join(lines)


def pair(num_tokens: int, *, dim: int, depth: int, enc_depth: int, heads: int, longest: int) -> tuple[GPTVAE, Any]:
    """Our model and the stock class with the same weights."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_tokens=num_tokens + 3,
        dim=dim,
        depth=depth,
        enc_depth=enc_depth,
        heads=heads,
        max_seq_len=longest,
        dim_latent=32,
        pad_id=num_tokens,
        bos_id=num_tokens + 1,
        eos_id=num_tokens + 2,
        conditioning="token",
    )
    ours = GPTVAE.from_config(config)
    stock = stock_module.GPTVAE(
        num_tokens=config.num_tokens,
        dim=dim,
        depth=depth,
        enc_depth=enc_depth,
        heads=heads,
        max_seq_len=longest,
        dim_latent=32,
        pad_id=config.pad_id,
        rotary_pos_emb=True,
        attn_flash=True,
        vae_kl_div_floor=0.5,
        latents_dropout_prob=0.1,
    )
    stock.load_state_dict(ours.state_dict())
    return ours, stock


# Rows -----------------------------------------------------------------------------------------------------------------


def generate(batch: int, rounds: int, *, bfloat16: bool = False) -> str:
    """Greedy decoding of 64 tokens from latents, 6 layers of 256, stock in float32; where ours is in float32 too, the
    texts are compared."""
    ours, stock = pair(4000, dim=256, depth=6, enc_depth=3, heads=4, longest=128)
    ours.eval(), stock.eval()
    prompts_BT = torch.full((batch, 1), 4001)
    latents_BZ = torch.randn(batch, 32)
    written: dict[str, torch.Tensor] = {}

    def side(name: str, model: Any) -> Side:
        def work() -> float:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16 and model is ours):
                written[name] = model.generate(prompts_BT, 64, latents=latents_BZ, temperature=0.0)
            return 64 * batch

        return work

    label = f"generate, batch {batch}" + (", bf16" if bfloat16 else "")
    line = compare(label, "tokens/s", {"ours": side("a", ours), "stock": side("b", stock)}, rounds)
    assert bfloat16 or torch.equal(written["a"], written["b"]), "the two sides wrote different texts"
    return line


def train_windows(rounds: int) -> str:
    """Training on 16 rows of 128 tokens, 6 layers of 256, both with AdamW; the type is what each side would choose."""
    ours, stock = pair(4000, dim=256, depth=6, enc_depth=3, heads=4, longest=130)
    rows = torch.randint(0, 4000, (16, 128), generator=torch.Generator().manual_seed(0))
    tokens_BT = torch.cat([torch.full((16, 1), 4001), rows, torch.full((16, 1), 4002)], dim=1)
    batch = Batch(tokens_BT, None, 16 * 129)
    steps = 4
    sides = {
        "ours": lambda: steps * batch.target_tokens / train_ours(ours, [batch] * steps),
        "stock in float32": lambda: steps * batch.target_tokens / train_stock(stock, [tokens_BT] * steps, False),
        "stock in bfloat16": lambda: steps * batch.target_tokens / train_stock(stock, [tokens_BT] * steps, True),
    }
    return compare("train, 128 tokens", "tokens/s", {name: counted(work) for name, work in sides.items()}, rounds)


def train_lines(rounds: int) -> str:
    """Training on sentences: ours in batches by length, stock in random batches of 64 padded to their longest."""
    tokenizer, rows = sentences(4096)
    ours, stock = pair(tokenizer.pad_id, dim=128, depth=4, enc_depth=2, heads=2, longest=64)
    pad_id = tokenizer.pad_id
    planned, _ = batches_of(rows, None, pad_id, 2048)
    batches = planned[:: max(1, len(planned) // 12)]
    texts_ours = sum(len(batch.tokens_BT) for batch in batches)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    random = [
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(rows[i]) for i in order[start : start + 64]], batch_first=True, padding_value=pad_id
        )
        for start in range(0, 64 * 12, 64)
    ]
    texts_stock = sum(map(len, random))
    sides = {
        "ours": lambda: texts_ours / train_ours(ours, batches),
        "stock in float32": lambda: texts_stock / train_stock(stock, random, False),
        "stock in bfloat16": lambda: texts_stock / train_stock(stock, random, True),
    }
    return compare("train, sentences", "texts/s", {name: counted(work) for name, work in sides.items()}, rounds)


def encode(rounds: int, *, dtype: torch.dtype = torch.float32) -> str:
    """Sentences to posterior means, tokenising included: ours as `gptvae encode`, stock in batches of 64 in order."""
    from gptvae_cli.checkpoint import load, save_model
    from gptvae_cli.config import DataConfig
    from gptvae_cli.header import FORMAT_VERSION, ModelHeader
    from gptvae_cli.sampling import Encoder

    tokenizer, _ = sentences(4096)
    ours, stock = pair(tokenizer.pad_id, dim=128, depth=4, enc_depth=2, heads=2, longest=64)
    lines = corpus(4096)
    stock.eval()
    assert ours.config is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(path, ours, ModelHeader(FORMAT_VERSION, ours.config, DataConfig(), tokenizer.to_json(), {}))
        checkpoint = load(path, device=torch.device("cpu"), dtype=dtype)

    def encode_ours() -> float:
        return sum(1 for _ in Encoder(checkpoint, "line").encode(lines))

    @torch.no_grad()
    def encode_stock() -> float:
        for start in range(0, len(lines), 64):
            ids = tokenizer.encode_batch(lines[start : start + 64])
            padded = [torch.tensor([tokenizer.bos_id, *row, tokenizer.eos_id][:64]) for row in ids]
            seq = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True, padding_value=tokenizer.pad_id)
            stock.encode_to_latents(seq, return_mean_log_var=True)
        return len(lines)

    label = "encode, sentences" + (", bf16" if dtype == torch.bfloat16 else "")
    return compare(label, "texts/s", {"ours": encode_ours, "stock": encode_stock}, rounds)


def start(rounds: int) -> str:
    """The whole process of `gptvae encode` for one line, against importing x-transformers."""
    from gptvae_cli.checkpoint import save_model
    from gptvae_cli.config import DataConfig
    from gptvae_cli.header import FORMAT_VERSION, ModelHeader

    tokenizer, _ = sentences(4096)
    ours, _ = pair(tokenizer.pad_id, dim=128, depth=4, enc_depth=2, heads=2, longest=64)
    assert ours.config is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(path, ours, ModelHeader(FORMAT_VERSION, ours.config, DataConfig(), tokenizer.to_json(), {}))

        def process(*words: str) -> Side:
            def work() -> float:
                subprocess.run([sys.executable, *words], input=b"a line\n", check=True, capture_output=True)
                return 1

            return work

        sides = {
            "ours": process("-m", "gptvae_cli", "encode", "--model", str(path)),
            "import x_transformers": process("-c", "import x_transformers"),
        }
        return compare("start", "runs/s", sides, rounds)


def there_and_back(function: Callable[[], torch.Tensor]) -> Side:
    """Forward and backward, from a gradient as it comes in training: of any numbers, and contiguous."""
    gradient = torch.randn_like(function())

    def work() -> float:
        for _ in range(20):
            torch.autograd.backward(function(), gradient)
        return 20

    return work


def attention(rounds: int) -> str:
    """Causal attention, forward and backward: plain products against torch's kernel."""
    short, lines = [(146, 15), (16, 127)], []
    for dtype, shapes in ((torch.bfloat16, [*short, (4, 512), (1, 2048)]), (torch.float32, short)):
        for batch, length in shapes:
            q, k, v = (torch.randn(batch, 2, length, 64, dtype=dtype, requires_grad=True) for _ in range(3))
            sides = {
                "ours": there_and_back(lambda q=q, k=k, v=v: attend(q, k, v, None, causal=True)),  # type: ignore[misc]
                "torch's kernel": there_and_back(
                    lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True)  # type: ignore[misc]
                ),
            }
            name = f"attention, {batch} x {length}" + (", f32" if dtype == torch.float32 else "")
            lines.append(compare(name, "passes/s", sides, rounds))
    return "\n".join(lines)


def attention_one(rounds: int) -> str:
    """Attention of one query a row in bfloat16, over 33 slots of caches of 128, one a layer, as `attend_one` computes
    it for many rows, against torch's kernel and against products of bfloat16."""

    def small(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: None) -> torch.Tensor:
        return (q.bfloat16() @ k.transpose(-1, -2)).softmax(-1) @ v

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: None) -> torch.Tensor:
        return attend_by_kernel(q.bfloat16(), k, v, bias, causal=False)

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: None) -> torch.Tensor:
        return attend_one(q, k, v, bias, most_rows=128)

    def side(function: Callable[..., torch.Tensor], rows: int) -> Side:
        caches = torch.randn(6, 2, rows, 4, 128, 64).bfloat16()[..., :33, :]
        query, others = torch.randn(rows, 4, 1, 64), torch.randn(2**22)

        def work() -> float:
            with torch.autocast("cpu", torch.bfloat16):
                for _ in range(20):
                    others.sum()  # so that caches are read from memory, as other layers push them out
                    for keys, values in caches:
                        function(query, keys, values, None)
            return 120.0

        return work

    with torch.inference_mode():
        return "\n".join(
            compare(
                f"attention-one, {rows}, bf16",
                "layers/s",
                {
                    name: side(function, rows)
                    for name, function in (("float32", exact), ("kernel", kernel), ("products", small))
                },
                rounds,
            )
            for rows in (1, 2, 8, 32, 128)
        )


def rotation(rounds: int) -> str:
    """Queries and keys of 186 rows of 11 tokens, rotated, forward and backward: ours against autograd's."""
    stack = pair(100, dim=192, depth=1, enc_depth=1, heads=3, longest=64)[0].fused_decoder
    assert stack is not None
    turns_TC = stack.turns(11)
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        qkv = torch.randn(186, 11, 3, 3, 64, dtype=dtype, requires_grad=True)

        def ours(qkv: torch.Tensor = qkv) -> torch.Tensor:
            return torch.stack(_Rotation.apply(qkv, turns_TC))  # type: ignore[no-untyped-call]

        def autograds(qkv: torch.Tensor = qkv) -> torch.Tensor:
            qkv_XBHTK = qkv.permute(2, 0, 3, 1, 4)
            pairs = torch.view_as_complex(qkv_XBHTK[:2].float().contiguous().unflatten(-1, (-1, 2)))  # type: ignore[no-untyped-call]
            qk_XBHTK = torch.view_as_real(pairs * turns_TC).flatten(-2).to(qkv.dtype)
            return torch.stack([*qk_XBHTK, qkv_XBHTK[2]])

        sides = {"ours": there_and_back(ours), "autograd's": there_and_back(autograds)}
        name = "rotation, 186 x 11" + (", f32" if dtype == torch.float32 else "")
        lines.append(compare(name, "passes/s", sides, rounds))
    return "\n".join(lines)


def drop(rounds: int) -> str:
    """The dropout of a step of 180 rows, made of whole numbers against uniform ones of float32."""
    lines = []
    for name in ("small", "large"):
        width, rows = (2 * PRESETS[name].depth + 2) * PRESETS[name].dim, range(180)

        def ours(width: int = width, rows: range = rows) -> float:
            return len(row_bits(0, Purpose.TRAINING_DROP, 0, rows, width) >= 6554)

        def floats(width: int = width, rows: range = rows) -> float:
            return len(row_uniforms(0, Purpose.TRAINING_DROP, 0, rows, width) >= np.float32(0.1))

        lines.append(compare(f"drop, {name}", "rows/s", {"ours": ours, "of float32": floats}, rounds))
    return "\n".join(lines)


def loss(rounds: int) -> str:
    """Forward and backward of the cross-entropy of 2,048 tokens over 2,003: ours against torch's, and in float32 also
    against ours with the vocabulary as it comes, which is not filled up to a multiple of 8."""
    ours, _ = pair(2000, dim=128, depth=1, enc_depth=1, heads=2, longest=64)
    hidden_ND = torch.randn(2048, 128, requires_grad=True)
    targets_N = torch.randint(0, 2000, (2048,))
    weight_VD = ours.decoder.to_logits.weight

    def in_parts() -> torch.Tensor:
        nats: torch.Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, 2000)  # type: ignore[no-untyped-call]
        return nats

    def as_it_comes() -> torch.Tensor:
        with patch.object(objective, "_WORDS_TOGETHER", 1):
            return in_parts()

    def torchs() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden_ND, weight_VD), targets_N, reduction="sum")

    def side(function: Callable[[], torch.Tensor], bfloat16: bool) -> Side:
        def work() -> float:
            for _ in range(20):
                with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                    nats = function()
                nats.backward()  # type: ignore[no-untyped-call]
            return 20

        return work

    both = {"ours": side(in_parts, True), "torch's": side(torchs, True)}
    three = {"ours": side(in_parts, False), "as it comes": side(as_it_comes, False), "torch's": side(torchs, False)}
    return "\n".join(
        (
            compare("loss, 2048 x 2003", "passes/s", both, rounds),
            compare("loss, 2048 x 2003, f32", "passes/s", three, rounds),
        )
    )


def memory(rounds: int) -> str:
    """Training steps in a process that keeps freed memory (`tune_cpu`), against one that does not."""

    def process(tuned: bool) -> Side:
        program = f"from tests.benchmarks.speed.compare import seconds_of_steps; print(seconds_of_steps({tuned}))"

        def work() -> float:
            began = time.perf_counter()
            ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            # Steps a second inside the process, times the seconds that are measured around it.
            return 20 / float(ran.stdout) * (time.perf_counter() - began)

        return work

    return compare("train, memory kept", "steps/s", {"ours": process(True), "as it comes": process(False)}, rounds)


def number_types(rounds: int) -> str:
    """Training steps of `micro` and `small` on sentences in bfloat16 against float32, whatever `auto` takes here: what
    `device.BFLOAT16_PAYS` rests on."""
    tokenizer, rows = sentences(16_384)
    planned, _ = batches_of(rows, None, tokenizer.pad_id, 2048)
    batches = planned[:: max(1, len(planned) // 12)]

    def side(sizes: Preset, dtype: DType) -> Side:
        ours, _ = pair(tokenizer.pad_id, **asdict(sizes), longest=64)
        return counted(lambda: len(batches) / train_ours(ours, batches, dtype))

    dtypes: tuple[DType, ...] = ("bfloat16", "float32")
    return "\n".join(
        compare(f"train, {name}", "steps/s", {dtype: side(PRESETS[name], dtype) for dtype in dtypes}, rounds)
        for name in ("micro", "small")
    )


def layout(rounds: int) -> str:
    """Products with a matrix in every way that `best_products` chooses from. There are as many matrices as a
    processor's caches do not hold."""

    def side(way: Products, weights: list[torch.Tensor], rows_NI: torch.Tensor) -> Side:
        matrices = [way.matrix(weight) for weight in weights]
        times = max(1, 1000 // len(rows_NI) // 20)

        def work() -> float:
            for _ in range(times):
                for matrix in matrices:
                    way.product(rows_NI, matrix)
            return float(times * len(matrices))

        return work

    lines = []
    for dtype, count, width_in, width_out in [
        *((torch.float32, 1, *widths) for widths in LAYOUT_WIDTHS),
        *((torch.float32, count, *widths) for count in (2, 8, 32, 128, 1024) for widths in LAYOUT_WIDTHS[:3]),
        *((torch.bfloat16, count, *widths) for count in (1, 2, 8, 32, 128, 1024) for widths in LAYOUT_WIDTHS[:3]),
    ]:
        weights = [torch.randn(width_out, width_in) for _ in range(2**23 // (width_in * width_out) + 1)]
        rows_NI = torch.randn(count, width_in).to(dtype)
        ways = {
            "packed": PackedProducts(dtype, count),
            "split": SplitProducts(dtype),
            "by vector": Products(dtype, by_vector=True),
            "transposed": Products(dtype, transpose=True),
            "as it comes": Products(dtype),
        }
        if count > 1 or dtype == torch.bfloat16:
            del ways["split"]
        if count > 1 or dtype == torch.float32:
            del ways["by vector"]
        name = f"{count} x {width_in} x {width_out}" + (", bf16" if dtype == torch.bfloat16 else "")
        with torch.inference_mode():
            sides = {label: side(way, weights, rows_NI) for label, way in ways.items()}
            lines.append(compare(name, "products/s", sides, rounds))
    return "\n".join(lines)


def shapes(rounds: int) -> str:
    """The second pass over a megabyte of long sentences, where what oneDNN compiled for every shape of batch is kept
    (`tune_cpu`), against its default; without products of bfloat16 there is nothing to keep."""

    def process(**environment: str) -> Side:
        program = "from tests.benchmarks.speed.compare import rate_of_second_pass; print(rate_of_second_pass())"

        def rate() -> float:
            variables = {**os.environ, **environment}
            ran = subprocess.run(
                [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=variables
            )
            return float(ran.stdout)

        return counted(rate)

    sides = {"ours": process(), "oneDNN's default": process(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")}
    return compare("train, shapes kept", "steps/s", sides, rounds)


def kept(rounds: int) -> str:
    """Memory that oneDNN takes for every shape of a product of bfloat16 that it keeps; of one measurement."""
    weight, rows = torch.ones(192, 768, dtype=torch.bfloat16), torch.ones(2048, 192, dtype=torch.bfloat16)
    room = torch.ones(2048, 768, dtype=torch.bfloat16)
    counts = range(1504, 2048, 8)
    torch.mm(rows, weight, out=room)
    before = _resident_bytes()
    for count in counts:
        torch.mm(rows[:count], weight, out=room[:count])
    return f"kept                   {(_resident_bytes() - before) / len(counts) / 1e6:6.2f} MB a product"


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def validate(rounds: int) -> str:
    """Validation of 1,000 sentences in bfloat16: of the decoder alone against all passes, and, of all passes, in the
    batches of inference in bfloat16 against those of float32."""
    tokenizer, rows = sentences(1000)
    model, _ = pair(tokenizer.pad_id, dim=128, depth=4, enc_depth=1, heads=2, longest=64)

    def side(dtype: torch.dtype, **keywords: bool) -> Side:
        batches, _ = batches_of(rows, None, tokenizer.pad_id, tokens_together(torch.device("cpu"), dtype))

        def work() -> float:
            measure(model, batches, dtype=torch.bfloat16, **keywords)
            return len(rows)

        return work

    whole = side(torch.bfloat16)
    alone = {"ours": side(torch.bfloat16, without_latent=True), "all passes": whole}
    larger = {"ours": whole, "batches of float32": side(torch.float32)}
    return "\n".join(
        [
            compare("validate, baseline", "texts/s", alone, rounds),
            compare("validate, batches", "texts/s", larger, rounds),
        ]
    )


def compiled(rounds: int) -> str:
    """Training steps as they are, against steps whose layers went through `torch.compile`; its time is not counted."""
    tokenizer, rows = sentences(4096)
    batches = batches_of(rows, None, tokenizer.pad_id, 2048)[0][:12]
    plain, other = (
        pair(tokenizer.pad_id, dim=128, depth=4, enc_depth=1, heads=2, longest=64)[0] for _ in ("plain", "compiled")
    )
    for stack in (other.fused_encoder, other.fused_decoder):
        for name in ("project", "finish"):
            setattr(stack, name, torch.compile(getattr(stack, name), dynamic=True))
    seconds = timed(lambda: train_ours(other, batches))
    sides = {
        "ours": counted(lambda: len(batches) / train_ours(plain, batches)),
        f"compiled in {seconds:.0f} s": counted(lambda: len(batches) / train_ours(other, batches)),
    }
    return compare("train, not compiled", "steps/s", sides, rounds)


def neighbour(rounds: int) -> str:
    """Training steps, and greedy decoding of one text, where waiting threads spin for a short time (`cli/app.py`),
    against libgomp's default: alone, and beside a process that keeps one processor busy."""

    def process(amount: int, seconds: str, **environment: str) -> Side:
        program = f"from tests.benchmarks.speed import compare; print(compare.{seconds})"

        def work() -> float:
            began = time.perf_counter()
            variables = {**os.environ, **environment}
            ran = subprocess.run(
                [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=variables
            )
            return amount / float(ran.stdout) * (time.perf_counter() - began)

        return work

    def sides(amount: int, seconds: str) -> dict[str, Side]:
        ours = process(amount, seconds, GOMP_SPINCOUNT="3000")
        return {"ours": ours, "libgomp's default": process(amount, seconds)}

    train, decode = sides(8, "seconds_of_steps(True, 8)"), sides(64, "seconds_of_tokens(64)")
    lines = [compare("train, alone", "steps/s", train, rounds), compare("decode, alone", "tokens/s", decode, rounds)]
    # It ends with this process, however that ends.
    loop = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    with subprocess.Popen([sys.executable, "-c", loop]) as busy:
        try:
            lines.append(compare("train, busy neighbour", "steps/s", train, rounds))
            lines.append(compare("decode, busy neighbour", "tokens/s", decode, rounds))
        finally:
            busy.kill()
    return "\n".join(lines)


def limit_decode(rounds: int) -> str:
    """Greedy decoding of one text by 29 million parameters in float32, against the time that it takes to read the
    weights which a token needs: those of the decoder's layers and of the logits."""
    ours, _ = pair(4000, dim=512, depth=8, enc_depth=1, heads=8, longest=128)
    ours.eval()
    read = [*ours.decoder.attn_layers.parameters(), ours.decoder.to_logits.weight]
    weight_bytes = sum(4 * parameter.numel() for parameter in read)
    # As large as the weights, so that as much of it stays in caches; a sum reads slower than a product does.
    prompt_1T, latent_1Z, large = torch.full((1, 1), 4001), torch.randn(1, 32), torch.randn(weight_bytes // 4)
    ratios, token_seconds, rates = [], [], []
    for turn in range(rounds + 1):
        decoding = timed(lambda: ours.generate(prompt_1T, 64, latents=latent_1Z, temperature=0.0)) / 64
        rate = 8 * large.nbytes / timed(lambda: [large.dot(large) for _ in range(8)])
        if turn > 0:  # the first round warms up
            ratios.append(decoding * rate / weight_bytes)
            token_seconds.append(decoding)
            rates.append(rate)
    return (
        f"{'limit, decode':<22} {statistics.median(ratios):6.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})"
        f"  {1e3 * statistics.median(token_seconds):10,.2f} ms a token, of {weight_bytes / 1e6:,.1f} MB, read at"
        f" {statistics.median(rates) / 1e9:,.1f} GB/s"
    )


def limit_train(rounds: int) -> str:
    """The floating point operations a second of a training step, 16 rows of 128 tokens, 6 layers of 256, against those
    of a product of two square matrices of 2,048, in both types.

    A step takes 6 for every weight of a product and token, and 12 for every pair of positions and dimension of the
    heads, half of these under a causal mask. The optimizer's, and what is computed twice, do not count.
    """
    rows, length, width, vocabulary = 16, 130, 256, 4003
    ours, _ = pair(4000, dim=width, depth=6, enc_depth=3, heads=4, longest=length)
    tokens_BT = torch.randint(0, 4000, (rows, length), generator=torch.Generator().manual_seed(0))
    tokens_BT[:, 0], tokens_BT[:, -1] = 4001, 4002
    batch = Batch(tokens_BT, None, rows * (length - 1))
    layer_weights = 12 * width**2
    # The encoder reads all tokens, the decoder the latent and all but the last.
    products = 6 * rows * (9 * layer_weights * length + width * vocabulary * (length - 1))
    attended = 12 * rows * length**2 * width * (3 + 6 / 2)
    lines = []
    name: DType
    for name in ("float32", "bfloat16"):
        square = torch.randn(2048, 2048).to(getattr(torch, name))
        shares, peaks = [], []
        for turn in range(rounds + 1):
            reached = 4 * (products + attended) / train_ours(ours, [batch] * 4, name)
            peak = 2 * 2048**3 / timed(lambda square=square: square @ square)  # type: ignore[misc]
            if turn > 0:
                shares.append(100 * reached / peak)
                peaks.append(peak)
        lines.append(
            f"{'limit, train':<22} {statistics.median(shares):6.1f}%  ({min(shares):.1f} to {max(shares):.1f})"
            f"  of {statistics.median(peaks) / 1e9:10,.1f} GFLOP/s, in {name}"
        )
    return "\n".join(lines)


# What rows share ------------------------------------------------------------------------------------------------------


def seconds_of_steps(tuned: bool, steps: int = 20) -> float:
    """Seconds of so many training steps on sentences."""
    if tuned:
        tune_cpu(None)
    tokenizer, rows = sentences(4096)
    ours, _ = pair(tokenizer.pad_id, dim=128, depth=4, enc_depth=2, heads=2, longest=64)
    batches = batches_of(rows, None, tokenizer.pad_id, 2048)[0][:steps]
    train_ours(ours, batches[:3])
    return train_ours(ours, batches) * steps / len(batches)


def rate_of_second_pass() -> float:
    """Steps a second in the second pass over WikiSplit's sentences, in shuffled batches."""
    tune_cpu(None)
    lines = corpus(8192, "wikisplit")
    tokenizer = Tokenizer.train_bpe(lines, 2500)
    rows = [[tokenizer.bos_id, *row[:126], tokenizer.eos_id] for row in tokenizer.encode_batch(lines)]
    ours, _ = pair(tokenizer.pad_id, dim=128, depth=4, enc_depth=1, heads=2, longest=128)
    batches, _ = batches_of(rows, None, tokenizer.pad_id, 2048)
    random.Random(0).shuffle(batches)
    train_ours(ours, batches)
    return len(batches) / train_ours(ours, batches)


def seconds_of_tokens(tokens: int) -> float:
    """Seconds of writing one text of so many tokens, 29 million parameters in float32."""
    tune_cpu(None)
    ours, _ = pair(4000, dim=512, depth=8, enc_depth=1, heads=8, longest=128)
    ours.eval()
    prompt_1T, latent_1Z = torch.full((1, 1), 4001), torch.randn(1, 32)
    ours.generate(prompt_1T, 8, latents=latent_1Z, temperature=0.0)
    return timed(lambda: ours.generate(prompt_1T, tokens, latents=latent_1Z, temperature=0.0))


def timed(work: Callable[[], object]) -> float:
    """Seconds of a piece of work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def train_ours(model: GPTVAE, batches: list[Batch], dtype: DType = "auto") -> float:
    """Seconds of one optimizer step a batch, as `gptvae train` takes it."""
    config = TrainConfig(batch_tokens=2048)
    if not hasattr(model, "learner"):
        model.learner = Learner(model, config)  # type: ignore[assignment]
    precision = resolve_dtype(dtype, torch.device("cpu"), training=True).dtype
    sums = _Sums(0.0)
    model.train()
    began = time.perf_counter()
    for batch in batches:
        _step(model.learner, [batch], 0.5, Dropout(0.0, 0.0), precision, sums)  # type: ignore[arg-type]
    return time.perf_counter() - began


def train_stock(model: Any, batches: list[torch.Tensor], bfloat16: bool) -> float:
    """Seconds of one optimizer step a batch, as x-transformers' own training script takes it."""
    if not hasattr(model, "optimizer"):
        model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    began = time.perf_counter()
    for tokens_BT in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16) if bfloat16 else nullcontext():
            loss = model(tokens_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        model.optimizer.step()
        model.optimizer.zero_grad()
    return time.perf_counter() - began


def heading(threads: int) -> str:
    """What a table was measured on, and when."""
    kind = resolve_dtype("auto", resolve_device("cpu").device, training=True)
    return (
        f"# {time.strftime('%Y-%m-%d')}, {platform.machine()}, {threads} threads, Python {platform.python_version()},"
        f" torch {torch.__version__}; training in {str(kind.dtype).removeprefix('torch.')}: {kind.reason}"
    )


def counted(rate: Callable[[], float]) -> Side:
    """A side that times itself: its rate times the seconds that will be measured around it."""

    def work() -> float:
        began = time.perf_counter()
        found = rate()
        return found * (time.perf_counter() - began)

    return work


def corpus(count: int, name: str = "tatoeba_eng") -> list[str]:
    path = Path(os.environ["GPTVAE_TEST_DATA"]) / f"{name}_train.txt"
    return list(islice((line for line in read_texts([str(path)], TextConfig()) if line), count))


def sentences(count: int) -> tuple[Tokenizer, list[list[int]]]:
    """A tokenizer of 2,000 tokens, and rows of at most 64."""
    lines = corpus(20_000)
    tokenizer = Tokenizer.train_bpe(lines, 2000)
    ids = tokenizer.encode_batch(lines[:count])
    return tokenizer, [[tokenizer.bos_id, *row[:62], tokenizer.eos_id] for row in ids]


ROWS: dict[str, Callable[[int], str]] = {
    "generate-1": lambda rounds: generate(1, rounds),
    "generate-32": lambda rounds: generate(32, rounds),
    "generate-128": lambda rounds: generate(128, rounds),
    "generate-1-bf16": lambda rounds: generate(1, rounds, bfloat16=True),
    "generate-32-bf16": lambda rounds: generate(32, rounds, bfloat16=True),
    "generate-128-bf16": lambda rounds: generate(128, rounds, bfloat16=True),
    "train": train_windows,
    "train-lines": train_lines,
    "encode": encode,
    "encode-bf16": lambda rounds: encode(rounds, dtype=torch.bfloat16),
    "start": start,
    "attention": attention,
    "attention-one": attention_one,
    "rotation": rotation,
    "drop": drop,
    "loss": loss,
    "memory": memory,
    "dtype": number_types,
    "layout": layout,
    "shapes": shapes,
    "kept": kept,
    "validate": validate,
    "compile": compiled,
    "neighbour": neighbour,
    "limit-decode": limit_decode,
    "limit-train": limit_train,
}


def rows(names: list[str]) -> Iterator[str]:
    for name in names:
        yield from list(ROWS) if name == "all" else [name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*ROWS, "all"])
    parser.add_argument("--rounds", type=int, default=7, help="both sides are timed so often, in turn")
    asked = parser.parse_args()
    print(heading(tune_cpu(None)))
    for name in rows(asked.names):
        print(ROWS[name](asked.rounds), flush=True)


if __name__ == "__main__":
    main()
