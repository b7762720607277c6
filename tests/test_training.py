"""The training loop: what it learns, when it ends, what it calls best, and that a pause changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gptvae_cli.config import DataConfig, ModelConfig, TrainConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import Epoch, Rows, fixed_batches, padded
from gptvae_cli.errors import CheckpointError, DivergedError, ExitCode
from gptvae_cli.evaluation import Figures, measure, reconstruct
from gptvae_cli.learner import EMBEDDINGS_FASTER, Counters, Learner, counters_dict
from gptvae_cli.model import GPTVAE
from gptvae_cli.objective import BagOfWords, Batch, Noise, objective
from gptvae_cli.schedule import Dropout, Weights, recipe
from gptvae_cli.training import StepReport, score, share_done, train, training_noise

SENTENCES = [
    "the cat sleeps",
    "a dog barks at night",
    "rain",
    "we went home early",
    "she reads",
    "who is there?",
    "two plus two is four",
    "no",
    "the cat barks",
    "write me a letter",
]

pytestmark = pytest.mark.usefixtures("one_thread")

MakeRows = Callable[..., Rows]


def shape(**changes: Any) -> ModelConfig:
    sizes = {"dim": 32, "depth": 1, "enc_depth": 1, "max_seq_len": 32, "dim_latent": 8, "heads": 2, "attn_dim_head": 16}
    fields = {"num_tokens": 259, "pad_id": 256, "bos_id": 257, "eos_id": 258, "conditioning": "token"}
    return ModelConfig(**{**fields, **sizes, **changes})


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"max_time": None, "batch_tokens": 64, "on_collapse": "warn", **changes})


def learner_of(train_config: TrainConfig, *, seed: int = 0, **sizes: int) -> Learner:
    torch.manual_seed(seed)
    return Learner(GPTVAE.from_config(shape(**sizes)), train_config)


def run(learner: Learner, rows: Rows, **options: Any) -> list[StepReport]:
    """A whole run, held-out texts being those that it trains on."""
    return list(train(learner, rows, rows, dtype=torch.float32, **options))


@pytest.fixture
def make_rows(tmp_path: Path) -> MakeRows:
    def make(lines: list[str] = SENTENCES, **sizes: int) -> Rows:
        path = tmp_path / "corpus.txt"
        path.write_text("\n".join(lines))
        # The corpus is its own validation file, so that no text is held out.
        corpus = Corpus.build([str(path)], DataConfig(tokenizer="bytes", valid=str(path)), tmp_path / "cache")
        return Rows(corpus.train, shape(**sizes), window=False)

    return make


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, per_call: float = 0.0) -> None:
        self.now, self.per_call = 0.0, per_call

    def __call__(self) -> float:
        self.now += self.per_call
        return self.now


FIGURES = Figures(
    texts=10,
    tokens=100,
    cross_entropy=20.0,
    cross_entropy_shuffled=25.0,
    cross_entropy_without=24.0,
    kl=5.0,
    mutual_information=2.0,
    active_001=8,
    active_02=4,
    entropy=math.log(10),
)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Figures]], None]:
    """Sets what the validations of a run find, one after the other, the last of them again and again."""

    def set_figures(figures: list[Figures]) -> None:
        def measure(*args: Any, **kwargs: Any) -> Figures:
            return figures.pop(0) if len(figures) > 1 else figures[0]

        monkeypatch.setattr("gptvae_cli.training.measure", measure)

    return set_figures


# Learning -------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_clipped(make_rows: MakeRows) -> None:
    """Adam divides by its size, but for its epsilon: clipped to far less than that, it moves nothing."""
    rows = make_rows()
    moved = []
    for clip in (1e-15, 1.0):
        learner = learner_of(config(steps=3, clip=clip, weight_decay=0.0))
        before = {name: value.detach().clone() for name, value in learner.named.items()}
        run(learner, rows)
        moved.append(max(float((value - before[name]).detach().abs().max()) for name, value in learner.named.items()))
    assert moved[0] < 1e-6 < 1e-3 < moved[1]


def test_dropout_grows_with_passes_of_which_parts_count(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def shares(dropout: float, epochs: float, weights_per_token: float) -> Dropout:
        seen.append(epochs)
        return Dropout(0.0, 0.0)

    monkeypatch.setattr("gptvae_cli.training.dropout_shares", shares)
    rows = make_rows([f"{i:02}" + "x" * 20 for i in range(10)])
    run(learner_of(config(epochs=2.0, batch_tokens=48)), rows)
    assert seen == pytest.approx([i * 0.2 for i in range(10)])


def test_a_tiny_model_learns_ten_sentences_by_heart(make_rows: MakeRows) -> None:
    """From their latents: two of them begin with the same words. Dropout is there to prevent it."""
    sizes = {"dim": 64, "attn_dim_head": 32, "depth": 2, "dim_latent": 16}
    rows = make_rows(**sizes)
    learner = learner_of(config(steps=240, batch_tokens=512, lr=5e-3, vae_kl_loss_weight=0.02, dropout=0.0), **sizes)
    reports = run(learner, rows)
    assert reports[-1].cross_entropy_per_token < 0.1 < reports[0].cross_entropy_per_token
    figures = reports[-1].figures
    assert figures is not None
    assert figures.mutual_information == pytest.approx(math.log(10), abs=0.1)
    assert figures.cross_entropy_shuffled > figures.cross_entropy + 10
    texts_BT = padded([[257, *text.encode(), 258] for text in SENTENCES], learner.model.pad_id)
    assert [bytes(ids).decode() for ids in reconstruct(learner.model, texts_BT)] == SENTENCES


def whole(batch: Batch) -> tuple[range, int]:
    """The rows of a step that is one batch, and the length of the longest."""
    return range(len(batch.tokens_BT)), batch.tokens_BT.shape[1]


def test_the_first_report_is_the_objective_of_the_first_batch(make_rows: MakeRows) -> None:
    """In nats per token and nats per text; the noise is the one of step 0."""
    rows, train_config = make_rows(), config(steps=1, word_dropout=0.4)
    learner, same = learner_of(train_config), learner_of(train_config)
    (report,) = run(learner, rows)
    batch = next(Epoch(rows, 64, seed=0, epoch=0).batches())
    noise = training_noise(recipe(train_config, 0.0), 0, *whole(batch), shape(), Dropout(0.0, 0.0))
    assert same.bag_of_words is not None
    terms = objective(same.model, same.bag_of_words, batch, noise, Weights("elbo", 0.0, 0.5, 1.0))
    assert report.cross_entropy_per_token == pytest.approx(terms.cross_entropy.item() / batch.target_tokens)
    assert report.kl == pytest.approx(terms.kl.item() / len(batch.tokens_BT))
    assert report.bag_of_words_per_token == pytest.approx(terms.bag_of_words.item() / batch.target_tokens)
    parameters = [*same.model.parameters(), *same.bag_of_words.parameters()]
    gradients = torch.autograd.grad(terms.total, parameters, allow_unused=True)
    norm = sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None) ** 0.5
    assert report.gradient_norm == pytest.approx(norm, rel=1e-4)
    assert report.beta == 0, "beta rises from 0"


def test_reports_average_over_every_step_since_the_one_before(
    make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step's loss alone would make the curve as noisy as its batch."""
    train_config, rows = config(steps=8), make_rows()
    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 0.0)
    learner = learner_of(train_config)
    losses, tokens = [], [0]
    for report in train(learner, rows, rows, dtype=torch.float32):
        losses.append(report.cross_entropy_per_token)
        tokens.append(learner.counters.tokens)
    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 1e9)
    monkeypatch.setattr("gptvae_cli.training.VALIDATIONS", (1.0,))
    (whole,) = run(learner_of(train_config), rows)
    assert len(losses) == 8
    assert len(set(np.diff(tokens))) > 1, "batches of unequal numbers of tokens"
    assert whole.cross_entropy_per_token == pytest.approx(float(np.average(losses, weights=np.diff(tokens))), rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"objective": "stock"}, {"latents_dropout_prob": 1.0}], ids=["elbo", "stock", "language model"]
)
def test_accumulated_parts_make_the_step_that_one_pass_makes(make_rows: MakeRows, changes: dict[str, Any]) -> None:
    """Without noise, and with the rows that a step sees fixed, only memory differs. Beta counts from the first step."""
    rows = make_rows(SENTENCES[:4])
    quiet = {"latents_dropout_prob": 0.0, "dropout": 0.0, "steps": 1, "warmup": 0.0, "decay": 0.0, "kl_warmup": 0.0}
    quiet |= {"clip": 1e9, **changes}
    states = []
    for accumulate in (1, 4):
        learner = learner_of(config(batch_tokens=4 * 32, accumulate=accumulate, **quiet))
        with torch.no_grad():  # a posterior without width: the noise then has no effect
            learner.named["to_latent_mean_log_variance.0.weight"][8:] = 0
            learner.named["to_latent_mean_log_variance.0.bias"][8:] = -60
        run(learner, rows)
        states.append((learner.counters.texts, learner.counters.tokens, learner.tensors()))
    assert states[0][:2] == states[1][:2] == (4, sum(len(text) + 1 for text in SENTENCES[:4]))
    for name, tensor in states[0][2].items():
        if name.startswith("optimizer.exp_avg."):
            assert_close(states[1][2][name], tensor, rtol=1e-3, atol=1e-7, msg=name)


