"""How soon gptvae predicts tiny Shakespeare as well as `x_transformers.gpt_vae.GPTVAE` does after ten minutes.

    python -m tests.benchmarks.speed.race --threads 1

A race is printed and appended to `race.txt` beside this file. The text is `$GPTVAE_TEST_DATA/tinyshakespeare.txt`: its
first 90 % to train on, the rest to predict, in consecutive windows of 512 bytes, the length that stock learns. Both
sides compute on the CPU.

Stock has the settings of x-transformers' own script, `train_gpt_vae.py`: bytes, random crops of 512 and the byte before
them, four times four of them a step, Adam at 1e-4, gradients cut at 0.5, rotary positions, a latent of one dimension,
dropped from half of the rows, KL of weight 1 and without a floor. Its width, depths and heads are those that gptvae
chooses for the time. The script's own validations and samples are left out.

gptvae has its defaults, with `--unit window`: what is to be predicted is pieces of a running text, which begin and end
anywhere. It learns from random crops, too, and charges no EOS, which such a piece does not have. It chooses its best
model by 5 % of the text to train on, so that neither side has seen what is measured. Its learning rate falls over the
run, whose length has to be known before: so it runs for 1/64, 1/32, 1/16 ... of stock's time, until a run that is
finished is as good as stock.

Bits per byte are (cross-entropy + KL) / ln 2 of all windows over their bytes, with one sample of every latent and none
dropped. Both sides predict every byte. Stock, which cannot predict a first token, reads the byte before a window; ours
begins with BOS. Where a window has more tokens than ours reads at once, it is cut, and every part pays for a latent.

Seconds are of the clock, from a process's start (the loading of the libraries counts on both sides) to a model that is
ready; `cpu` are those of the processor, which are fewer where the machine was not quiet.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from x_transformers import gpt_vae as stock_module

from gptvae_cli.config import PRESETS, DataConfig, PresetName, SizeConfig, TrainConfig
from gptvae_cli.data import batches_of
from gptvae_cli.device import resolve_device, resolve_dtype, tune_cpu
from gptvae_cli.evaluation import measure_texts
from gptvae_cli.model import GPTVAE
from gptvae_cli.sampling import Encoder
from tests.benchmarks.latent.study import columns, trained
from tests.benchmarks.speed.compare import heading

RESULTS = Path(__file__).with_name("race.txt")
WINDOW, BATCH, ACCUMULATE, LR, CLIP = 512, 4, 4, 1e-4, 0.5
SHARES = [2.0**-power for power in range(6, -1, -1)]
"""Of stock's time, that gptvae gets."""


# What a side pays for a text ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Nats:
    """What a side pays for every row, float64 [N]."""

    cross_entropy_N: Tensor
    kl_N: Tensor


def bits_per_byte(nats_N: Tensor, size: int) -> float:
    """What was paid for rows that hold so many bytes of text."""
    return float(nats_N.sum()) / math.log(2) / size


@torch.no_grad()
def nats_of_stock(model: Any, rows: Sequence[Sequence[int]], *, seed: int) -> Nats:
    """By the stock class's own loss, one row at a time, of all tokens but a row's first."""
    assert model.vae_kl_div_floor == 0, "the loss has the KL above the floor only"
    model.eval()  # which drops no latent
    torch.manual_seed(seed)
    found = []
    for row in rows:
        _, (nats_per_token, kl) = model(torch.tensor([row]), return_all_losses=True)
        found.append((float(nats_per_token) * (len(row) - 1), float(kl)))
    cross_entropy_N, kl_N = torch.tensor(found, dtype=torch.float64).T
    return Nats(cross_entropy_N, kl_N)


def nats_of_ours(model: GPTVAE, rows: Sequence[Sequence[int]], *, seed: int) -> Nats:
    """As `gptvae evaluate` measures the bound, of all tokens but a row's first; rows in order of length."""
    figures = measure_texts(model, batches_of(rows, None, model.pad_id, 8192)[0], seed=seed)
    return Nats(figures.cross_entropy_N, figures.kl_N)


def windows(text: bytes) -> list[bytes]:
    """The text in pieces, the last one shorter."""
    return [text[start : start + WINDOW] for start in range(0, len(text), WINDOW)]


def stock_rows(text: bytes, before: bytes) -> list[list[int]]:
    """What stock reads of each window: the byte before it, and its own.

    Args:
        text: to predict.
        before: what stands before it.
    """
    everything = before[-1:] + text
    return [list(everything[start : start + WINDOW + 1]) for start in range(0, len(text), WINDOW)]


# The two sides --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a side, which begin with what this process took to load its libraries."""

    def __init__(self, loading: float) -> None:
        self._began, self._began_cpu = time.monotonic() - loading, time.process_time() - loading

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def cpu_seconds(self) -> float:
        return time.process_time() - self._began_cpu


@dataclass(frozen=True)
class Finish:
    """Where a side was when its time was over.

    Args:
        side: its name.
        limit: seconds that it was given.
        seconds, cpu_seconds: that it took.
        steps: of the optimizer.
        parameters: of the model.
        bits_per_byte: of the text that was held out.
        kl: of that, bits per byte.
    """

    side: str
    limit: float
    seconds: float
    cpu_seconds: float
    steps: int
    parameters: int
    bits_per_byte: float
    kl: float


