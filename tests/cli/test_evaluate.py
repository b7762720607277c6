"""`gptvae evaluate`, against figures that are computed here from the same files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner, Result

import gptvae_cli
from gptvae_cli.checkpoint import load, save_model
from gptvae_cli.cli.app import app
from gptvae_cli.config import SampleConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import batches_of
from gptvae_cli.decoding import Request, decode
from gptvae_cli.evaluation import importance_weighted, write_greedily
from gptvae_cli.header import read_header
from gptvae_cli.sampling import Encoder
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

    def invoke(*options: object, model: str = "line", corpus: str = "texts.txt", stdin: bytes | None = None) -> Result:
        path = str(models / f"{model}.safetensors")
        arguments = ["evaluate", corpus, "--model", path, "--samples", "3", "--device", "cpu", *map(str, options)]
        return CliRunner().invoke(app, arguments, input=stdin)

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
    nats = found["nll_nats_per_text"] * found["texts"]
    assert found["perplexity_per_token"] == pytest.approx(math.exp(nats / found["tokens"]))
    assert found["perplexity_per_word"] == pytest.approx(math.exp(nats / found["words"]))
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"])
    bound = found["cross_entropy_nats_per_text"] + found["kl_nats_per_text"]
    assert found["nll_bound_nats_per_text"] == pytest.approx(bound)


def test_kl_is_that_of_the_latents_that_encode_gives(evaluate: Evaluate, models: Path) -> None:
    found = figures(evaluate("--json"))
    path = str(models / "line.safetensors")
    encoded = CliRunner().invoke(
        app, ["encode", "texts.txt", "--model", path, "--out", "z.npy", "--std-out", "s.npy", "-q"]
    )
    assert encoded.exit_code == 0
    mean_NZ, std_NZ = np.load("z.npy").astype(np.float64), np.load("s.npy").astype(np.float64)
    kl_N = 0.5 * (mean_NZ**2 + std_NZ**2 - 1 - 2 * np.log(std_NZ)).sum(-1)
    assert found["kl_nats_per_text"] == pytest.approx(kl_N.mean(), rel=1e-4)
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
    assert found["cross_entropy_without_nats_per_text"] == pytest.approx(total / len(TEXTS), rel=1e-4)


def test_the_table_shows_the_figures_of_the_json_in_80_columns(evaluate: Evaluate, models: Path) -> None:
    baseline = ("--baseline", models / "paragraph.safetensors")
    found, table = figures(evaluate("--json", *baseline)), evaluate(*baseline)
    assert table.exit_code == 0
    for name in ("nll", "nll_bound", "kl", "cross_entropy_shuffled", "baseline_nll"):
        assert f"{found[f'{name}_nats_per_text']:.2f}" in table.stdout, name
        low, high = found["intervals_95"][f"{name}_nats_per_text"]
        assert f"[{low:.2f}, {high:.2f}]" in table.stdout, name
    assert f"{found['bits_per_byte']:.3f}" in table.stdout
    for fact in ("7 texts (line) of texts.txt", "seed 0", "3 samples", "95% intervals", "1,000 resamples"):
        assert fact in table.stdout
    short = [line for line in table.stdout.splitlines() if str(models) not in line]
    assert max(map(len, short)) <= 80


@pytest.mark.parametrize(
    ("texts", "shown"), [("cat\nCCO\n日本\n", False), ("a cat\nthe dog\n日本\n", False), ("a b\nc d\n", True)]
)
def test_what_hardly_consists_of_words_has_no_perplexity_of_them(evaluate: Evaluate, texts: str, shown: bool) -> None:
    """Of molecules it was 10 to the 34th. The JSON has it all the same."""
    Path("words.txt").write_text(texts, encoding="utf-8")
    table = evaluate(corpus="words.txt").stdout
    assert ("perplexity per word" in table, "perplexity per token" in table) == (shown, True)
    assert figures(evaluate("--json", corpus="words.txt"))["perplexity_per_word"] > 1


def test_the_json_says_what_was_measured_on_what(evaluate: Evaluate, models: Path) -> None:
    found = figures(evaluate("--json", "--seed", "5"))
    about = {"model": str(models / "line.safetensors"), "corpus": ["texts.txt"], "unit": "line", "seed": 5}
    assert {name: found[name] for name in about} == about
    assert (found["nll_samples"], found["intervals_resamples"]) == (3, 1000)
    assert set(found["intervals_95"]) <= set(found)


def test_the_first_texts_are_taken_and_the_seed_decides_the_rest(evaluate: Evaluate) -> None:
    assert figures(evaluate("--json", "--texts", "3"))["texts"] == 3
    assert figures(evaluate("--json", "--texts", "0"))["texts"] == len(TEXTS)
    plain = evaluate("--json").stdout
    assert evaluate("--json").stdout == plain
    other = figures(evaluate("--json", "--seed", "5"))
    assert other["nll_nats_per_text"] != json.loads(plain)["nll_nats_per_text"]


def test_a_text_is_measured_alike_wherever_it_stands(evaluate: Evaluate) -> None:
    Path("backwards.txt").write_text("".join(f"{text}\n" for text in reversed(TEXTS)), encoding="utf-8")
    plain, backwards = (figures(evaluate("--json", corpus=name)) for name in ("texts.txt", "backwards.txt"))
    assert plain.keys() == backwards.keys()
    for name, value in plain.items():
        if isinstance(value, float):
            assert backwards[name] == pytest.approx(value, rel=1e-4), name
    for name, ends in plain["intervals_95"].items():
        assert backwards["intervals_95"][name] == pytest.approx(ends, rel=1e-4), name


# Baselines ------------------------------------------------------------------------------------------------------------


def test_a_baseline_is_measured_on_the_same_texts(evaluate: Evaluate, models: Path, tmp_path: Path) -> None:
    """One that was trained without a latent is measured without one."""
    plain = figures(evaluate("--json"))
    same = figures(evaluate("--json", "--baseline", models / "line.safetensors"))
    assert same["baseline_nll_nats_per_text"] == pytest.approx(plain["nll_nats_per_text"])
    assert "efficiency_nats_per_nat" not in same, "it has a latent, too"
    alone = make_model(tmp_path / "alone.safetensors", train={"latents_dropout_prob": 1.0})
    without = figures(evaluate("--json", "--baseline", alone))
    assert without["baseline_nll_nats_per_text"] == pytest.approx(plain["cross_entropy_without_nats_per_text"])
    saved = without["baseline_nll_nats_per_text"] - plain["cross_entropy_nats_per_text"]
    assert without["efficiency_nats_per_nat"] == pytest.approx(saved / plain["kl_nats_per_text"])
    low, high = without["intervals_95"]["efficiency_nats_per_nat"]
    assert low < without["efficiency_nats_per_nat"] < high


@pytest.mark.parametrize(("model", "baseline"), [("line", "window"), ("window", "line"), ("line", "paragraph")])
def test_a_baseline_that_knows_another_end_of_a_text_is_told(
    evaluate: Evaluate, models: Path, model: str, baseline: str
) -> None:
    path = models / f"{baseline}.safetensors"
    found = evaluate("--texts", "2", "--baseline", path, model=model)
    said = f"{path} was trained on texts of unit {baseline}, {models / f'{model}.safetensors'} on {model}"
    assert (said in " ".join(found.stderr.split())) == ("window" in (model, baseline))


def test_a_model_without_a_latent_gets_no_figures_of_one(evaluate: Evaluate, tmp_path: Path) -> None:
    """Its encoder is random, and even a random one tells texts apart."""
    plain = figures(evaluate("--json"))
    alone = make_model(tmp_path / "alone.safetensors", train={"latents_dropout_prob": 1.0})
    found = figures(evaluate("--json", model=str(alone).removesuffix(".safetensors")))
    assert found["nll_nats_per_text"] == pytest.approx(plain["cross_entropy_without_nats_per_text"])
    assert found["nll_samples"] is None
    assert not {"kl_nats_per_text", "mutual_information_nats", "active_001", "bleu", "collapsed"} & set(found)
    table = evaluate(model=str(alone).removesuffix(".safetensors")).stdout
    assert "the model has no latent" in table
    assert f"{found['nll_nats_per_text']:.2f}" in table
    for claim in ("information", "active", "reconstruction", "KL", "collapsed"):
        assert claim not in table
    refused = evaluate("--labels", "texts.txt", model=str(alone).removesuffix(".safetensors"))
    assert_fails(refused, 2, "--labels", "without one", hint=False)


QUICK = ("--preset", "nano", "--threads", "1", "--dtype", "float32", "--batch-tokens", "128", "--device", "cpu")


@pytest.fixture
def run(evaluate: Evaluate) -> Path:
    """A run folder of four steps, in the current folder."""
    Path("corpus.txt").write_text("".join(f"{a}{b}\n" for a in "abcdefgh" for b in ("na", "lla", "ria", "bert")))
    trained = CliRunner().invoke(app, ["train", "corpus.txt", "--out", "run", "--steps", "4", "--seed", "3", *QUICK])
    assert trained.exit_code == 0, trained.stderr
    return Path("run")


def with_baseline(*options: object) -> Result:
    arguments = ["evaluate", "corpus.txt", "--model", "run", "--samples", "2", "--device", "cpu", "--json"]
    return CliRunner().invoke(app, [*arguments, "--with-baseline", *map(str, options)])


def test_with_baseline_trains_one_like_the_model_and_keeps_it(run: Path) -> None:
    first = with_baseline()
    found = figures(first)
    model, baseline = (read_header(folder / "model.safetensors") for folder in (run, run / "baseline"))
    assert (baseline.model, baseline.data, baseline.tokenizer) == (model.model, model.data, model.tokenizer)
    changed = {k for k, v in baseline.training["train"].items() if v != model.training["train"][k]}
    assert changed == {"latents_dropout_prob"}, "it was steps that ended the model's run, however long they took"
    assert baseline.training["steps"] == 4
    assert "training a baseline" in first.stderr
    alone = figures(CliRunner().invoke(app, ["evaluate", "corpus.txt", "--model", "run/baseline", "--json"]))
    assert found["baseline_nll_nats_per_text"] == pytest.approx(alone["nll_nats_per_text"])
    assert found["baseline"] == "run/baseline/model.safetensors"
    # The next time it is there, whatever is evaluated.
    written = (run / "baseline/model.safetensors").stat().st_mtime_ns
    again = with_baseline("--texts", "20")
    assert figures(again)["texts"] == 20
    assert "trained before" in again.stderr
    assert (run / "baseline/model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_baseline_is_trained_in_the_numbers_and_threads_of_its_model(
    run: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `auto` takes today; and what is measured then goes on with as many threads as before."""
    monkeypatch.setattr("gptvae_cli.machine._GROUPS", run / "none")  # a container may grant fewer
    arguments = ["train", "corpus.txt", "--out", "run", "--force", "--steps", "2", *QUICK, "--dtype", dtype]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    torch.set_num_threads(2)
    figures(with_baseline())
    assert torch.get_num_threads() == 2
    trained = read_header(run / "baseline/model.safetensors").training
    assert (trained["precision"], trained["threads"]) == (dtype, 1)


