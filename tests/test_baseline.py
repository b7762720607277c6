"""The baseline of a run: what it is trained like, and when one that is there will do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count, repeat
from pathlib import Path

import pytest
import torch

from gptvae_cli import run
from gptvae_cli.baseline import Baseline
from gptvae_cli.checkpoint import load_state, save_state
from gptvae_cli.config import DataConfig, SizeConfig, TrainConfig
from gptvae_cli.device import Device, Precision
from gptvae_cli.errors import BusyError, CheckpointError, ConfigError
from gptvae_cli.folder import claimed
from gptvae_cli.header import read_header
from gptvae_cli.machine import processors
from gptvae_cli.model import GPTVAE

CPU = Device(torch.device("cpu"), "asked for")
FLOAT32 = Precision(torch.float32, "exact")
TINY = SizeConfig(preset="nano", dim=32, depth=1, enc_depth=1, heads=2, attn_dim_head=16, dim_latent=8)
CONFIG = TrainConfig(steps=4, max_time=None, batch_tokens=128, kl_warmup=0.0, lr=0.004, seed=5)

pytestmark = pytest.mark.usefixtures("one_thread")


def never() -> bool:
    return False


def train(folder: Path, config: TrainConfig = CONFIG) -> Path:
    """A model in its run folder; it learnt for 30 seconds, after 10 in which its corpus was read."""
    corpus = folder.parent / "corpus.txt"
    corpus.write_text("".join(f"{word} number {i}\n" for i in range(20) for word in ("cat", "a bird")))
    with claimed(folder, resume=False, force=True):
        job = run.start(folder, [str(corpus)], DataConfig(), config, sizes=TINY, device=CPU, precision=FLOAT32)
        clock = chain([10.0], repeat(40.0))
        list(job.run(should_stop=never, seconds=lambda: next(clock)))
    return folder / "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return train(tmp_path / "run")


def learn(baseline: Baseline, should_stop: Callable[[], bool] = never) -> list[int]:
    """Trains a baseline, and returns the steps that it reported."""
    with baseline.training(CPU, FLOAT32) as job:
        return [report.step for report in job.run(should_stop=should_stop, seconds=lambda: 0.1)]


def of(model: Path) -> Baseline:
    return Baseline(model, read_header(model))


def test_it_is_the_model_without_a_latent_for_the_time_that_the_model_took(tmp_path: Path) -> None:
    config = replace(CONFIG, max_time=60.0, strict=True)
    expected = replace(config, latents_dropout_prob=1.0, max_time=30.0, strict=False)
    assert of(train(tmp_path / "run", config)).config == expected


def test_it_is_trained_as_the_model_was_and_says_where_it_is_not(tmp_path: Path) -> None:
    """In the same time a machine learns more in other numbers, or with more threads."""
    timed = of(train(tmp_path / "run", replace(CONFIG, max_time=60.0)))
    own = timed.header.training
    assert (timed.precision, timed.threads) == ("float32", 1)
    assert timed.unlike(own) is None
    for key, value in (("precision", "bfloat16"), ("threads", 2), ("device", "cuda")):
        told = timed.unlike({**own, key: value})
        assert told is not None
        assert str(value) in told
        assert "the model was trained on cpu in float32 with threads: 1" in told
    assert of(train(tmp_path / "stepped")).unlike({**own, "threads": 2}) is None, "as many steps in any time"


@pytest.mark.parametrize("found", [None, "2", 0, -1, True, 2.0])
def test_what_a_header_does_not_say_is_left_open(model: Path, found: object) -> None:
    baseline = of(model)
    baseline.header.training.update({"threads": found, "precision": found})
    assert (baseline.precision, baseline.threads) == ("auto", None)


def test_no_more_threads_than_there_are_processors(model: Path) -> None:
    baseline = of(model)
    baseline.header.training["threads"] = 10**6
    assert baseline.threads == processors()


def test_it_begins_with_the_weights_that_the_seed_of_the_model_gives(model: Path) -> None:
    """Whatever was drawn before."""
    torch.manual_seed(1)
    with of(model).training(CPU, FLOAT32) as job:
        found = job.learner.model.state_dict()
    torch.manual_seed(CONFIG.seed)
    expected = GPTVAE.from_config(read_header(model).model).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_where_steps_ended_the_run_they_end_its_baseline(model: Path) -> None:
    """However slow the machine is by then; but the time is what counts where somebody ended the run before."""
    baseline = of(model)
    assert baseline.config == replace(CONFIG, latents_dropout_prob=1.0)
    log = model.parent / "metrics.jsonl"
    log.write_text(log.read_text().replace('"done": true', '"done": false'))
    assert of(model).config == replace(CONFIG, latents_dropout_prob=1.0, max_time=30.0)
    log.write_text(log.read_text().replace('"done": false', '"done": true'))
    assert not baseline.fits()
    assert learn(baseline)[-1] == 4
    found = read_header(baseline.path)
    assert baseline.path == model.parent / "baseline/model.safetensors"
    assert not found.has_latent
    assert found.model == read_header(model).model
    assert baseline.finished()


def go_on(model: Path, steps: int, *, until: int) -> None:
    """Resumes a run with another limit, and interrupts it after some step."""
    with claimed(model.parent, resume=True, force=False):
        job = run.resume(model.parent, {"steps": steps}, sources=[], device=CPU, precision=FLOAT32)
        list(job.run(should_stop=lambda: job.learner.counters.step >= until, seconds=lambda: 7.0))


@pytest.mark.parametrize(
    ("first", "then", "until", "steps", "seconds"),
    [(4, 1000, 6, 1000, 37.0), (4, 8, 8, 8, None), (100, 6, 6, 6, None)],
    ids=["interrupted", "longer", "shorter"],
)
def test_the_limits_of_a_resumed_run_are_those_of_its_baseline(
    model: Path, first: int, then: int, until: int, steps: int, seconds: float | None
) -> None:
    """Be its best model, which keeps those it was trained with, of an earlier session."""
    if first > 4:
        go_on(model, first, until=5)
    best = model.read_bytes()
    go_on(model, then, until=until)
    model.write_bytes(best)
    if first == 100:  # two sessions of 7 seconds
        assert load_state(model.parent / "state.safetensors").metadata["counters"]["seconds"] == 54.0
    assert of(model).config == replace(CONFIG, steps=steps, latents_dropout_prob=1.0, max_time=seconds)


def test_a_model_that_is_newer_than_its_state_says_how_long_it_learnt(model: Path) -> None:
    """Of a run that was killed: the first state is from before the first step."""
    path = model.parent / "state.safetensors"
    state = load_state(path)
    for counters, seconds in (({"seconds": 0.0, "start_up": 0.0}, 40.0), ({"seconds": 35.0, "start_up": 10.0}, 30.0)):
        save_state(path, state.tensors, state.metadata | {"counters": state.metadata["counters"] | counters})
        (model.parent / "metrics.jsonl").unlink(missing_ok=True)
        assert of(model).config.max_time == seconds


def test_one_that_was_interrupted_is_finished(model: Path) -> None:
    """It is then the one that nobody interrupted."""
    asked = count(1)
    assert learn(of(model), lambda: next(asked) == 2)[-1] == 2
    assert of(model).fits()
    assert not of(model).finished()
    assert learn(of(model))[-1] == 4
    assert of(model).finished()
    undisturbed = train(model.parent.parent / "other")
    learn(of(undisturbed))
    one, other = (load_state(path.parent / "baseline/state.safetensors").tensors for path in (model, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_of_another_run_is_replaced_and_what_is_not_ours_stays(model: Path) -> None:
    learn(of(model))
    (model.parent / "baseline/notes.txt").write_text("mine")
    train(model.parent, replace(CONFIG, steps=2))
    assert not of(model).fits()
    assert learn(of(model))[-1] == 2
    assert of(model).finished()
    assert (model.parent / "baseline/notes.txt").read_text() == "mine"


def test_one_that_was_interrupted_does_not_go_on_with_another_corpus(model: Path) -> None:
    """It shares the cache of its model, which may be trained anew while the baseline waits."""
    asked = count(1)
    learn(of(model), lambda: next(asked) == 2)
    (model.parent.parent / "other.txt").write_text("quite\nanother\nthing\n" * 20)
    with claimed(model.parent, resume=False, force=True):
        others = [str(model.parent.parent / "other.txt")]
        run.start(model.parent, others, DataConfig(), CONFIG, sizes=TINY, device=CPU, precision=FLOAT32)
    baseline = model.parent / "baseline"
    with claimed(baseline, resume=True, force=False), pytest.raises(CheckpointError, match="is of another corpus"):
        run.resume(baseline, {}, sources=[], device=CPU, precision=FLOAT32)


def test_without_a_state_the_time_is_that_of_the_configuration_or_of_the_header(model: Path) -> None:
    (model.parent / "state.safetensors").unlink()
    assert of(model).config.max_time is None
    (model.parent / "metrics.jsonl").unlink()
    assert of(model).config.max_time == 40.0
    timed = replace(read_header(model), training=read_header(model).training)
    timed.training["train"]["max_time"] = 50.0
    assert Baseline(model, timed).config.max_time == 50.0


STRANGE: list[object] = [None, True, 3, 1e999, "text", [], [1], {}, {"a": 1}, 10**400, -1.0]


@pytest.mark.parametrize("key", ["corpus", "train", "seconds", "counters", "counters.seconds", "log"])
def test_what_a_stranger_says_of_a_run_is_refused_or_taken(model: Path, key: str) -> None:
    """With words for people, whatever it is: headers are read before anything is known of who wrote them."""
    header, state = read_header(model), load_state(model.parent / "state.safetensors")
    (model.parent / "metrics.jsonl").unlink()
    for value in STRANGE:
        training, metadata = dict(header.training), dict(state.metadata)
        if key == "log":
            (model.parent / "metrics.jsonl").write_text(json.dumps(value) + ' "done": true \xff')
        elif key.startswith("counters"):
            counters = dict(metadata["counters"])
            metadata["counters"] = {**counters, "seconds": value} if key.endswith("seconds") else value
            save_state(model.parent / "state.safetensors", state.tensors, metadata)
        else:
            training[key] = value
        try:
            Baseline(model, replace(header, training=training)).fits()
        except CheckpointError as error:
            assert error.hint or key != "seconds"


def test_it_needs_the_corpus_of_the_model(model: Path, tmp_path: Path) -> None:
    alone = shutil.copy(model, tmp_path / "alone.safetensors")
    with pytest.raises(CheckpointError, match="cache is not there") as caught:
        of(Path(alone))
    assert "--baseline" in str(caught.value.hint)
    facts = model.parent / "cache/corpus.json"
    content = json.loads(facts.read_text())
    content["facts"]["digest"] = "0"
    facts.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not the corpus"):
        of(model)


def test_two_do_not_train_it_at_once(model: Path) -> None:
    """And the one that comes too late leaves the other's corpus where it is."""
    with of(model).training(CPU, FLOAT32):
        with pytest.raises(BusyError), of(model).training(CPU, FLOAT32):
            pass
        assert (model.parent / "baseline/cache/corpus.json").exists()


def test_a_link_in_its_place_is_refused(model: Path, tmp_path: Path) -> None:
    """It may lead a stranger's model to a folder of the user's."""
    (tmp_path / "elsewhere").mkdir()
    (model.parent / "baseline").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="baseline is a link"), of(model).training(CPU, FLOAT32):
        raise AssertionError
    assert not list((tmp_path / "elsewhere").iterdir())


def test_one_whose_states_are_damaged_is_trained_anew(model: Path) -> None:
    asked = count(1)
    learn(of(model), lambda: next(asked) == 2)
    for state in (model.parent / "baseline").glob("state*.safetensors"):
        state.write_bytes(b"damaged")
    assert of(model).fits()
    assert learn(of(model))[-1] == 4
    assert of(model).finished()
    assert (model.parent / "cache/corpus.json").exists()