def test_every_part_of_every_step_has_noise_of_its_own(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal noise in all parts of a step, or in all steps, would still resume exactly and report alike."""
    seen: list[bytes] = []

    def record(*arguments: Any) -> Noise:
        noise = training_noise(*arguments)
        seen.append(noise.latent_BZ[0].numpy().tobytes())
        return noise

    monkeypatch.setattr("gptvae_cli.training.training_noise", record)
    run(learner_of(config(steps=4, accumulate=2)), make_rows())
    assert len(seen) > 4, "some steps have two parts"
    assert len(set(seen)) == len(seen)


def test_every_epoch_and_every_seed_has_an_order_of_its_own(
    make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows([f"{i:02}" + "x" * 20 for i in range(11)])
    orders: dict[int, list[str]] = {}

    def record(model: Any, head: Any, batch: Batch, *rest: Any, **keywords: Any) -> Any:
        orders[seed] += [bytes(row[1:3]).decode() for row in batch.tokens_BT.tolist()]
        return objective(model, head, batch, *rest, **keywords)

    monkeypatch.setattr("gptvae_cli.training.objective", record)
    for seed in (0, 1):
        orders[seed] = []
        run(learner_of(config(epochs=2.0, batch_tokens=24, seed=seed)), rows)
    epochs = [order[start : start + 11] for order in orders.values() for start in (0, 11)]
    assert [sorted(epoch) for epoch in epochs] == [[f"{i:02}" for i in range(11)]] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_only_matrices_of_products_decay() -> None:
    learner = learner_of(config(steps=1, weight_decay=0.3))
    decayed, others, embeddings = learner.optimizer.param_groups
    names = {id(parameter): name for name, parameter in learner.named.items()}
    assert (decayed["weight_decay"], others["weight_decay"], embeddings["weight_decay"]) == (0.3, 0, 0)
    assert all(parameter.ndim == 2 and "emb" not in names[id(parameter)] for parameter in decayed["params"])
    assert "bag_of_words.to_logits.bias" in {names[id(parameter)] for parameter in others["params"]}
    assert {names[id(parameter)] for parameter in embeddings["params"]} == {
        "decoder.token_emb.emb.weight",
        "encoder.token_emb.emb.weight",
    }
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == len(names)


def test_embeddings_learn_faster_than_the_rest(make_rows: MakeRows) -> None:
    """AdamW's first step moves whatever has a gradient by the learning rate, whatever the gradient's size."""
    learner = learner_of(config(steps=1, warmup=0.0, decay=0.0, weight_decay=0.0, kl_warmup=0.0, lr=1e-3))
    before = {name: tensor.detach().clone() for name, tensor in learner.named.items()}
    run(learner, make_rows())
    moved = {name: float((tensor.detach() - before[name]).abs().max()) for name, tensor in learner.named.items()}
    for name in ("decoder.token_emb.emb.weight", "encoder.token_emb.emb.weight"):
        assert moved.pop(name) == pytest.approx(EMBEDDINGS_FASTER * 1e-3, rel=1e-3)
    assert max(moved.values()) == pytest.approx(1e-3, rel=1e-3)


def test_weights_stay_float32_under_bfloat16(make_rows: MakeRows) -> None:
    learner, rows = learner_of(config(steps=3)), make_rows()
    reports = list(train(learner, rows, rows, dtype=torch.bfloat16))
    assert math.isfinite(reports[-1].cross_entropy_per_token)
    assert {tensor.dtype for tensor in learner.tensors().values()} == {torch.float32}


def test_a_step_in_bfloat16_is_computed_in_it(make_rows: MakeRows) -> None:
    rows, train_config = make_rows(), config(steps=1, on_collapse="warn", bag_of_words=0.0)
    learner, same = learner_of(train_config), learner_of(train_config)
    (report,) = train(learner, rows, rows, dtype=torch.bfloat16)
    batch = next(Epoch(rows, 64, seed=0, epoch=0).batches())
    noise = training_noise(recipe(train_config, 0.0), 0, *whole(batch), shape(), Dropout(0.0, 0.0))
    exact = objective(same.model, None, batch, noise, Weights("elbo", 0.0, 0.0, 0.0)).cross_entropy
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective(same.model, None, batch, noise, Weights("elbo", 0.0, 0.0, 0.0)).cross_entropy
    assert report.cross_entropy_per_token == pytest.approx(rounded.item() / batch.target_tokens, rel=1e-6)
    assert report.cross_entropy_per_token != pytest.approx(exact.item() / batch.target_tokens, rel=1e-6)


@pytest.mark.requires_cuda
def test_a_gpu_learns_what_the_cpu_learns(make_rows: MakeRows) -> None:
    rows, losses = make_rows(), []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        learner = Learner(GPTVAE.from_config(shape()).to(device), config(steps=20))
        losses.append(run(learner, rows)[-1].cross_entropy_per_token)
        again = Learner(GPTVAE.from_config(shape()).to(device), config(steps=20))
        again.restore({name: tensor.cpu() for name, tensor in learner.tensors().items()}, {"step": 20})
        for name, tensor in learner.tensors().items():
            assert torch.equal(again.tensors()[name], tensor), name
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_learning_on_a_cpu_leaves_a_gpu_alone(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's optimizers ask it, where there is one, whether it is capturing a graph."""

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", fail)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fail)
    learner = learner_of(config(steps=2))
    run(learner, make_rows())
    assert learner.counters.step == 2


def test_tokens_and_texts_per_second_are_of_the_same_seconds(make_rows: MakeRows) -> None:
    learner = learner_of(config(steps=1, batch_tokens=512))
    (report,) = run(learner, make_rows())
    assert (learner.counters.texts, learner.counters.tokens) == (10, sum(len(text) + 1 for text in SENTENCES))
    tokens_per_text = learner.counters.tokens / learner.counters.texts
    assert report.tokens_per_second / report.texts_per_second == pytest.approx(tokens_per_text)


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("pauses", [(1,), (3, 4, 11), (12,)], ids=str)
def test_a_run_that_was_interrupted_ends_with_the_very_weights_of_one_that_was_not(
    make_rows: MakeRows, accumulate: int, pauses: tuple[int, ...]
) -> None:
    """Also in the middle of an epoch. Dropout of words and latents, the schedules and AdamW's moments all count."""
    rows = make_rows(SENTENCES * 3)
    train_config = config(steps=14, accumulate=accumulate, word_dropout=0.3, latents_dropout_prob=0.3)
    undisturbed = learner_of(train_config)
    run(undisturbed, rows)
    assert 1 <= undisturbed.counters.epoch < 14, "pauses fall into the middle of an epoch"

    learner = learner_of(train_config)
    for pause in pauses:
        reports = run(learner, rows, should_stop=lambda: learner.counters.step >= pause)  # noqa: B023
        assert not reports[-1].done
        assert reports[-1].step == learner.counters.step == pause
        tensors = {name: tensor.clone() for name, tensor in learner.tensors().items()}
        counters = json.loads(json.dumps(counters_dict(learner.counters)))
        torch.manual_seed(99)  # a new process draws other initial weights, which must all be replaced
        learner = learner_of(train_config, seed=pause)
        learner.restore(tensors, counters)
    assert run(learner, rows)[-1].done

    expected = undisturbed.tensors()
    assert learner.tensors().keys() == expected.keys()
    for name, tensor in learner.tensors().items():
        assert torch.equal(tensor, expected[name]), name
    ours, theirs = learner.counters, undisturbed.counters
    ours, theirs = (replace(counters, seconds=0, start_up=0, validation=0, best=0) for counters in (ours, theirs))
    assert ours == theirs


def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(make_rows: MakeRows) -> None:
    weights = []
    for seed in (3, 3, 4):
        learner = learner_of(config(steps=4, seed=seed), seed=0)
        run(learner, make_rows())
        weights.append(learner.model.decoder.token_emb.emb.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_seconds_of_earlier_sessions_count(make_rows: MakeRows) -> None:
    learner = learner_of(config(max_time=100.0))
    learner.counters.seconds = 95.0
    reports = run(learner, make_rows(), seconds=Clock(per_call=0.25))
    assert reports[-1].done
    assert 100 <= learner.counters.seconds < 103


def test_a_run_that_is_over_takes_no_step_more(make_rows: MakeRows) -> None:
    learner, rows = learner_of(config(steps=3)), make_rows()
    run(learner, rows)
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    assert run(learner, rows) == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weights.decoder.token_emb.emb.weight"), "weights.decoder.token_emb.emb.weight is missing"),
        (lambda t: t.pop("optimizer.step.bag_of_words.to_logits.bias"), "bag_of_words.to_logits.bias is missing"),
        (
            lambda t: t.update({"weights.to_latent_mean_log_variance.0.bias": torch.zeros(3)}),
            r"to_latent_mean_log_variance.0.bias is \[3\], this run needs \[16\]",
        ),
    ],
    ids=["no-weight", "no-moment", "shape"],
)
def test_a_state_that_does_not_fit_is_named(
    make_rows: MakeRows, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    learner = learner_of(config(steps=2))
    run(learner, make_rows())
    tensors = dict(learner.tensors())
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        learner_of(config(steps=2)).restore(tensors, counters_dict(learner.counters))


def test_counters_survive_json() -> None:
    """A best score of infinity does not exist in JSON."""
    learner = learner_of(config(steps=2))
    learner.counters.step, learner.counters.seconds = 7, 1.5
    text = json.dumps(counters_dict(learner.counters), allow_nan=False)
    other = learner_of(config(steps=2))
    other.restore(
        {f"weights.{name}": p.detach() for name, p in learner.named.items()} | moments(learner), json.loads(text)
    )
    assert other.counters == learner.counters
    assert other.counters.best == math.inf


def moments(learner: Learner) -> dict[str, torch.Tensor]:
    return {
        f"optimizer.{key}.{name}": torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
        for name, parameter in learner.named.items()
        for key in ("exp_avg", "exp_avg_sq", "step")
    }


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_steps_are_taken_exactly(make_rows: MakeRows, steps: int) -> None:
    learner = learner_of(config(steps=steps))
    last = run(learner, make_rows())[-1]
    assert last.done
    assert (last.step, last.progress) == (learner.counters.step, 1.0) == (steps, 1.0)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("epochs", [1, 2])
def test_an_epoch_is_every_text_once(make_rows: MakeRows, epochs: int, accumulate: int) -> None:
    """Texts of half a batch and a bit fill it badly: counting tokens instead of batches would end the run early, and
    dropping the batches that do not fill a last step would lose texts."""
    lines = [f"{i:02}" + "x" * 20 for i in range(11)]
    learner = learner_of(config(epochs=float(epochs), batch_tokens=40 * accumulate, accumulate=accumulate))
    reports = run(learner, make_rows(lines))
    assert learner.counters.texts == 11 * epochs
    assert learner.counters.tokens == 11 * epochs * 23
    assert learner.counters.step == epochs * -(-11 // accumulate)
    progress = [report.progress for report in reports]
    assert progress == sorted(progress)
    assert reports[-1].done


def test_half_an_epoch_is_half_of_the_texts(make_rows: MakeRows) -> None:
    learner = learner_of(config(epochs=0.5, batch_tokens=40))
    run(learner, make_rows([f"{i:02}" + "x" * 20 for i in range(20)]))
    assert learner.counters.texts == 10


def test_a_corpus_of_fewer_batches_than_a_step_has_parts_still_trains(make_rows: MakeRows) -> None:
    """It used to be read again and again without a step ever being taken."""
    learner = learner_of(config(steps=3, batch_tokens=4096, accumulate=4))
    assert run(learner, make_rows(SENTENCES[:3]))[-1].step == 3
    assert learner.counters.texts == 9


def test_time_ends_a_run(make_rows: MakeRows) -> None:
    clock = Clock(per_call=1.0)
    learner = learner_of(config(max_time=50.0))
    reports = run(learner, make_rows(), seconds=clock)
    assert reports[-1].done
    assert learner.counters.seconds == pytest.approx(clock.now)
    assert 50 <= clock.now < 53
    assert 20 < learner.counters.step <= 50


@pytest.mark.parametrize(
    ("step", "seconds", "start_up", "share"),
    [
        (0, 0.0, 30.0, 0.0),
        (1, 31.0, 30.0, 2 / 30),
        (9, 45.0, 30.0, 16 / 30),
        (9, 59.0, 30.0, 1.0),
        (1, 71.0, 70.0, 1.0),
    ],
)
def test_time_is_a_share_of_what_is_left_for_learning(step: int, seconds: float, start_up: float, share: float) -> None:
    counters = Counters(step=step, seconds=seconds, start_up=start_up, validation=0.5)
    assert share_done(config(max_time=60.0), counters, 10) == pytest.approx(share)


def test_progress_of_a_resumed_run_goes_on_where_it_was(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is kept for the last validation from the first step on, and not from the next validation."""
    clock = Clock()

    def measured(*arguments: object, **options: object) -> Figures:
        clock.now += 30.0
        return FIGURES

    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 0.0)
    monkeypatch.setattr("gptvae_cli.training.measure", measured)
    monkeypatch.setattr("gptvae_cli.training.time", SimpleNamespace(monotonic=lambda: clock.now))

    def reports(learner: Learner, until: float) -> list[StepReport]:
        found = []
        for report in train(
            learner,
            make_rows(),
            make_rows(),
            dtype=torch.float32,
            seconds=clock,
            should_stop=lambda: learner.counters.seconds >= until,
        ):
            clock.now += 3.0
            found.append(report)
        return found

    first = learner_of(config(max_time=600.0))
    before = reports(first, until=400.0)
    again = learner_of(config(max_time=600.0))
    again.restore(first.tensors(), json.loads(json.dumps(counters_dict(first.counters))))
    clock.now = 5.0
    after = reports(again, until=math.inf)
    assert not before[-1].done
    progress = [report.progress for report in before + after]
    assert progress == sorted(progress)
    assert again.counters.seconds <= 605.0
    assert after[0].figures is None, "the last one is not made up for"


def test_no_schedule_is_over_because_a_corpus_took_long_to_read(
    make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the time was gone as the first step began."""
    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 0.0)
    clock = Clock(per_call=0.25)
    clock.now = 30.0
    learner = learner_of(config(max_time=60.0, kl_warmup=0.3, warmup=0.1))
    reports = run(learner, make_rows(), seconds=clock)
    assert reports[-1].done and 60 <= clock.now < 62
    assert reports[1].beta < 0.1
    assert reports[1].learning_rate < 0.5 * learner.lr
    assert sorted(report.beta for report in reports) == [report.beta for report in reports]


def test_the_start_up_of_a_run_is_that_of_its_first_session(make_rows: MakeRows) -> None:
    """That of a later one is time that the run took, else its schedules would begin anew."""
    learner, clock = learner_of(config(max_time=100.0)), Clock(per_call=1.0)
    learner.counters.step, learner.counters.seconds, learner.counters.start_up = 7, 60.0, 20.0
    clock.now = 15.0
    report = run(learner, make_rows(), seconds=clock)[0]
    assert learner.counters.start_up == 20
    assert report.progress >= (60 + 15 - 20) / (100 - 20)


def test_start_up_counts_as_time_but_one_step_is_always_taken(make_rows: MakeRows) -> None:
    clock = Clock(per_call=1.0)
    clock.now = 1000.0
    reports = run(learner_of(config(max_time=10.0)), make_rows(), seconds=clock)
    assert [report.step for report in reports] == [1]
    assert reports[0].figures is not None


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({"steps": 5, "epochs": 100.0, "max_time": 1e6}, 5), ({"steps": 500, "epochs": 1.0, "max_time": 1e6}, 11)],
    ids=["steps", "epochs"],
)
def test_the_first_limit_ends_the_run(make_rows: MakeRows, limits: dict[str, Any], steps: int) -> None:
    learner = learner_of(config(batch_tokens=40, **limits))
    run(learner, make_rows([f"{i:02}" + "x" * 20 for i in range(11)]))
    assert learner.counters.step == steps


