"""Figures over any number of texts: pieces, their sum, and what is said of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics.bleu import BLEU

from gptvae_cli import bleu, bootstrap, measuring, report
from gptvae_cli.checkpoint import Checkpoint, load
from gptvae_cli.constraint import Constraint
from gptvae_cli.data import batches_of, padded
from gptvae_cli.errors import CheckpointError, ConfigError
from gptvae_cli.evaluation import importance_weighted, measure, reconstruct
from gptvae_cli.latent import mutual_information
from gptvae_cli.measuring import Gathered, Piece, Posteriors, measured
from gptvae_cli.objective import Noise, objective
from gptvae_cli.probe import Probe
from gptvae_cli.sampling import Encoder
from gptvae_cli.schedule import Weights
from tests.cli.conftest import make_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 4
TEXTS = [f"{a} {b}"[:n] for n, a in enumerate(("the quick", "naïve", "日本", "x"), 3) for b in ("fox", "a b c", "")]
TEXTS += ["", "z" * 60, TEXTS[0], "one two three four"]

Gather = Callable[..., Gathered]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model that has learnt some of the texts."""
    found = load(make_model(tmp_path_factory.mktemp("report") / "model.safetensors"), device=torch.device("cpu"))
    optimizer = torch.optim.Adam(found.model.parameters(), lr=1e-2)
    (batch,), _ = batches_of(list(Encoder(found, "line").rows(TEXTS)), None, found.header.model.pad_id, 2048)
    for _ in range(40):
        noise = Noise(torch.zeros(len(batch.tokens_BT), found.header.model.dim_latent))
        loss = objective(found.model, None, batch, noise, Weights("elbo", 0.1, 0.0, 0.0)).total
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found.model.eval()
    return found


def gather(checkpoint: Checkpoint, texts: list[str], seed: int = 2) -> Gathered:
    found = Gathered()
    rows = enumerate(Encoder(checkpoint, "line").rows(texts))
    for piece in measured(checkpoint, rows, unit="line", samples=SAMPLES, seed=seed):
        found.add(piece)
    return found


def values_of(checkpoint: Checkpoint, texts: list[str], labels: list[str] | None = None) -> dict[str, Any]:
    return report.report(gather(checkpoint, texts), labels=labels, samples=SAMPLES, seed=2).to_dict()


