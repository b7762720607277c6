"""`gptvae evaluate`, against figures that are computed here from the same files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from gptvae_cli.checkpoint import load
from gptvae_cli.cli.app import app
from tests.cli.conftest import WIDTH, make_model
from tests.cli.test_train import assert_fails

pytestmark = pytest.mark.usefixtures("one_thread")

Evaluate = Callable[..., Result]
TEXTS = ["the quick fox", "two words", "", "naïve", "a b c", "日本", "x" * 60]
"""The last is longer than the model's 24 tokens, and is cut without an end."""


@pytest.fixture
def evaluate(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """Runs `gptvae evaluate` in this process, on TEXTS and with few samples."""
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")

    def invoke(*options: object, model: str = "line", corpus: str = "texts.txt") -> Result:
        path = str(models / f"{model}.safetensors")
        arguments = ["evaluate", corpus, "--model", path, "--samples", "3", "--device", "cpu", *map(str, options)]
        return CliRunner().invoke(app, arguments)

    return invoke


def figures(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_texts_are_counted_with_their_ends(evaluate: Evaluate) -> None:
    """The empty text counts, and what was cut away does not."""
    found = figures(evaluate("--json"))
    kept = [*TEXTS[:-1], "x" * 23]
    ends = len(TEXTS) - 1
    assert found["texts"] == len(TEXTS)
    assert found["bytes"] == found["tokens"] == sum(len(text.encode()) for text in kept) + ends
    assert found["words"] == sum(len(text.split()) for text in kept) + ends


def test_units_follow_from_one_another(evaluate: Evaluate) -> None:
    found = figures(evaluate("--json"))
    nats = found["iw_nll"] * found["texts"]
    assert found["perplexity_per_token"] == pytest.approx(math.exp(nats / found["tokens"]))
    assert found["perplexity_per_word"] == pytest.approx(math.exp(nats / found["words"]))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"])
    assert found["nll_bound"] == pytest.approx(found["cross_entropy"] + found["kl"])


def test_kl_is_that_of_the_latents_that_encode_gives(evaluate: Evaluate, models: Path) -> None:
    found = figures(evaluate("--json"))
    path = str(models / "line.safetensors")
    encoded = CliRunner().invoke(
        app, ["encode", "texts.txt", "--model", path, "--out", "z.npy", "--std-out", "s.npy", "-q"]
    )
    assert encoded.exit_code == 0
    mean_NZ, std_NZ = np.load("z.npy").astype(np.float64), np.load("s.npy").astype(np.float64)
    kl_N = 0.5 * (mean_NZ**2 + std_NZ**2 - 1 - 2 * np.log(std_NZ)).sum(-1)
    assert found["kl"] == pytest.approx(kl_N.mean(), rel=1e-4)
    assert found["active_001"] == (mean_NZ.var(0) > 0.01).sum() <= WIDTH


def test_no_z_is_the_decoder_alone(evaluate: Evaluate, models: Path) -> None:
    found = figures(evaluate("--json"))
    checkpoint = load(models / "line.safetensors", device=torch.device("cpu"))
    config, decoder = checkpoint.header.model, checkpoint.model.decoder
    total = 0.0
    for ids in checkpoint.tokenizer.encode_batch(TEXTS):
        row = torch.tensor([config.bos_id, *ids, config.eos_id][: config.max_seq_len])
        with torch.no_grad():
            log_probs_TV = decoder(row[None, :-1])[0].log_softmax(-1)
        total -= float(log_probs_TV.gather(1, row[1:, None]).sum())
    assert found["cross_entropy_without"] == pytest.approx(total / len(TEXTS), rel=1e-4)


def test_the_table_shows_the_figures_of_the_json(evaluate: Evaluate) -> None:
    found, table = figures(evaluate("--json")), evaluate()
    assert table.exit_code == 0
    for name in ("iw_nll", "nll_bound", "kl", "mutual_information", "cross_entropy_shuffled"):
        assert f"{found[name]:.2f}" in table.stdout, name
    assert f"{found['bits_per_byte']:.3f} bits per byte" in table.stdout


def test_the_first_texts_are_taken_and_the_seed_decides_the_rest(evaluate: Evaluate) -> None:
    assert figures(evaluate("--json", "--texts", "3"))["texts"] == 3
    assert evaluate("--json").stdout == evaluate("--json").stdout
    assert figures(evaluate("--json", "--seed", "5"))["iw_nll"] != figures(evaluate("--json"))["iw_nll"]


def test_a_baseline_is_measured_on_the_same_texts(evaluate: Evaluate, models: Path, tmp_path: Path) -> None:
    """One that was trained without a latent is measured without one."""
    plain = figures(evaluate("--json"))
    same = figures(evaluate("--json", "--baseline", models / "line.safetensors"))
    assert same["baseline_nll"] == pytest.approx(plain["iw_nll"])
    assert same["efficiency"] == pytest.approx((plain["iw_nll"] - plain["cross_entropy"]) / plain["kl"])
    alone = make_model(tmp_path / "alone.safetensors", train={"latents_dropout_prob": 1.0})
    without = figures(evaluate("--json", "--baseline", alone))
    assert without["baseline_nll"] == pytest.approx(plain["cross_entropy_without"])


def test_latents_may_come_from_other_texts(evaluate: Evaluate) -> None:
    Path("other.txt").write_text("".join(f"{text}\n" for text in reversed(TEXTS)), encoding="utf-8")
    plain, other = figures(evaluate("--json")), figures(evaluate("--json", "--latents-from", "other.txt"))
    assert other["kl"] == pytest.approx(plain["kl"], rel=1e-4)  # of the same texts, in another order
    assert other["cross_entropy"] != pytest.approx(plain["cross_entropy"], rel=1e-3)
    shutil.copy("texts.txt", "short.txt")
    Path("short.txt").write_text("one\n")
    assert_fails(evaluate("--latents-from", "short.txt"), 3, "short.txt holds 1 texts", "7", hint=False)


def test_windows_are_texts_of_their_own(evaluate: Evaluate) -> None:
    Path("long.txt").write_text("0123456789" * 10)
    found = figures(evaluate("--json", model="window", corpus="long.txt"))
    assert found["texts"] == math.ceil(100 / 23)
    assert found["bytes"] == 100  # a window has no end


def test_one_text_is_not_enough(evaluate: Evaluate) -> None:
    Path("one.txt").write_text("one\n")
    assert_fails(evaluate(corpus="one.txt"), 3, "found 1 text", "two", hint=False)