def test_the_learning_rate_follows_progress_and_ends_near_zero(
    make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 0.0)
    learner = learner_of(config(steps=20, warmup=0.1, decay=0.5, lr=1e-3, kl_warmup=0.4))
    reports = run(learner, make_rows())
    # Step i + 1 runs at progress i / 20, but that the first one learns too.
    rates = [min(1, max(i / 20, 0.001) / 0.1, (1 - i / 20) / 0.5) * 1e-3 for i in range(20)]
    assert [report.learning_rate for report in reports] == pytest.approx(rates)
    assert [report.beta for report in reports] == pytest.approx([min(1, i / 20 / 0.4) for i in range(20)])
    last = [group["lr"] / group["lr_scale"] for group in learner.optimizer.param_groups]
    assert last == pytest.approx([rates[-1]] * 3)


def test_wider_models_learn_at_a_lower_rate_unless_told() -> None:
    rates = [learner_of(config(steps=1), dim=dim).lr for dim in (32, 128)]
    assert rates == pytest.approx([4e-3, 2e-3])
    assert learner_of(config(steps=1, lr=0.5), dim=128).lr == 0.5


# Validation and the best model ----------------------------------------------------------------------------------------


def validations(reports: list[StepReport]) -> list[int]:
    return [report.step for report in reports if report.figures is not None]