def assert_same(one: Any, other: Any, name: str = "") -> None:
    """Equal but for the rounding of float32."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key], f"{name}.{key}")
    elif isinstance(one, list | float):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5), name
    else:
        assert one == other, name


def test_the_figures_are_those_of_all_texts_at_once(checkpoint: Checkpoint) -> None:
    found = values_of(checkpoint, TEXTS)
    rows = list(Encoder(checkpoint, "line").rows(TEXTS))
    batches, _ = batches_of(rows, None, checkpoint.header.model.pad_id, 512)
    expected = measure(checkpoint.model, batches, seed=2)
    names = ("cross_entropy", "cross_entropy_shuffled", "cross_entropy_without", "kl", "nll_bound")
    for name in names:
        assert found[f"{name}_nats_per_text"] == pytest.approx(getattr(expected, name), rel=1e-4), name
    assert found["mutual_information_nats"] == pytest.approx(expected.mutual_information, rel=1e-4)
    assert (found["active_001"], found["active_02"]) == (expected.active_001, expected.active_02)
    assert (found["texts"], found["tokens"]) == (expected.texts, expected.tokens)
    nll_N = importance_weighted(checkpoint.model, batches, SAMPLES, seed=2)
    assert found["nll_nats_per_text"] == pytest.approx(float(nll_N.mean()), rel=1e-4)
    assert found["nll_standard_error_nats_per_text"] == pytest.approx(
        float(nll_N.std()) / math.sqrt(len(rows)), rel=1e-3
    )


def test_reconstructions_are_judged_as_sacrebleu_and_eyes_do(checkpoint: Checkpoint) -> None:
    found = values_of(checkpoint, TEXTS)
    rows = list(Encoder(checkpoint, "line").rows(TEXTS))
    written = reconstruct(checkpoint.model, padded(rows, checkpoint.header.model.pad_id))
    texts = [checkpoint.tokenizer.decode([t for t in row if t < 256]) for row in rows]
    again = [checkpoint.tokenizer.decode(ids) for ids in written]
    assert found["bleu"] == pytest.approx(BLEU(tokenize="none").corpus_score(again, [texts]).score, abs=1e-6)
    assert found["exact_match"] == np.mean([a == b for a, b in zip(texts, again, strict=True)])
    assert 0.1 < found["token_accuracy"] < 1
    assert 0 < found["exact_match"] < 1


@pytest.mark.parametrize("piece_texts", [2, 5])
def test_neither_pieces_nor_order_change_a_figure(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, piece_texts: int
) -> None:
    """Probes and intervals included. Only which other text's latent is taken depends on what is in memory together."""
    labels = ["even" if len(text) % 2 == 0 else "odd" for text in TEXTS]  # equal texts have one
    whole = values_of(checkpoint, TEXTS, labels)
    assert_same(values_of(checkpoint, TEXTS[::-1], labels[::-1]), whole)
    monkeypatch.setattr(measuring, "_PIECE_TEXTS", piece_texts)
    monkeypatch.setattr(measuring, "tokens_together", lambda device: 40)
    apart = values_of(checkpoint, TEXTS, labels)
    for values in (whole, apart):
        assert values.pop("cross_entropy_shuffled_nats_per_text") > 0
        assert len(values["intervals_95"].pop("cross_entropy_shuffled_nats_per_text")) == 2
    assert_same(apart, whole)


def test_information_is_that_of_a_random_sample_where_there_are_many(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "SAMPLE_TEXTS", 6)
    monkeypatch.setattr(measuring, "_PIECE_TEXTS", 4)
    found, gathered = values_of(checkpoint, TEXTS), gather(checkpoint, TEXTS)
    sample = gathered.sample
    assert sample is not None
    assert found["mutual_information_texts"] == len(sample.texts_N) == 6
    assert found["mutual_information_nats"] <= math.log(6)
    # Those with the lowest ranks, each beside its own posterior.
    places_M = sample.places_N
    assert gathered.ranks.tolist() == sorted(gathered.ranks)
    assert len(set(places_M)) == 6
    assert sample.texts_N.tolist() == [TEXTS[i][:23] for i in places_M]
    means_NZ = np.concatenate(gathered.means)
    assert np.array_equal(sample.mean_NZ, means_NZ[places_M])
    tensors = map(torch.from_numpy, (sample.mean_NZ, sample.log_var_NZ, sample.sample_NZ))
    assert found["mutual_information_nats"] == pytest.approx(mutual_information(*tensors))
    assert values_of(checkpoint, TEXTS[::-1])["mutual_information_nats"] == pytest.approx(
        found["mutual_information_nats"], rel=1e-4
    )