def test_a_baseline_in_other_numbers_is_told_of(run: Path) -> None:
    """Both when it is trained and when it is found."""
    arguments = ["train", "corpus.txt", "--out", "run", "--force", "--max-time", "3s", *QUICK]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    for result in (with_baseline("--dtype", "bfloat16"), with_baseline()):
        figures(result)
        assert "trained on cpu in float32 with threads: 1, its baseline on cpu in bfloat16" in result.stderr


def test_a_baseline_of_another_model_is_replaced(run: Path) -> None:
    figures(with_baseline())
    trained = CliRunner().invoke(app, ["train", "--resume", "--out", "run", "--steps", "20", "--device", "cpu"])
    assert trained.exit_code == 0, trained.stderr
    assert read_header(run / "model.safetensors").training["steps"] > 4, "the model is another one"
    figures(with_baseline())
    header = read_header(run / "baseline/model.safetensors")
    assert (header.training["steps"], header.training["train"]["steps"]) == (20, 20)


def test_a_baseline_needs_a_run_folder_with_its_corpus(run: Path, evaluate: Evaluate) -> None:
    assert_fails(evaluate("--with-baseline"), 3, "corpus", "cache", "--baseline baseline")
    assert_fails(with_baseline("--baseline", "run"), 2, "--baseline", "--with-baseline")
    content = json.loads((run / "cache/corpus.json").read_text())
    content["facts"]["digest"] = "0" * 32
    (run / "cache/corpus.json").write_text(json.dumps(content))
    assert_fails(with_baseline(), 3, "cache", "not the corpus")
    shutil.rmtree(run / "cache")
    assert_fails(with_baseline(), 3, "run/cache", "is not there", "--latents-dropout-prob 1")
    assert not (run / "baseline").exists()