def test_validations_are_spread_evenly_and_the_last_is_at_the_end(
    make_rows: MakeRows, measured: Callable[[list[Figures]], None]
) -> None:
    measured([FIGURES])
    assert validations(run(learner_of(config(steps=40)), make_rows())) == [2, *range(4, 41, 4)]
    assert validations(run(learner_of(config(steps=25)), make_rows())) == [2, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert validations(run(learner_of(config(steps=2)), make_rows())) == [1, 2]


def test_slow_validations_do_not_eat_the_run(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one takes a fifth of the time, the ones that it made late are not made up for, one after every step."""
    clock = Clock(per_call=1.0)

    def measure(*args: Any, **kwargs: Any) -> Figures:
        clock.now += 60.0
        return FIGURES

    monkeypatch.setattr("gptvae_cli.training.measure", measure)
    learner = learner_of(config(max_time=300.0))
    reports = run(learner, make_rows(), seconds=clock)
    steps = validations(reports)
    assert len(steps) <= 5
    assert learner.counters.step > 20
    assert steps[-1] == learner.counters.step


def test_progress_never_goes_back_where_a_validation_was_faster_than_the_one_before(
    make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last one will take is guessed from it. Beta and the learning rate would rise and fall again."""
    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 0.0)
    clock, takes = Clock(per_call=1.0), [15.0, 10.0, 5.0]

    def measure(*args: Any, **kwargs: Any) -> Figures:
        clock.now += takes.pop(0) if takes else 1.0
        return FIGURES

    monkeypatch.setattr("gptvae_cli.training.measure", measure)
    monkeypatch.setattr("gptvae_cli.training.time.monotonic", lambda: clock.now)
    reports = run(learner_of(config(max_time=600.0)), make_rows(), seconds=clock)
    assert not takes
    progress = [report.progress for report in reports]
    assert progress == sorted(progress)


def test_validations_take_a_tenth_of_the_time_at_most_but_for_the_first_and_the_last(
    make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow machine each took fifteen seconds of two minutes, and twelve steps were left."""
    clock, began = Clock(per_call=0.1), []

    def measure(*args: Any, **kwargs: Any) -> Figures:
        began.append(clock.now)
        clock.now += 15.0
        return FIGURES

    monkeypatch.setattr("gptvae_cli.training.measure", measure)
    monkeypatch.setattr("gptvae_cli.training.time.monotonic", lambda: clock.now)
    learner = learner_of(config(max_time=600.0))
    assert run(learner, make_rows(), seconds=clock)[-1].done
    assert began[0] < 60
    assert len(began) == 5
    assert all(after - before >= 150 for before, after in pairwise(began[:-1]))
    began.clear()
    run(learner_of(config(steps=40)), make_rows(), seconds=clock)
    assert len(began) == 11, "what a number of steps comes to does not depend on the machine"


def test_a_resumed_run_validates_where_it_would_have(
    make_rows: MakeRows, measured: Callable[[list[Figures]], None]
) -> None:
    measured([FIGURES])
    learner, rows = learner_of(config(steps=40)), make_rows()
    found = validations(run(learner, rows, should_stop=lambda: learner.counters.step == 18))
    found += validations(run(learner, rows))
    assert found == [2, *range(4, 41, 4)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_validation_has_the_seed_and_the_type_of_its_run(make_rows: MakeRows, precision: torch.dtype) -> None:
    learner, rows = learner_of(config(steps=1, seed=7)), make_rows()
    (report,) = train(learner, rows, rows, dtype=precision)
    found = {
        (seed, dtype): measure(learner.model, fixed_batches(rows, 64, 1000), seed=seed, dtype=dtype).cross_entropy
        for seed in (0, 7)
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert report.figures is not None
    nearest = min(found, key=lambda key: abs(found[key] - report.figures.cross_entropy))  # type: ignore[union-attr]
    assert nearest == (7, precision)


def better(by: float, **changes: Any) -> Figures:
    return replace(FIGURES, cross_entropy=FIGURES.cross_entropy - by, **changes)


def test_nothing_is_best_before_beta_has_reached_its_final_value(
    make_rows: MakeRows, measured: Callable[[list[Figures]], None]
) -> None:
    """Under a smaller beta a model reaches a bound that it cannot keep."""
    measured(
        [better(20), better(19), better(18), better(17), FIGURES, better(1), better(1), better(0.5), better(2), FIGURES]
    )
    reports = run(learner_of(config(steps=40, kl_warmup=0.4)), make_rows())
    improved = [report.step for report in reports if report.improved]
    assert improved == [16, 20, 32], "strictly better ones, from 40 % on"


def test_a_language_model_may_be_best_before_beta_is_final(
    make_rows: MakeRows, measured: Callable[[list[Figures]], None]
) -> None:
    """It has no latent for beta to weigh, and on a small corpus it is soon at its best."""
    measured(
        [replace(FIGURES, cross_entropy_without=FIGURES.cross_entropy_without + by) for by in (-9, 0, -1, 1, -2, 2)]
    )
    reports = run(learner_of(config(steps=40, kl_warmup=0.8, latents_dropout_prob=1.0)), make_rows())
    assert [report.step for report in reports if report.improved] == [4, 8, 16], "none before a tenth"


def test_a_language_model_is_validated_as_one(make_rows: MakeRows) -> None:
    """Its encoder has learnt nothing, and what that makes of a text says nothing."""
    learner = learner_of(config(steps=10, latents_dropout_prob=1.0))
    found = [report.figures for report in run(learner, make_rows()) if report.figures is not None]
    assert found[-1].cross_entropy < found[0].cross_entropy, "it learns"
    assert all(figures.nll_bound == figures.cross_entropy_without for figures in found)
    assert all(figures.mutual_information == 0 for figures in found)


def test_a_collapsed_model_never_replaces_one_that_is_not(
    make_rows: MakeRows, measured: Callable[[list[Figures]], None]
) -> None:
    dead = better(15, mutual_information=0.5)
    measured([dead, better(16, mutual_information=0.5), FIGURES, dead, better(19, mutual_information=0.99), better(1)])
    learner = learner_of(config(steps=10, kl_warmup=0.0))
    reports = run(learner, make_rows())
    # Where there are only collapsed ones the better of these is kept: a model of any kind is better than none.
    assert [report.step for report in reports if report.improved] == [1, 2, 3, 6]
    assert learner.counters.best == pytest.approx(score(better(1), learner.config))


def test_the_last_model_may_be_best_where_beta_rises_to_the_end(
    make_rows: MakeRows, measured: Callable[[list[Figures]], None]
) -> None:
    measured([better(5)] * 9 + [FIGURES])
    reports = run(learner_of(config(steps=10, kl_warmup=1.0)), make_rows())
    assert [report.step for report in reports if report.improved] == [10]


def test_the_score_is_the_bound_at_the_final_beta() -> None:
    assert score(FIGURES, config(steps=1)) == 25.0
    assert score(FIGURES, config(steps=1, vae_kl_loss_weight=0.1)) == 20.5
    dead = replace(FIGURES, cross_entropy=1.0, kl=0.0, mutual_information=0.9)
    unheard = replace(FIGURES, cross_entropy=1.0, cross_entropy_shuffled=1.0)
    bad = replace(FIGURES, cross_entropy=1e6, cross_entropy_shuffled=2e6)
    assert score(bad, config(steps=1)) < min(score(dead, config(steps=1)), score(unheard, config(steps=1)))


def test_the_best_score_survives_a_pause(make_rows: MakeRows, measured: Callable[[list[Figures]], None]) -> None:
    measured([better(3), FIGURES])
    learner, rows = learner_of(config(steps=10, kl_warmup=0.0)), make_rows()
    run(learner, rows, should_stop=lambda: learner.counters.step == 5)
    other = learner_of(config(steps=10, kl_warmup=0.0))
    other.restore(learner.tensors(), json.loads(json.dumps(counters_dict(learner.counters))))
    assert not any(report.improved for report in run(other, rows))


# Divergence -----------------------------------------------------------------------------------------------------------


def poisoned(learner: Learner, rows: Rows, at: int, name: str) -> Iterator[StepReport]:
    for report in train(learner, rows, rows, dtype=torch.float32):
        yield report
        if report.step >= at:
            with torch.no_grad():
                learner.named[name].fill_(math.nan)


@pytest.mark.parametrize("name", ["decoder.token_emb.emb.weight", "to_latent_mean_log_variance.0.bias"])
def test_a_loss_that_is_no_number_ends_the_run(make_rows: MakeRows, name: str) -> None:
    learner = learner_of(config(steps=40))
    good = []
    with pytest.raises(DivergedError, match=r"training diverged: the .* is nan at step \d+") as caught:
        for report in poisoned(learner, make_rows(), at=20, name=name):
            good.append(report)
    assert caught.value.exit_code == ExitCode.DIVERGED
    assert good[-1].step >= 20
    for report in good:
        assert all(math.isfinite(value) for value in (report.cross_entropy_per_token, report.kl, report.gradient_norm))


def test_a_gradient_that_is_no_number_ends_the_run_before_anything_is_reported(make_rows: MakeRows) -> None:
    """A huge learning rate: whatever is reported, and then saved, is from before."""
    learner = learner_of(config(steps=200, lr=1e30, warmup=0.0))
    reports: list[StepReport] = []
    with pytest.raises(DivergedError):
        for report in train(learner, make_rows(), make_rows(), dtype=torch.float32):
            assert all(bool(tensor.isfinite().all()) for tensor in learner.tensors().values()), report
            reports.append(report)


# Noise ----------------------------------------------------------------------------------------------------------------


TRAINED = config(steps=1, latents_dropout_prob=0.3, word_dropout=0.4, dropout=0.2)
NOISY = recipe(TRAINED, 0.0)
SOME = Dropout(0.2, 0.1)


def test_noise_is_a_function_of_seed_step_and_row_alone() -> None:
    torch.manual_seed(0)
    first = training_noise(NOISY, 7, range(200, 400), 20, shape(), SOME)
    torch.manual_seed(1)
    np.random.default_rng(0)
    again = training_noise(NOISY, 7, range(200, 400), 20, shape(), SOME)
    for field in fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    others = [
        training_noise(NOISY, 8, range(200, 400), 20, shape(), SOME),
        training_noise(NOISY, 7, range(200), 20, shape(), SOME),
        training_noise(recipe(replace(TRAINED, seed=1), 0.0), 7, range(200, 400), 20, shape(), SOME),
    ]
    for other in others:
        for field in fields(first):
            assert not torch.equal(getattr(first, field.name), getattr(other, field.name)), field.name


def test_a_rows_noise_does_not_depend_on_the_rows_beside_it() -> None:
    """Nor on the part that it is in, nor on the length of that part's longest text."""
    together: Any = training_noise(NOISY, 3, range(50), 20, shape(), SOME)
    alone: Any = training_noise(NOISY, 3, range(17, 18), 12, shape(), SOME)
    assert torch.equal(alone.latent_BZ[0], together.latent_BZ[17])
    assert torch.equal(alone.keep_B[0], together.keep_B[17])
    assert torch.equal(alone.hide_BT[0], together.hide_BT[17, :12])
    assert torch.equal(alone.drop_LBD[:, 0], together.drop_LBD[:, 17])


def test_noise_has_the_shares_that_were_asked_for() -> None:
    noise = training_noise(NOISY, 0, range(4000), 50, shape(), Dropout(0.25, 0.15))
    assert noise.keep_B is not None
    assert noise.hide_BT is not None
    assert noise.latent_BZ.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.latent_BZ.std().item() == pytest.approx(1, abs=0.03)
    assert noise.keep_B.double().mean().item() == pytest.approx(0.5, abs=0.03)
    assert noise.hide_BT.double().mean().item() == pytest.approx(0.4, abs=0.01)
    shares = [0.15, 0.25, 0.25, 0.15]
    assert noise.drop_LBD is not None
    assert noise.drop_LBD.shape == (4, 4000, 32)
    for factors_BD, share in zip(noise.drop_LBD, shares, strict=True):
        assert sorted(set(factors_BD.flatten().tolist())) == pytest.approx([0, 1 / (1 - share)])
        assert (factors_BD == 0).double().mean().item() == pytest.approx(share, abs=0.01)
        assert factors_BD.mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.4), (0.25, 0.2), (0.49, 0.008)])