def _finish(
    side: str, limit: float, took: tuple[float, float], steps: int, model: torch.nn.Module, nats: Nats, size: int
) -> Finish:
    parameters = sum(p.numel() for p in model.parameters())
    bits, of_kl = (bits_per_byte(nats_N, size) for nats_N in (nats.cross_entropy_N + nats.kl_N, nats.kl_N))
    return Finish(side, limit, *took, steps, parameters, bits, of_kl)


def race_stock(train: bytes, valid: bytes, limit: float, preset: PresetName, seed: int, loading: float) -> Finish:
    """Trains the stock class as its script does, with sizes of a preset, for so many seconds."""
    clock = Clock(loading)
    torch.manual_seed(seed)
    model = stock_module.GPTVAE(
        num_tokens=256,
        max_seq_len=WINDOW,
        rotary_pos_emb=True,
        vae_kl_loss_weight=1.0,
        dim_latent=1,
        **asdict(PRESETS[preset]),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    text = torch.frombuffer(bytearray(train), dtype=torch.uint8)
    crop = torch.arange(WINDOW + 1)
    model.train()
    steps = told = 0
    while steps == 0 or clock.seconds() < limit:  # one at least, as ours takes
        for _ in range(ACCUMULATE):
            starts_B = torch.randint(0, len(text) - WINDOW - 1, (BATCH,))
            loss, (nats_per_token, _) = model(text[starts_B[:, None] + crop].long(), return_all_losses=True)
            (loss / ACCUMULATE).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if (tenth := int(10 * clock.seconds() / limit)) > told:
            told = tenth
            bits = nats_per_token.item() / math.log(2)
            print(f"  {tenth:3}0% {bits:.3f} bits per byte of the last crops", file=sys.stderr, flush=True)
    took = (clock.seconds(), clock.cpu_seconds())
    nats = nats_of_stock(model, stock_rows(valid, train), seed=seed)
    return _finish("stock", limit, took, steps, model, nats, len(valid))


def race_ours(train: bytes, valid: bytes, limit: float, preset: PresetName, seed: int, loading: float) -> Finish:
    """Trains gptvae by its defaults, with sizes of a preset, in a run of so many seconds."""
    clock = Clock(loading)
    device = resolve_device("cpu")
    with tempfile.TemporaryDirectory(prefix="gptvae-race-") as folder:
        corpus = Path(folder) / "train.txt"
        corpus.write_bytes(train)
        job, saved = trained(
            Path(folder) / "run",
            [str(corpus)],
            DataConfig(unit="window"),
            TrainConfig(max_time=limit, seed=seed),
            sizes=SizeConfig(preset=preset),
            device=device,
            precision=resolve_dtype("auto", device.device, training=True),
            seconds=clock.seconds,
        )
    took = (clock.seconds(), clock.cpu_seconds())
    rows = list(Encoder(saved, "window").rows(window.decode() for window in windows(valid)))
    said = "".join(saved.tokenizer.decode(row) for row in rows)
    assert said.encode() == valid, "the rows are not the text"
    nats = nats_of_ours(saved.model, rows, seed=seed)
    return _finish("gptvae", limit, took, job.learner.counters.step, saved.model, nats, len(valid))


# The race -------------------------------------------------------------------------------------------------------------


def race(text: bytes, minutes: float, seed: int, loading: float) -> list[Finish]:
    """Stock, and then gptvae in ever longer runs, until one is as good."""
    cut = len(text) * 9 // 10
    train, valid = text[:cut], text[cut:]
    preset: PresetName = "micro"
    print(f"stock, {minutes:g} minutes", file=sys.stderr, flush=True)
    finishes = [race_stock(train, valid, 60 * minutes, preset, seed, loading)]
    for share in SHARES:
        print(f"gptvae, {share * minutes:g} minutes", file=sys.stderr, flush=True)
        finishes.append(race_ours(train, valid, 60 * minutes * share, preset, seed, loading))
        if finishes[-1].bits_per_byte <= finishes[0].bits_per_byte:
            break
    return finishes


def table(finishes: Sequence[Finish]) -> str:
    """A row for every run, and what they come to; stock is the first."""
    lines = [("side", "limit s", "took s", "cpu s", "steps", "parameters", "bits/byte", "of it KL")]
    for finish in finishes:
        lines.append(
            (
                finish.side,
                f"{finish.limit:g}",
                f"{finish.seconds:.1f}",
                f"{finish.cpu_seconds:.1f}",
                f"{finish.steps:,}",
                f"{finish.parameters:,}",
                f"{finish.bits_per_byte:.3f}",
                f"{finish.kl:.4f}",
            )
        )
    stock, last = finishes[0], finishes[-1]
    if last.bits_per_byte <= stock.bits_per_byte:
        ratio = f"as good as stock in {last.seconds:.1f} s of {stock.seconds:.1f}: {stock.seconds / last.seconds:.1f}x"
    else:
        ratio = f"not as good as stock within {last.seconds:.1f} s"
    return f"{columns(lines)}\ngptvae is {ratio}"


def main() -> None:
    loading = time.process_time()  # of the processor: files that were read for the first time are not counted
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of stock")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice by default")
    parser.add_argument("--seed", type=int, default=0, help="of both sides' weights, crops and noise")
    asked = parser.parse_args()
    head = heading(tune_cpu(asked.threads))
    text = (Path(os.environ["GPTVAE_TEST_DATA"]) / "tinyshakespeare.txt").read_bytes()
    found = table(race(text, asked.minutes, asked.seed, loading))
    shown = f"{head}; seed {asked.seed}\n{found}\n"
    print(shown, end="")
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(shown)


if __name__ == "__main__":
    main()