# Held-out texts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(evaluate: Evaluate) -> list[str]:
    """The lines of a corpus, some of them empty or alike, of which a run in the current folder held out half."""
    lines = [f"{word} {i % 50}" if i % 9 else "" for i, word in enumerate(["tea", "sun", "sea"] * 40)]
    Path("half.txt").write_text("".join(f"{line}\n" for line in lines))
    arguments = ["train", "half.txt", "--out", "run", "--steps", "4", "--valid", "0.5", *QUICK]
    trained = CliRunner().invoke(app, arguments)
    assert trained.exit_code == 0, trained.stderr
    return lines


def of_run(corpus: str, *options: object, stdin: bytes | None = None) -> Result:
    arguments = ["evaluate", corpus, "--model", "run", "--samples", "2", "--device", "cpu", "--json"]
    return CliRunner().invoke(app, [*arguments, *map(str, options)], input=stdin)


def test_held_out_texts_are_those_that_the_run_has_kept_apart(half: list[str]) -> None:
    """The same that are in the run's cache, wherever the corpus is read from; and rows are those of the corpus."""
    corpus = Corpus.open(Path("run/cache"))
    starts_N, lengths_N = corpus.valid.spans(np.arange(len(corpus.valid)))
    rows_N = np.split(corpus.valid.read(starts_N, lengths_N), np.cumsum(lengths_N)[:-1])
    kept = [corpus.tokenizer.decode(row.tolist()) for row in rows_N]
    assert 20 < len(kept) < len(half) - 20
    result = of_run("half.txt", "--held-out", "--per-text", "scores.jsonl")
    assert (figures(result)["texts"], figures(result)["held_out"]) == (len(kept), True)
    rows = [json.loads(line)["row"] for line in Path("scores.jsonl").read_text().splitlines()]
    assert [half[row] for row in rows] == kept
    assert figures(of_run("-", "--held-out", "--texts", "7", stdin=Path("half.txt").read_bytes()))["texts"] == 7
    table = CliRunner().invoke(app, ["evaluate", "half.txt", "--held-out", "--model", "run", "--samples", "2"])
    assert f"{len(kept)} held-out texts (line) of half.txt\n" in table.stdout