def test_of_a_sample_too_it_is_known_which_texts_are_equal(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most that it can show is the entropy of its own texts, which come in batches in another order."""
    monkeypatch.setattr(measuring, "SAMPLE_TEXTS", 8)
    texts = ["a", "bcdefg", "a", "hi", "bcdefg", "jklmno pqrs", "a", "t", "uv", "wxyz wxyz", "hi", "a"]
    found = gather(checkpoint, texts)
    assert found.sample is not None
    shares = np.array([*Counter(found.sample.texts_N.tolist()).values()]) / 8
    assert 1 < len(shares) < 8
    values = report.report(found, samples=SAMPLES, seed=2).values
    assert values["mutual_information_most_nats"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_active_dimensions_are_those_of_all_texts_and_not_of_a_sample(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    means_NZ = np.stack([encoding.mean_Z for encoding in Encoder(checkpoint, "line").encode(TEXTS)])
    monkeypatch.setattr(measuring, "SAMPLE_TEXTS", 2)
    found = values_of(checkpoint, TEXTS)
    for name, least in (("active_001", 0.01), ("active_02", 0.2)):
        assert found[name] == (means_NZ.var(axis=0) > least).sum(), name
    assert found["active_001"] > 0


def test_everything_is_computed_in_the_type_that_was_asked_for(checkpoint: Checkpoint) -> None:
    """bfloat16 under autocast, recomputed figure by figure; what is written from the means, too."""
    rows = list(Encoder(checkpoint, "line").rows(TEXTS))
    batches, _ = batches_of(rows, None, checkpoint.header.model.pad_id, 1024)
    exact, rounded = (
        list(measured(replace(checkpoint, dtype=dtype), enumerate(rows), unit="line", samples=SAMPLES, seed=2))
        for dtype in (torch.float32, torch.bfloat16)
    )
    nll_N = importance_weighted(checkpoint.model, batches, SAMPLES, seed=2, dtype=torch.bfloat16)
    found = measure(checkpoint.model, batches, seed=2, dtype=torch.bfloat16)
    (columns,) = [piece.columns for piece in rounded]
    assert columns["nll"].mean() == pytest.approx(float(nll_N.mean()), rel=1e-6)
    assert columns["cross_entropy"].mean() == pytest.approx(found.cross_entropy, rel=1e-6)
    for name in ("nll", "cross_entropy", "cross_entropy_shuffled", "cross_entropy_without", "kl"):
        assert not np.allclose(columns[name], exact[0].columns[name], rtol=1e-6, atol=0), name


@pytest.mark.parametrize("piece_texts", [2, 4096])
def test_progress_counts_the_texts_of_all_pieces(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, piece_texts: int
) -> None:
    monkeypatch.setattr(measuring, "_PIECE_TEXTS", piece_texts)
    monkeypatch.setattr(measuring, "tokens_together", lambda device: 40)
    told: list[int] = []
    rows = enumerate(Encoder(checkpoint, "line").rows(TEXTS))
    for piece in measured(checkpoint, rows, unit="line", samples=1, on_progress=told.append):
        assert told[-1] >= len(piece.keys_N)
    assert told == sorted(set(told)), "it never goes back"
    assert told[-1] == len(TEXTS)
    assert len(told) > 3


def test_a_text_that_is_there_often_is_as_often_in_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 of 10,000 lines of a log are the same one; whatever their order, and the pieces that they come in."""
    monkeypatch.setattr(measuring, "SAMPLE_TEXTS", 1000)
    random = np.random.default_rng(0)
    samples = []
    for count in (7, 10):
        keys_N = random.permutation(np.append(np.random.default_rng(1).integers(0, 2**63, 7000), [12345] * 3000))
        found = Gathered()
        for part_N in np.array_split(keys_N, count):
            none_NZ, texts_N = np.zeros((len(part_N), 1), dtype="float32"), np.full(len(part_N), "", dtype=object)
            found.add(
                Piece([], {}, part_N, part_N, Posteriors(part_N, texts_N, texts_N, part_N, none_NZ, none_NZ, none_NZ))
            )
        assert found.sample is not None
        assert 0.25 < np.mean(found.sample.read_N == 12345) < 0.35
        samples.append(found.sample.read_N.tolist())
    assert samples[0] == samples[1]


def test_a_text_that_is_cut_has_no_end_to_get_right(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written from its latent is as long as the model reads, and so as long as the text."""
    rows = list(Encoder(checkpoint, "line").rows(["z" * 60, "q" * 60]))
    assert [row[-1] for row in rows] == [ord("z"), ord("q")]
    found = Gathered()
    tokenizer = checkpoint.tokenizer
    tokens, never = [b""] * tokenizer.num_tokens, [ord("z"), ord("q"), tokenizer.eos_id]
    rule = Constraint(tokens, never=never, eos_id=tokenizer.eos_id)
    monkeypatch.setattr(tokenizer, "constraint", lambda unit: rule)
    for piece in measured(checkpoint, enumerate(rows), unit="line", samples=1):
        found.add(piece)
    assert report.report(found, samples=1, seed=0).values["token_accuracy"] == 0


def test_all_of_a_text_must_come_back_its_last_token_too(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["one", "two", ""]
    wrong = [list(b"one"), list(b"twx"), []]
    monkeypatch.setattr(measuring, "write_greedily", lambda *args, **options: wrong)
    found = values_of(checkpoint, texts)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["token_accuracy"] == pytest.approx(8 / 9), "ends counted"
    assert found["empty"] == 1


@pytest.mark.parametrize("text", ["日本語の文章です", "Привет, мир, и до свидания", "naïve café " * 3])
def test_bytes_are_those_that_were_read_where_a_text_is_cut_within_a_character(
    checkpoint: Checkpoint, text: str
) -> None:
    texts = [text, text[1:], "short"]
    found = values_of(checkpoint, texts)
    longest = checkpoint.header.model.max_seq_len - 1
    sizes = [min(longest, len(each.encode()) + 1) for each in texts]  # an end counts as one
    assert max(sizes) == longest, "one is cut"
    assert found["bytes"] == sum(sizes)
    nats = found["nll_nats_per_text"] * len(texts)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(sizes))


@pytest.mark.parametrize("piece_texts", [2, 4096])
def test_a_word_that_two_windows_share_counts_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, piece_texts: int
) -> None:
    monkeypatch.setattr(measuring, "_PIECE_TEXTS", piece_texts)
    text = "A running text  has words of\nmany sizes, extraordinarily " + "long" * 20 + " ones and a b c d e f g h."
    found = Gathered()
    # And where one text ends and another begins, the words are two.
    rows = list(Encoder(checkpoint, "window").rows([text, "Others follow"]))
    assert len(rows) > 5
    for piece in measured(checkpoint, enumerate(rows), unit="window", samples=1):
        found.add(piece)
    values = report.report(found, samples=1, seed=0).values
    assert (values["words"], values["bytes"]) == (len(text.split()) + 2, len(text) + len("Others follow"))


def test_information_is_judged_by_what_the_texts_can_show(checkpoint: Checkpoint) -> None:
    """Of fifty times two texts that is ln 2, which is no collapse."""
    found = values_of(checkpoint, ["the quick fox", "日本"] * 50)
    assert found["mutual_information_most_nats"] == pytest.approx(math.log(2))
    assert found["mutual_information_nats"] == pytest.approx(math.log(2), abs=0.05)
    assert found["information_share"] == pytest.approx(1, abs=0.1)
    assert found["kl_nats_per_text"] > math.log(2)
    assert found["collapsed"] is False
    # A KL that is less than the texts could show is the most that there is.
    narrow = values_of(checkpoint, TEXTS)
    assert narrow["information_share"] == pytest.approx(
        narrow["mutual_information_nats"] / min(narrow["kl_nats_per_text"], narrow["mutual_information_most_nats"])
    )


@pytest.mark.parametrize(("shuffled", "used"), [(3.99, False), (4.0, True), (9.0, True)])
def test_a_latent_that_the_decoder_does_not_hear_is_not_used(
    checkpoint: Checkpoint, shuffled: float, used: bool
) -> None:
    """Whatever it carries: another text's does as well, within a nat."""
    found = gather(checkpoint, ["the quick fox", "日本"] * 50)
    for columns in found.columns:
        columns["cross_entropy"][:], columns["cross_entropy_shuffled"][:] = 3.0, shuffled
    values = report.report(found, samples=SAMPLES, seed=2).values
    assert (values["collapsed"], values["latent_used"]) == (False, used)


def test_a_latent_that_says_nothing_has_collapsed(tmp_path: Path) -> None:
    model = load(make_model(tmp_path / "model.safetensors"), device=torch.device("cpu"))
    for parameter in model.model.to_latent_mean_log_variance.parameters():
        torch.nn.init.zeros_(parameter)
    found = values_of(model, TEXTS)
    assert found["mutual_information_nats"] == pytest.approx(0, abs=1e-4)
    assert found["collapsed"] is True
    assert found["latent_used"] is False
    assert found["kl_nats_per_text"] == 0
    low, high = found["intervals_95"]["mutual_information_nats"]
    assert 0 <= low <= found["mutual_information_nats"] <= high
    # Shares of a KL that is nothing but noise would be thousands of percent.
    assert found["information_share"] is None
    baseline = gather(model, TEXTS)
    baseline.sample = None
    compared = report.report(gather(model, TEXTS), baseline, samples=SAMPLES, seed=2)
    assert "efficiency_nats_per_nat" not in {**compared.values, **compared.intervals}


def test_equal_texts_have_no_other_to_be_told_from(checkpoint: Checkpoint) -> None:
    found = values_of(checkpoint, ["the quick fox"] * 3)
    assert (found["mutual_information_most_nats"], found["mutual_information_nats"]) == (0, pytest.approx(0, abs=1e-9))
    assert (found["collapsed"], found["latent_used"], found["information_share"]) == (False, None, None)


def test_labels_are_read_off_the_means(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        report, "probe", lambda latents_NZ, texts, labels, **more: seen.append((latents_NZ, texts, labels, more))
    )
    with pytest.raises(AttributeError):  # it found nothing
        values_of(checkpoint, TEXTS, [text[:1] for text in TEXTS])
    ((latents_NZ, texts, labels, more),) = seen
    read = more["read"]
    assert [read.index(key) for key in read] == [texts.index(text) for text in texts], "equal keys for equal texts"
    encodings = list(Encoder(checkpoint, "line").encode(texts))
    assert np.allclose(latents_NZ, np.stack([encoding.mean_Z for encoding in encodings]), atol=1e-5)
    assert labels == [text[:1] for text in texts]
    tokenizer, rows = checkpoint.tokenizer, list(Encoder(checkpoint, "line").rows(texts))
    written = reconstruct(
        checkpoint.model, padded(rows, checkpoint.header.model.pad_id), constraint=tokenizer.constraint("line")
    )
    assert more["written"] == [tokenizer.decode(ids) for ids in written]


def test_the_figures_of_probes_are_in_their_places(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    latent_N, words_N, written_N, commonest_N = (np.arange(20) < count for count in (14, 9, 7, 5))
    made = Probe(100, 3, latent=latent_N, words=words_N, written=written_N, commonest=commonest_N, unit="words")
    monkeypatch.setattr(report, "probe", lambda *about, **more: made)
    found = report.report(gather(checkpoint, TEXTS), labels=["a"] * len(TEXTS), samples=SAMPLES, seed=2)
    values = found.values["probe"]
    names = ("z", "words", "reconstruction_words", "commonest_label")
    assert [values[f"{name}_accuracy"] for name in names] == [0.7, 0.45, 0.35, 0.25]
    assert (values["labels"], values["texts"], values["held_out_texts"]) == (3, 100, 20)
    assert found.intervals["probe.z_accuracy"] == bootstrap.of_share(14, 20)
    assert found.intervals["probe.words_accuracy"] == bootstrap.of_share(9, 20)
    assert found.intervals["probe.reconstruction_words_accuracy"] == bootstrap.of_share(7, 20)


def test_a_figure_that_is_no_number_is_the_models_fault(checkpoint: Checkpoint) -> None:
    found = gather(checkpoint, TEXTS)
    found.columns[0]["nll"][3] = np.nan
    with pytest.raises(CheckpointError, match="a figure is not a finite number"):
        report.report(found, samples=SAMPLES, seed=2)


def test_no_perplexity_overflows() -> None:
    """Nor is it divided by words where there is none."""
    found = report.figures({"texts": 1.0, "nll": 1e6, "tokens": 2.0, "words": 0.0, "bytes": 3.0})
    assert found["perplexity_per_token"] == found["perplexity_per_word"] == math.exp(700)


@pytest.mark.parametrize("count", range(2, 12))
@pytest.mark.parametrize("limit", ["_PIECE_TEXTS", "_PIECE_TOKENS"])
def test_pieces_are_small_and_none_is_a_lone_text(monkeypatch: pytest.MonkeyPatch, limit: str, count: int) -> None:
    """Which would have its own latent in the place of another's."""
    monkeypatch.setattr(measuring, limit, 2)
    items: list[measuring.Item] = [((i, [0] * 6), None) for i in range(count)]
    found = list(measuring._pieces(items))
    assert [item for piece in found for item in piece] == items
    assert 2 <= min(map(len, found)) <= max(map(len, found)) <= 3


def test_every_interval_is_around_its_figure(checkpoint: Checkpoint) -> None:
    found = values_of(checkpoint, TEXTS)
    assert len(found["intervals_95"]) >= 12
    assert "mutual_information_nats" in found["intervals_95"]
    for name, (low, high) in found["intervals_95"].items():
        assert low <= found[name] <= high, name
        assert low < high, name


def test_a_baseline_is_compared_text_by_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Against itself nothing is above or below, in any resample: the texts are drawn together."""
    model = gather(checkpoint, TEXTS)
    same = report.report(model, model, samples=SAMPLES, seed=2)
    assert same.values["nll_above_baseline_nats_per_text"] == 0
    assert same.intervals["nll_above_baseline_nats_per_text"] == pytest.approx((0, 0), abs=1e-9)
    other = load(make_model(tmp_path / "other.safetensors", seed=1), device=torch.device("cpu"))
    baseline = gather(other, TEXTS)
    with_latent = report.report(model, baseline, samples=SAMPLES, seed=2)
    assert "efficiency_nats_per_nat" not in {**with_latent.values, **with_latent.intervals}, "it has a latent, too"
    baseline.sample = None
    found = report.report(model, baseline, samples=SAMPLES, seed=2).values
    assert found["nll_above_baseline_nats_per_text"] == pytest.approx(
        found["nll_nats_per_text"] - values_of(other, TEXTS)["nll_nats_per_text"]
    )
    efficiency = found["baseline_nll_nats_per_text"] - found["cross_entropy_nats_per_text"]
    assert found["efficiency_nats_per_nat"] == pytest.approx(efficiency / found["kl_nats_per_text"])


def test_a_baseline_that_read_something_else_is_refused(checkpoint: Checkpoint) -> None:
    model = gather(checkpoint, TEXTS)
    with pytest.raises(ConfigError, match=r"read 1 of [0-9]+ texts differently"):
        report.report(model, gather(checkpoint, [t[:20] for t in TEXTS]), samples=SAMPLES, seed=2)
    with pytest.raises(ConfigError, match=f"read {len(TEXTS)} of {len(TEXTS)} texts differently"):
        report.report(model, gather(checkpoint, TEXTS[:-1]), samples=SAMPLES, seed=2)


def test_a_baseline_that_read_the_end_of_a_text_is_told_from_a_model_that_did_not(checkpoint: Checkpoint) -> None:
    """Where the text alone just fits, the model that is one token longer predicts one token more."""
    rows = list(Encoder(checkpoint, "line").rows(TEXTS))
    found = []
    for ended in (rows, [rows[0][:-1], *rows[1:]]):
        found.append(Gathered())
        for piece in measured(checkpoint, enumerate(ended), unit="line", samples=1):
            found[-1].add(piece)
    with pytest.raises(ConfigError, match=r"read 1 of [0-9]+ texts differently"):
        report.report(*found, samples=1, seed=0)


def test_bleu_of_texts_without_four_words_is_not_told(checkpoint: Checkpoint) -> None:
    model = gather(checkpoint, TEXTS)
    for columns in model.columns:
        columns[f"bleu_{2 * bleu.ORDER - 1}"][:] = 0
    found = report.report(model, samples=SAMPLES, seed=2)
    assert found.values["bleu"] is None
    assert "bleu" not in found.intervals