def test_word_dropout_falls_to_nothing_at_half_of_the_run(progress: float, share: float) -> None:
    noise = training_noise(recipe(TRAINED, progress), 0, range(4000), 50, shape(), SOME)
    assert noise.hide_BT is not None
    assert noise.hide_BT.double().mean().item() == pytest.approx(share, abs=0.01)
    assert training_noise(recipe(TRAINED, 0.5), 0, range(200), 20, shape(), SOME).hide_BT is None


@pytest.mark.parametrize(("progress", "kept"), [(0.25, 0.6), (0.5, 0.7), (1.0, 0.7)])
def test_fewer_latents_are_dropped_until_half_of_the_run(progress: float, kept: float) -> None:
    noise = training_noise(recipe(TRAINED, progress), 0, range(4000), 2, shape(), SOME)
    assert noise.keep_B is not None
    assert noise.keep_B.double().mean().item() == pytest.approx(kept, abs=0.03)


def test_without_dropout_nothing_is_dropped() -> None:
    undropped = recipe(config(steps=1, latents_dropout_prob=0.0), 0.0)
    none = training_noise(undropped, 0, range(200), 20, shape(), Dropout(0.0, 0.0))
    assert (none.keep_B, none.hide_BT, none.drop_LBD) == (None,) * 3


def test_a_long_run_drops_out_and_a_short_one_does_not(make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares follow the passes over the corpus that a run, resumed or not, has made, and its size."""
    seen: list[float] = []
    rows = make_rows()

    def dropout_shares(dropout: float, epochs: float, weights_per_token: float) -> Dropout:
        assert dropout == 0.1
        assert weights_per_token == shape().num_tokens * shape().dim / rows.store.count
        seen.append(epochs)
        return Dropout(0.0, 0.0)

    monkeypatch.setattr("gptvae_cli.training.dropout_shares", dropout_shares)
    learner = learner_of(config(steps=7, dropout=0.1))
    run(learner, rows)
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert seen[-1] < learner.counters.texts / len(SENTENCES) <= seen[-1] + 1


def test_the_auxiliary_head_is_not_part_of_the_model() -> None:
    """It is thrown away after training: the model file must not carry it."""
    learner = learner_of(config(steps=1))
    assert isinstance(learner.bag_of_words, BagOfWords)
    assert not any("bag_of_words" in name for name in learner.model.state_dict())
    assert learner_of(config(steps=1, bag_of_words=0.0)).bag_of_words is None