def test_labels_stay_beside_held_out_texts(half: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("gptvae_cli.probe.require_classes", seen.append)
    Path("labels.txt").write_text("".join(f"{line[:3]}\n" for line in half))
    result = of_run("half.txt", "--held-out", "--labels", "labels.txt", "--per-text", "scores.jsonl", "--texts", "30")
    assert figures(result)["probe"]["labels"] == 3
    rows = [json.loads(line)["row"] for line in Path("scores.jsonl").read_text().splitlines()]
    assert seen[0] == [half[row][:3] for row in rows]
    assert rows != [*range(30)]
    Path("labels.txt").write_text("tea\nsun\n")
    assert_fails(of_run("half.txt", "--held-out", "--labels", "labels.txt"), 3, "2 labels", f"{len(half)} texts")


def test_texts_that_were_learnt_from_are_told_of(half: list[str]) -> None:
    """Where a run folder tells that they were; others, and those that were held out, are not."""
    told = "learnt from most of these texts"
    assert "--held-out" in of_run("half.txt").stderr
    assert told in of_run("half.txt").stderr
    assert told not in of_run("half.txt", "--held-out").stderr
    assert told not in of_run("half.txt", "--quiet").stderr
    Path("other.txt").write_text("tea\nsun\n")
    assert told not in of_run("other.txt").stderr
    arguments = ["train", "half.txt", "--out", "run", "--force", "--steps", "4", *QUICK]
    assert CliRunner().invoke(app, [*arguments, "--valid", "other.txt"]).exit_code == 0
    assert told in of_run("half.txt").stderr
    assert "--held-out" not in of_run("half.txt").stderr
    assert_fails(of_run("half.txt", "--held-out"), 2, "--valid other.txt", "gptvae evaluate other.txt")


def test_held_out_texts_that_are_not_known_are_refused(half: list[str], models: Path) -> None:
    assert_fails(of_run("half.txt", "--held-out", "--unit", "paragraph"), 2, "paragraph", "lines", hint=False)
    window = ["evaluate", "half.txt", "--model", str(models / "window.safetensors"), "--held-out"]
    assert_fails(CliRunner().invoke(app, window), 2, "the end", "--valid FILE")
    saved = load(Path("run/model.safetensors"), device=torch.device("cpu"))
    training = saved.header.training
    unknown: list[object] = [{}, {"salt": -1}, {"salt": True}, {"salt": 256}, {"salt": "0"}, []]
    for corpus in unknown:
        header = replace(saved.header, training={**training, "corpus": corpus})
        save_model(Path("other.safetensors"), saved.model, header)
        refused = of_run("half.txt", "--held-out", "--model", "other.safetensors")
        assert_fails(refused, 3, "does not say which texts were held out")


# Aligned files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(evaluate: Evaluate) -> list[str]:
    """A corpus of 60 texts with an empty one and their labels, of which two are empty."""
    texts = [f"{'tea' if i % 2 else 'sun'} {i}" for i in range(60)]
    texts[7] = ""
    labels = ["drink" if i % 2 else "sky" for i in range(60)]
    labels[10] = labels[11] = ""
    Path("labelled.txt").write_text("".join(f"{text}\n" for text in texts))
    Path("labels.txt").write_text("".join(f"{label}\n" for label in labels))
    return labels


def test_labels_are_read_off_latents_and_off_words(evaluate: Evaluate, labelled: list[str]) -> None:
    result = evaluate("--json", "--labels", "labels.txt", corpus="labelled.txt")
    found = figures(result)["probe"]
    assert (found["labels"], found["texts"], found["held_out_texts"]) == (2, 58, 12)
    assert "stratified 20 %" in found["protocol"]
    assert found["words_accuracy"] > 0.9
    low, high = figures(result)["intervals_95"]["probe.z_accuracy"]
    assert low <= found["z_accuracy"] <= high
    table = evaluate("--labels", "labels.txt", corpus="labelled.txt").stdout
    assert (
        "labels of labels.txt: 2, on 12 of 58 texts held out\n  2 left out: repeats, of a rare label or of none\n"
        in table
    )
    assert f"{found['z_accuracy']:.1%}" in table
    assert re.search(rf"the same, of what is written +{found['reconstruction_words_accuracy']:.1%}", table)


def test_a_reconstruction_may_be_guided(evaluate: Evaluate, models: Path) -> None:
    """To what `generate` writes then; all other figures stay."""
    texts = [chr(97 + i % 26) * (1 + i % 19) for i in range(80)]
    Path("short.txt").write_text("".join(f"{text}\n" for text in texts))
    plain, guided = (figures(evaluate("--json", *options, corpus="short.txt")) for options in ((), ("--guidance", "3")))
    kept = [key for key in plain if not key.startswith(("guidance", "token_acc", "exact", "bleu", "intervals"))]
    assert {key: plain[key] for key in kept} == {key: guided[key] for key in kept}
    assert (plain["guidance"], guided["guidance"]) == (1, 3)
    checkpoint = load(models / "line.safetensors", device=torch.device("cpu"))
    latents = [torch.tensor(encoding.mean_Z) for encoding in Encoder(checkpoint, "line").encode(texts)]
    requests = [Request(row, 0, latent_Z) for row, latent_Z in enumerate(latents)]
    rule = checkpoint.tokenizer.constraint("line")
    for scale, found in ((1, plain), (3, guided)):
        sample = SampleConfig(greedy=True, guidance=scale)
        written = decode(checkpoint.model, requests, sample, constraint=rule, cached=False)
        ended = [[*text.encode(), -1] for text in texts]
        pairs = zip(ended, ([*ids, -1] for ids in written), strict=True)
        right = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
        assert found["token_accuracy"] == pytest.approx(right / sum(map(len, ended)))
    assert plain["token_accuracy"] != guided["token_accuracy"]
    assert "greedy reconstruction from the mean, guidance 3\n" in evaluate("--guidance", "3").stdout
    assert_fails(evaluate("--guidance", "-1"), 2, "guidance is -1")


def test_a_reconstruction_may_be_from_refined_latents(evaluate: Evaluate, models: Path) -> None:
    """Those that `encode --refine` gives; all other figures stay."""
    texts = [chr(97 + i % 26) * (1 + i % 19) for i in range(40)]
    Path("short.txt").write_text("".join(f"{text}\n" for text in texts))
    plain, refined = (figures(evaluate("--json", *options, corpus="short.txt")) for options in ((), ("--refine",)))
    kept = [key for key in plain if not key.startswith(("refine", "token_acc", "exact", "bleu", "intervals"))]
    assert {key: plain[key] for key in kept} == {key: refined[key] for key in kept}
    assert (plain["refine"], refined["refine"]) == (False, True)
    checkpoint = load(models / "line.safetensors", device=torch.device("cpu"))
    encodings = list(Encoder(checkpoint, "line", refine=True).encode(texts))
    requests = [Request(row, 0, torch.tensor(encoding.latent_Z)) for row, encoding in enumerate(encodings)]
    rule = checkpoint.tokenizer.constraint("line")
    written = decode(checkpoint.model, requests, SampleConfig(greedy=True), constraint=rule, cached=False)
    ended = [[*text.encode(), -1] for text in texts]
    pairs = zip(ended, ([*ids, -1] for ids in written), strict=True)
    right = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    assert refined["token_accuracy"] == pytest.approx(right / sum(map(len, ended)))
    assert plain["token_accuracy"] != refined["token_accuracy"]
    table = evaluate("--refine", "--guidance", "2").stdout
    assert "greedy reconstruction from a refined latent, guidance 2\n" in table


def test_a_baseline_without_a_latent_is_beside_a_guided_reconstruction(evaluate: Evaluate, tmp_path: Path) -> None:
    """It reconstructs nothing. One that always had a latent cannot be guided, and neither can a baseline alone."""
    alone = make_model(tmp_path / "alone.safetensors", train={"latents_dropout_prob": 1.0})
    always = make_model(tmp_path / "always.safetensors", train={"latents_dropout_prob": 0.0})
    found = figures(evaluate("--json", "--guidance", "2", "--baseline", alone))
    plain = figures(evaluate("--json", "--baseline", alone))
    assert found["baseline_nll_nats_per_text"] == plain["baseline_nll_nats_per_text"]
    assert_fails(evaluate("--guidance", "2", "--baseline", always), 3, f"{always} has always had one")
    refused = evaluate("--guidance", "2", model=str(alone).removesuffix(".safetensors"))
    assert_fails(refused, 3, f"{alone} has no latent")


def test_texts_and_labels_may_be_columns_of_one_table(evaluate: Evaluate, labelled: list[str]) -> None:
    expected = figures(evaluate("--json", "--labels", "labels.txt", corpus="labelled.txt"))
    texts = Path("labelled.txt").read_text("utf-8").splitlines()
    rows = "".join(f"{label},{text}\n" for label, text in zip(labelled, texts, strict=True))
    Path("table.csv").write_text(f"kind,said\n{rows}", "utf-8")
    options = ("--field", "said", "--labels", "table.csv", "--label-field")
    found = figures(evaluate("--json", *options, "kind", corpus="table.csv"))
    assert found["probe"] == expected["probe"]
    assert_fails(evaluate(*options, "sort", corpus="table.csv"), 3, "table.csv has no column 'sort'", "'kind'")
    plain = evaluate("--labels", "labels.txt", "--label-field", "kind", corpus="labelled.txt")
    assert_fails(plain, 2, "--label-field kind is for files that end in")
    assert_fails(evaluate("--label-field", "kind", corpus="labelled.txt"), 2, "--label-field is of --labels")


def test_labels_may_be_numbers_and_truth_values(evaluate: Evaluate, labelled: list[str]) -> None:
    """As data sets have them; null is none."""
    expected = figures(evaluate("--json", "--labels", "labels.txt", corpus="labelled.txt"))
    kinds = sorted(set(labelled) - {""})
    assert len(kinds) == 2
    for first, second in ((0, 1), (False, True)):
        values = [None if label == "" else (first, second)[kinds.index(label)] for label in labelled]
        Path("labels.jsonl").write_text("".join(f"{json.dumps({'label': value})}\n" for value in values))
        parquet.write_table(pyarrow.table({"label": values}), "labels.parquet")
        for name in ("labels.jsonl", "labels.parquet"):
            found = figures(evaluate("--json", "--labels", name, "--label-field", "label", corpus="labelled.txt"))
            assert found["probe"] == expected["probe"]
    refused = evaluate("--field", "label", corpus="labels.parquet")
    assert_fails(refused, 3, "labels.parquet: the column 'label' is of bool, expected strings")
    Path("labels.jsonl").write_text('{"label": 1.5}\n' * len(labelled))
    refused = evaluate("--labels", "labels.jsonl", "--label-field", "label", corpus="labelled.txt")
    assert_fails(refused, 3, "labels.jsonl, line 1: the field 'label' is a number, expected a string")


def test_labels_that_are_no_utf8_may_be_replaced(evaluate: Evaluate, labelled: list[str]) -> None:
    marked = Path("labels.txt").read_text().splitlines()
    Path("latin1.txt").write_bytes(b"".join(mark.encode() + b"\xe9\n" if mark else b"\n" for mark in marked))
    assert_fails(evaluate("--labels", "latin1.txt", corpus="labelled.txt"), 3, "latin1.txt", "--errors replace")
    found = evaluate("--json", "--labels", "latin1.txt", "--errors", "replace", corpus="labelled.txt")
    assert figures(found)["probe"]["labels"] == 2


def test_labels_of_the_first_texts_stay_beside_them(evaluate: Evaluate, labelled: list[str]) -> None:
    """Labels are counted against the whole corpus, of which the first texts are taken; stdin is no exception."""
    some = figures(evaluate("--json", "--labels", "labels.txt", "--texts", "30", corpus="labelled.txt"))
    assert some["probe"]["texts"] == 28
    arguments = [
        "evaluate",
        "-",
        "--samples",
        "3",
        "--device",
        "cpu",
        "--json",
        "--texts",
        "30",
        "--labels",
        "labels.txt",
    ]
    piped = CliRunner().invoke(app, [*arguments, "--model", some["model"]], input=Path("labelled.txt").read_bytes())
    assert figures(piped)["probe"] == some["probe"]


@pytest.mark.parametrize("option", ["--labels", "--latents-from"])
def test_what_is_aligned_with_texts_is_refused_for_windows(evaluate: Evaluate, option: str) -> None:
    result = evaluate(option, "texts.txt", "--unit", "window")
    assert_fails(result, 2, f"{option} is of texts, and --unit window cuts texts into windows", hint=False)


def test_labels_may_come_through_a_pipe(evaluate: Evaluate, labelled: list[str]) -> None:
    """As of `--labels <(cut -f2 table.tsv)`, which can be read once."""
    plain = figures(evaluate("--json", "--labels", "labels.txt", corpus="labelled.txt"))
    ours, theirs = os.pipe()
    os.write(theirs, Path("labels.txt").read_bytes())
    os.close(theirs)
    try:
        piped = figures(evaluate("--json", "--labels", f"/dev/fd/{ours}", corpus="labelled.txt"))
    finally:
        os.close(ours)
    assert piped["probe"] == plain["probe"]


@pytest.mark.parametrize("texts", ["0", "10"])
def test_labels_that_are_not_aligned_are_refused_with_both_counts(
    evaluate: Evaluate, labelled: list[str], texts: str
) -> None:
    Path("labels.txt").write_text("\n".join(labelled[:-3]) + "\n")
    result = evaluate("--labels", "labels.txt", "--texts", texts, corpus="labelled.txt")
    assert_fails(result, 3, "labels.txt holds 57 labels", "the corpus 60 texts")


def test_labels_need_scikit_learn(evaluate: Evaluate, labelled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptvae_cli.probe.find_spec", lambda name: None)
    assert_fails(
        evaluate("--labels", "labels.txt", corpus="labelled.txt"), 2, "scikit-learn", "pip install 'gptvae[probe]'"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--texts", "1"], ["texts is 1", "2", "0"]),
        (["--labels", "-"], ["--labels", "standard input"]),
    ],
    ids=["one text", "labels on stdin"],
)
def test_options_that_cannot_be_are_refused(evaluate: Evaluate, options: list[str], words: list[str]) -> None:
    assert_fails(evaluate(*options), 2, *words, hint=False)


def test_latents_may_come_from_other_texts(evaluate: Evaluate, models: Path, tmp_path: Path) -> None:
    """Of a model that was trained so; one beside it, to compare with, reads the texts themselves."""
    Path("other.txt").write_text("".join(f"{text}\n" for text in reversed(TEXTS)), encoding="utf-8")
    aligned = str(make_model(tmp_path / "aligned.safetensors", latents_from="train.txt")).removesuffix(".safetensors")
    plain = figures(evaluate("--json"))
    other = figures(evaluate("--json", "--latents-from", "other.txt", model=aligned))
    kl, right = "kl_nats_per_text", "cross_entropy_nats_per_text"
    nll, baseline = "nll_nats_per_text", "baseline_nll_nats_per_text"
    both = ("--json", "--latents-from", "other.txt", "--baseline")
    found = figures(evaluate(*both, f"{aligned}.safetensors"))
    assert (found[nll], found[baseline]) == pytest.approx((plain[nll], other[nll]))
    found = figures(evaluate(*both, models / "line.safetensors", model=aligned))
    assert (found[nll], found[baseline]) == pytest.approx((other[nll], plain[nll]))
    assert plain[nll] != pytest.approx(other[nll], rel=1e-3)
    assert_fails(evaluate("--latents-from", "other.txt"), 2, "--latents-from is for a model that was trained with it")
    assert_fails(evaluate(model=aligned), 2, "the latents of this model come from other texts", "--latents-from")
    assert_fails(evaluate("--baseline", f"{aligned}.safetensors"), 2, "the latents of the baseline come from other")
    assert other[kl] == pytest.approx(plain[kl], rel=1e-4)  # of the same texts, in another order
    assert other[right] != pytest.approx(plain[right], rel=1e-3)
    Path("short.txt").write_text("one\n")
    assert_fails(evaluate("--latents-from", "short.txt", model=aligned), 3, "short.txt holds 1 texts", "7")


def test_a_record_field_is_the_text(evaluate: Evaluate) -> None:
    records = "".join(json.dumps({"review": text}) + "\n" for text in TEXTS)
    Path("texts.jsonl").write_text(records, encoding="utf-8")
    found, expected = (
        figures(evaluate("--json", "--field", "review", corpus="texts.jsonl")),
        figures(evaluate("--json")),
    )
    assert found | {"corpus": ["texts.txt"]} == expected
    piped = figures(evaluate("--json", "--field", "review", corpus="-", stdin=records.encode("utf-8")))
    assert piped | {"corpus": ["texts.txt"]} == expected


def test_a_collapse_is_told_and_nothing_else_is_called_so(evaluate: Evaluate, models: Path, tmp_path: Path) -> None:
    found = load(models / "line.safetensors", device=torch.device("cpu"))
    for parameter in found.model.to_latent_mean_log_variance.parameters():
        torch.nn.init.zeros_(parameter)
    save_model(tmp_path / "dead.safetensors", found.model, found.header)
    for model, collapsed in (("line", False), (str(tmp_path / "dead"), True)):
        assert figures(evaluate("--json", model=model))["collapsed"] == collapsed
        assert ("collapsed: " in evaluate(model=model).stdout) == collapsed


def test_bfloat16_is_what_a_model_is_measured_in(evaluate: Evaluate, models: Path) -> None:
    found = load(models / "line.safetensors", device=torch.device("cpu"))
    batches, _ = batches_of(list(Encoder(found, "line").rows(TEXTS)), None, found.header.model.pad_id, 1024)
    for name in ("float32", "bfloat16"):
        nll_N = importance_weighted(found.model, batches, 3, dtype=getattr(torch, name))
        nll = figures(evaluate("--json", "--dtype", name))["nll_nats_per_text"]
        assert nll == pytest.approx(float(nll_N.mean()), rel=1e-6), name


@pytest.mark.parametrize("model", ["line", "paragraph"])
def test_lines_are_written_back_without_line_breaks(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """As `generate` writes them."""
    allowed: list[bool] = []

    def record(*arguments: Any, **options: Any) -> Any:
        allowed.extend(options["constraint"].allowed_SV[0, [*b"\n\r"]])
        return write_greedily(*arguments, **options)

    monkeypatch.setattr("gptvae_cli.measuring.write_greedily", record)
    figures(evaluate("--json", model=model))
    assert allowed == 2 * [model != "line"]


def test_windows_are_texts_of_their_own(evaluate: Evaluate) -> None:
    Path("long.txt").write_text("0123456789" * 10)
    found = figures(evaluate("--json", model="window", corpus="long.txt"))
    assert found["texts"] == math.ceil(100 / 23)
    Path("empty.txt").touch()
    Path("folder").mkdir()
    for name in ("empty.txt", "long.txt"):
        Path(name).rename(Path("folder", name))
    again = figures(evaluate("--json", model="window", corpus="folder"))
    assert again["nll_nats_per_text"] == pytest.approx(found["nll_nats_per_text"]), "nothing is no text"
    Path("folder", "a.txt").touch()  # the first two files have no window, and the first two windows are asked for
    some = figures(evaluate("--json", "--texts", "2", model="window", corpus="folder"))
    assert some["texts"] == 2
    assert_fails(evaluate(model="window", corpus="folder/empty.txt"), 3, "found no texts", hint=False)
    assert found["bytes"] == 100  # a window has no end
    assert found["words"] == 1, "however many windows it is in"


@pytest.mark.parametrize("model", ["line", "window", "baseline"])
def test_the_figures_of_every_text_are_those_of_all(evaluate: Evaluate, models: Path, model: str) -> None:
    """And those that Python gives, each in its place."""
    path = models / f"{model}.safetensors"
    if model == "baseline":
        path = make_model(Path("baseline.safetensors").absolute(), train={"latents_dropout_prob": 1.0})
    whole = figures(evaluate("--json", "--per-text", "scores.jsonl", model=str(path.with_suffix(""))))
    each = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert [record["row"] for record in each] == list(range(whole["texts"]))
    means = {
        "nll_nats": "nll_nats_per_text",
        "cross_entropy_nats": "cross_entropy_nats_per_text",
        "cross_entropy_shuffled_nats": "cross_entropy_shuffled_nats_per_text",
        "cross_entropy_without_nats": "cross_entropy_without_nats_per_text",
        "kl_nats": "kl_nats_per_text",
        "exact_match": "exact_match",
    }
    named = [name for name in means if name in each[0]]
    assert named == (["nll_nats"] if model == "baseline" else list(means))
    for name in named:
        assert np.mean([record[name] for record in each]) == pytest.approx(whole[means[name]]), name
    for name in ("tokens", "bytes"):
        assert sum(record[name] for record in each) == whole[name]
    texts = Path("texts.txt").read_text()
    with warnings.catch_warnings(action="ignore"):  # of a text that is cut
        found = gptvae_cli.load(path, device="cpu")
        found_N = found.nll([texts.removesuffix("\n")] if model == "window" else texts.splitlines(), samples=3)
    np.testing.assert_allclose(found_N, [record["nll_nats"] for record in each], rtol=1e-6)


def test_the_figures_of_texts_go_behind_what_an_open_file_holds(models: Path, tmp_path: Path) -> None:
    """`2>>log.txt` names a file that is open already; its old lines must stay."""
    log, model = tmp_path / "log.txt", models / "line.safetensors"
    log.write_text("old\n")
    command = [sys.executable, "-m", "gptvae_cli", "evaluate", "-", "--samples", "2", "-q", "--model", str(model)]
    for name in ("/dev/stderr", "/dev/fd/2"):
        with log.open("a") as stderr:
            process = subprocess.run(
                [*command, "--per-text", name], input=b"a\nb\n", stdout=subprocess.PIPE, stderr=stderr, check=True
            )
        assert process.stdout
    lines = log.read_text().splitlines()
    assert lines[0] == "old"
    assert [json.loads(line)["row"] for line in lines[1:]] == [0, 1, 0, 1]


def test_the_figures_of_windows_have_the_rows_of_their_latents(evaluate: Evaluate, models: Path) -> None:
    """An empty file has a latent, and no token that could be likely or not."""
    Path("folder").mkdir()
    texts = ["", "0123456789" * 4, "", "x"]
    for name, text in zip("abcd", texts, strict=True):
        Path("folder", f"{name}.txt").write_text(text)
    assert evaluate("--per-text", "scores.jsonl", model="window", corpus="folder").exit_code == 0
    each = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert [record["row"] for record in each] == [1, 2, 4]
    found = gptvae_cli.load(models / "window.safetensors", device="cpu")
    nll_N = found.nll(texts, samples=3)
    assert len(nll_N) == len(found.encode(texts)) == 5
    np.testing.assert_allclose(nll_N[[1, 2, 4]], [record["nll_nats"] for record in each], rtol=1e-6)
    np.testing.assert_array_equal(nll_N[[0, 3]], 0)
    np.testing.assert_array_equal(found.nll([""]), [0])


def test_the_figures_of_texts_are_kept_where_no_report_can_be_made(evaluate: Evaluate) -> None:
    """Hours may have gone into them."""
    Path("equal.txt").write_text("a\nb\n" * 5)
    Path("labels.txt").write_text("A\nB\n" * 5)
    result = evaluate("--labels", "labels.txt", "--per-text", "scores.jsonl", corpus="equal.txt")
    assert_fails(result, 3, "found 0 labels that 5 texts or more bear, of 2")  # as equal texts count once
    assert len(Path("scores.jsonl").read_text().splitlines()) == 10


def test_labels_that_are_no_classes_are_told_before_anything_is_measured(evaluate: Evaluate) -> None:
    Path("labels.txt").write_text("".join(f"{n}\n" for n in range(len(TEXTS))))
    result = evaluate("--labels", "labels.txt", "--per-text", "scores.jsonl")
    assert_fails(result, 3, f"found 0 labels that 5 texts or more bear, of {len(TEXTS)}")
    assert not Path("scores.jsonl").exists()


def test_the_figures_of_texts_need_a_file_of_their_own(evaluate: Evaluate, models: Path) -> None:
    assert_fails(evaluate("--per-text", "-"), 2, "--per-text needs a file")
    Path("folder").mkdir()
    Path("folder", "texts.txt").write_bytes(before := Path("texts.txt").read_bytes())
    model, other = models / "line.safetensors", models / "paragraph.safetensors"
    for name in ("texts.txt", model, other):
        result = evaluate("--per-text", name, "--baseline", other)
        assert_fails(result, 2, f"--per-text {name} is what is read")
    assert_fails(evaluate("--per-text", "folder/texts.txt", corpus="folder"), 2, "folder/texts.txt is what is read")
    assert Path("folder", "texts.txt").read_bytes() == before
    assert_fails(evaluate("--per-text", "nowhere/scores.jsonl"), 1, "nowhere/scores.jsonl")


def test_standard_input_is_a_corpus(evaluate: Evaluate, models: Path) -> None:
    arguments = ["evaluate", "-", "--samples", "3", "--device", "cpu", "--model", str(models / "line.safetensors")]
    piped = CliRunner().invoke(app, arguments, input=Path("texts.txt").read_bytes())
    assert piped.stdout == evaluate().stdout.replace("of texts.txt", "of standard input")


def test_one_text_is_not_enough(evaluate: Evaluate) -> None:
    Path("one.txt").write_text("one\n")
    assert_fails(evaluate(corpus="one.txt"), 3, "found one text", "two", hint=False)


def test_what_is_cut_is_counted_for_both_sides(evaluate: Evaluate, tmp_path: Path) -> None:
    Path("other.txt").write_text("".join(f"{'y' * 60}\n" for _ in TEXTS))
    aligned = str(make_model(tmp_path / "aligned.safetensors", latents_from="train.txt")).removesuffix(".safetensors")
    result = evaluate("--json", "--latents-from", "other.txt", model=aligned)
    assert figures(result)["texts_cut"] == 1
    assert f"to encode: {len(TEXTS)} texts are longer than the model's 24 tokens" in result.stderr
