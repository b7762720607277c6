"""The race of `benchmarks/speed/race.py` measures both sides alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gptvae_cli.data import batches_of
from gptvae_cli.evaluation import measure_texts
from gptvae_cli.model import GPTVAE
from tests.benchmarks.speed import race
from tests.conftest import stock_of

BEFORE = b"To be, or not to be: "
TEXT = b"that is the question, whether 'tis nobler in the mind to suffer. " * 20  # two whole windows and a short one


@pytest.fixture
def reader(tiny_model: Callable[..., GPTVAE]) -> GPTVAE:
    """A model of bytes."""
    return tiny_model(num_tokens=259, pad_id=256, bos_id=257, eos_id=258, max_seq_len=520)


def narrowed(model: GPTVAE) -> GPTVAE:
    """With posteriors so narrow that a sample is their mean: the sides draw from different generators."""
    with torch.no_grad():
        model.to_latent_mean_log_variance.get_parameter("0.bias")[model.dim_latent :] -= 40
    return model


def test_both_sides_pay_the_same_with_the_same_weights(reader: GPTVAE) -> None:
    model = narrowed(reader)
    rows = race.stock_rows(TEXT, BEFORE)
    ours = race.nats_of_ours(model, rows, seed=0)
    stock = race.nats_of_stock(stock_of(model).train(), rows, seed=1)  # training would drop half of the latents
    # Ours are in order of length.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    assert_close(ours.cross_entropy_N, stock.cross_entropy_N[order], rtol=1e-5, atol=0)
    assert_close(ours.kl_N, stock.kl_N[order], rtol=1e-5, atol=0)
    bits = [race.bits_per_byte(nats.cross_entropy_N + nats.kl_N, len(TEXT)) for nats in (ours, stock)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)
    without_N = measure_texts(model, batches_of(rows, None, model.pad_id, 8192)[0]).cross_entropy_without_N
    assert ((ours.cross_entropy_N / without_N - 1).abs() > 5e-4).all(), "else one side might not read its latents"


def test_the_kl_is_charged_alike_where_posteriors_are_wide(reader: GPTVAE) -> None:
    rows = race.stock_rows(TEXT[: race.WINDOW], BEFORE)
    ours, stock = race.nats_of_ours(reader, rows, seed=0), race.nats_of_stock(stock_of(reader), rows, seed=0)
    assert float(ours.kl_N) > 0.1
    assert_close(ours.kl_N, stock.kl_N, rtol=1e-5, atol=0)


def test_bits_per_byte_of_uniform_bytes_are_eight() -> None:
    nats_N = torch.tensor([256.0, 256.0], dtype=torch.float64).log() * 3  # two rows of three bytes
    assert race.bits_per_byte(nats_N, 6) == pytest.approx(8)


def test_stock_predicts_every_byte_of_every_window_once() -> None:
    rows = race.stock_rows(TEXT, BEFORE)
    assert [bytes(row[1:]) for row in rows] == race.windows(TEXT)
    assert b"".join(race.windows(TEXT)) == TEXT
    assert [row[0] for row in rows] == [BEFORE[-1], *(window[-1] for window in race.windows(TEXT)[:-1])]


def test_one_step_of_each_side_leaves_a_byte_near_eight_bits(one_thread: None) -> None:
    text = bytes(torch.randint(32, 127, (12_000,), generator=torch.Generator().manual_seed(0)).tolist())
    for run in (race.race_stock, race.race_ours):
        found = run(text[:10_000], text[10_000:], 0.001, "nano", 0, 0.0)
        assert found.steps == 1
        assert found.seconds > found.limit
        assert 7 < found.bits_per_byte < 9
        assert 0 <= found.kl < 0.2


@pytest.mark.parametrize(
    "bits, runs, verdict",
    [
        (lambda limit: 3.0 if limit >= 75 else 4.0, 4, "gptvae is as good as stock in 75.0 s of 600.0: 8.0x"),
        (lambda limit: 4.0, 7, "gptvae is not as good as stock within 600.0 s"),
    ],
    ids=["reached", "never"],
)
def test_a_race_ends_with_the_first_run_that_is_as_good(
    monkeypatch: pytest.MonkeyPatch, bits: Callable[[float], float], runs: int, verdict: str
) -> None:
    def run(side: str, value: Callable[[float], float]) -> Any:
        def finish(train: bytes, valid: bytes, limit: float, *others: Any) -> race.Finish:
            return race.Finish(side, limit, limit, limit, 1, 1, value(limit), 0.0)

        return finish

    monkeypatch.setattr(race, "race_stock", run("stock", lambda limit: 3.0))
    monkeypatch.setattr(race, "race_ours", run("gptvae", bits))
    finishes = race.race(TEXT, 10, 0, 0.0)
    assert [finish.side for finish in finishes] == ["stock"] + ["gptvae"] * runs
    assert race.table(finishes).splitlines()[-1] == verdict
