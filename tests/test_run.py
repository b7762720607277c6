"""A run folder: who may train in it, what ends up in it, what is replaced and when, and how a run goes on."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptvae_cli import __version__
from gptvae_cli.checkpoint import load, load_state, save_state
from gptvae_cli.config import DataConfig, ModelConfig, PresetName, SizeConfig, TrainConfig, Unit
from gptvae_cli.constraint import Constraint
from gptvae_cli.corpus import Corpus
from gptvae_cli.device import Device, Precision
from gptvae_cli.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ExitCode,
    GPTVAEError,
)
from gptvae_cli.evaluation import Figures, measure, reconstruct
from gptvae_cli.files import sync
from gptvae_cli.folder import claimed
from gptvae_cli.header import read_header
from gptvae_cli.model import GPTVAE
from gptvae_cli.run import Job, resume, start
from gptvae_cli.tokenizer import Tokenizer
from tests.conftest import LINES

CPU = Device(torch.device("cpu"), "asked for")
FLOAT32 = Precision(torch.float32, "exact")
TINY: dict[str, Any] = {"dim": 32, "depth": 1, "enc_depth": 1, "heads": 2, "attn_dim_head": 16, "dim_latent": 8}
CORPUS_FILES = {"corpus.json", "tokenizer.json", "train.tokens", "train.offsets", "valid.tokens", "valid.offsets"}
FIGURES = Figures(
    texts=100,
    tokens=1000,
    cross_entropy=20.0,
    cross_entropy_shuffled=25.0,
    cross_entropy_without=24.5,
    kl=5.0,
    mutual_information=3.2,
    active_001=8,
    active_02=4,
    entropy=math.log(100),
)

pytestmark = pytest.mark.usefixtures("one_thread")


def begin(
    folder: Path,
    sources: list[str],
    *,
    data: dict[str, Any] | None = None,
    shape: dict[str, Any] | None = None,
    preset: PresetName = "nano",
    **train: Any,
) -> Job:
    return start(
        folder,
        sources,
        DataConfig(**{"tokenizer": "bytes", **(data or {})}),
        TrainConfig(**{"max_time": None, "batch_tokens": 256, "steps": 10, **train}),
        sizes=SizeConfig(preset=preset, **(TINY if shape is None else shape)),
        device=CPU,
        precision=FLOAT32,
    )


def go_on(folder: Path, sources: list[str] | None = None, **limits: Any) -> Job:
    return resume(folder, limits, sources=sources or [], device=CPU, precision=FLOAT32)


def finish(job: Job, until: int | None = None) -> Job:
    """Runs a job to its end, or until it has taken this many steps."""
    step = job.learner.counters
    for _ in job.run(should_stop=lambda: until is not None and step.step >= until, seconds=lambda: 1.0):
        pass
    return job


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state_of(folder: Path) -> dict[str, Tensor]:
    return load_state(folder / "state.safetensors").tensors


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Figures]], None]:
    """Sets what the validations of a run find, one after the other."""

    def set_figures(figures: list[Figures]) -> None:
        monkeypatch.setattr("gptvae_cli.training.measure", lambda *args, **kwargs: figures.pop(0))

    return set_figures


# The sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "speed", "name", "why"),
    [
        ({"max_time": 600.0}, 20_000.0, "small", "there is time for it"),
        ({"max_time": 600.0}, 4_000.0, "micro", "less than 5 million tokens"),
        ({"max_time": 600.0, "steps": 1000, "batch_tokens": 512}, None, "micro", "less than 5 million tokens"),
        ({"max_time": 30.0}, None, "micro", "less than 5 million tokens"),
        ({"steps": 1000, "batch_tokens": 8192}, None, "small", "there is time for it"),
        ({"epochs": 2.0}, None, "micro", "less than 5 million tokens"),
        ({"epochs": 4000.0}, None, "small", "there is time for it"),
    ],
    ids=["fast", "slow", "few-steps", "seconds", "large-batches", "epochs", "many-epochs"],
)
def test_the_sizes_fit_what_the_machine_can_do_in_the_time(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    corpus: str,
    limits: dict[str, Any],
    speed: float | None,
    name: str,
    why: str,
) -> None:
    """A speed of None is one that need not be measured."""
    asked = []

    def measured(*args: object) -> float:
        asked.append(args)
        return speed or math.nan

    monkeypatch.setattr("gptvae_cli.sizing.tokens_per_second", measured)
    job = begin(folder, [corpus], shape={}, preset="auto", **{"steps": None, **limits})
    assert job.model_config.preset == name
    assert any(f"model: {name}" in note and why in note for note in job.notes)
    assert len(asked) == (speed is not None)


def test_measuring_the_speed_leaves_no_trace_in_the_run(tmp_path: Path, corpus: str) -> None:
    presets: tuple[PresetName, ...] = ("auto", "micro")
    fitted, named = (
        begin(tmp_path / preset, [corpus], preset=preset, steps=None, max_time=600.0) for preset in presets
    )
    theirs = named.learner.tensors()
    for key, tensor in fitted.learner.tensors().items():
        assert torch.equal(tensor, theirs[key]), key


# The folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_run_at_a_time(folder: Path) -> None:
    """The lock goes with the process that holds it, however that ends: no file of it can be left behind."""
    with claimed(folder, resume=False, force=False):
        with (
            pytest.raises(BusyError, match="in use by another training run") as caught,
            claimed(folder, resume=False, force=True),
        ):
            raise AssertionError("two runs in one folder")
        assert caught.value.exit_code == ExitCode.BUSY
        assert names(folder) == set()
    with claimed(folder, resume=False, force=False):
        pass


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "metrics.jsonl"])
def test_an_existing_run_is_not_touched_unless_told(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"precious")
    with pytest.raises(ConfigError, match="holds a run already") as caught, claimed(folder, resume=False, force=False):
        raise AssertionError
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--resume" in str(caught.value.hint)
    assert "--force" in str(caught.value.hint)
    with claimed(folder, resume=False, force=True):
        assert (folder / name).read_bytes() == b"precious", "only a new run replaces it"


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl"])
@pytest.mark.parametrize("force", [False, True])
def test_files_of_another_program_are_left_alone(folder: Path, name: str, force: bool) -> None:
    """The download of a model has the names that a run's files have."""
    if name == "metrics.jsonl":
        (folder / name).write_text('{"loss": 1.5, "epoch": 3}\n')
    else:
        save_file({"w": torch.zeros(2)}, folder / name, {"format": "pt"})
    before = contents(folder)
    with pytest.raises(ConfigError, match=f"{name} is in the way"), claimed(folder, resume=False, force=force):
        raise AssertionError
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["cache", "cache.part"])
@pytest.mark.parametrize("force", [False, True])
def test_a_cache_of_the_users_own_is_left_alone(folder: Path, force: bool, name: str) -> None:
    """`--out .` in a project that keeps something else in a folder of that name."""
    (folder / name).mkdir()
    (folder / name / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.txt is in the way"), claimed(folder, resume=False, force=force):
        raise AssertionError
    assert (folder / name / "thesis.txt").exists()
    shutil.rmtree(folder / name)
    (folder / name).write_text("a file")
    with pytest.raises(ConfigError, match="in the way"), claimed(folder, resume=False, force=force):
        raise AssertionError


@pytest.mark.parametrize("name", [".DS_Store", "._train.tokens"])
def test_what_macos_leaves_in_a_cache_is_not_in_the_way(folder: Path, corpus: str, name: str) -> None:
    """One look at the folder in the Finder would keep `--force` from ever replacing the run."""
    begin(folder, [corpus])
    (folder / "cache" / name).touch()
    with claimed(folder, resume=False, force=True):
        Path(corpus).write_text("another\n" * 9 + "one\n" * 9)
        begin(folder, [corpus])
    assert name not in names(folder / "cache")


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.prev.safetensors", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["device", "folder", "loop"])
def test_what_is_no_file_of_a_run_is_left_alone(folder: Path, name: str, kind: str) -> None:
    """Above all a device, which root would remove."""
    path = folder / name
    if kind == "folder":
        path.mkdir()
        (path / "thesis.txt").touch()
    else:
        path.symlink_to(os.devnull if kind == "device" else path)
    for flags in ({}, {"force": True}, {"resume": True}):
        with pytest.raises(GPTVAEError), claimed(folder, **{"resume": False, "force": False, **flags}):
            raise AssertionError
    with pytest.raises(ConfigError, match="in the way"), claimed(folder, resume=False, force=True):
        raise AssertionError
    assert path.is_symlink() or names(path) == {"thesis.txt"}
    assert Path(os.devnull).is_char_device()


def test_links_in_a_run_folder_outlive_the_run(folder: Path, corpus: str, tmp_path: Path) -> None:
    """Somebody keeps what is big on another disk: a new run goes there too, and the old one is gone from there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    linked = ("model.safetensors", "state.safetensors", "metrics.jsonl")
    for name in linked:
        (folder / name).symlink_to(disk / name)
    for steps in (3, 2):
        with claimed(folder, resume=False, force=True):
            finish(begin(folder, [corpus], steps=steps))
        assert all((folder / name).is_symlink() for name in linked)
        assert names(disk) == {*linked, "state.prev.safetensors"}
    assert load_state(folder / "state.safetensors").metadata["counters"]["step"] == 2
    assert load_state(disk / "state.prev.safetensors").metadata["counters"]["step"] == 0, "not one of the old run"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.prev.safetensors", "metrics.jsonl", "tokenizer.json", "README.md"]
)
@pytest.mark.parametrize("there", [True, False], ids=["there", "dangling"])
def test_a_stranger_s_run_folder_leads_to_no_file_of_ours(
    folder: Path, corpus: str, tmp_path: Path, name: str, there: bool
) -> None:
    """A download may hold links, as to `~/.bashrc`."""
    finish(begin(folder, [corpus]))
    private = tmp_path / ".bashrc"
    if there:
        private.write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    for flags in ({"force": True}, {"resume": True}):
        with (
            pytest.raises(ConfigError, match=f"{name} is in the way"),
            claimed(folder, **{"resume": False, "force": False, **flags}),
        ):
            raise AssertionError
    assert private.exists() == there
    assert not there or private.read_text() == "mine"


def test_a_linked_cache_is_refused_and_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (folder / "cache").symlink_to(tmp_path / "disk")
    with pytest.raises(ConfigError, match="cache is in the way"), claimed(folder, resume=False, force=True):
        raise AssertionError
    assert (folder / "cache").is_symlink()


def test_a_run_in_the_place_of_a_baseline_has_a_cache_of_its_own(folder: Path, corpus: str) -> None:
    """That of a baseline is a link to the cache of its model, which stays."""
    begin(folder, [corpus])
    place = folder / "baseline"
    place.mkdir()
    (place / "cache").symlink_to(Path("..", "cache"))
    Path(corpus).write_text("another\ncorpus\nof\nwords\n")
    with claimed(place, resume=False, force=True):
        begin(place, [corpus])
    assert not (place / "cache").is_symlink()
    assert names(folder / "cache") == names(place / "cache")
    assert (folder / "cache/corpus.json").read_bytes() != (place / "cache/corpus.json").read_bytes()


def test_what_a_killed_run_left_unfinished_is_removed(folder: Path) -> None:
    for name in (".model.safetensors.x.tmp", ".state.safetensors.x.tmp", ".metrics.jsonl.x.tmp", "cache.part"):
        (folder / name).mkdir()
        (folder / name / "train.tokens").touch()
    (folder / "mine.tmp").touch()
    with claimed(folder, resume=False, force=False):
        assert names(folder) == {"mine.tmp"}


def test_a_folder_that_cannot_be_locked_is_not_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems know no locks."""

    def fail(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with (
        pytest.raises(GPTVAEError, match=r"cannot lock .*: No locks available"),
        claimed(folder, resume=False, force=False),
    ):
        raise AssertionError


def test_resuming_needs_a_state(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"a model alone")
    with pytest.raises(CheckpointError, match="no run to resume") as caught, claimed(folder, resume=True, force=False):
        raise AssertionError
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path, folder: Path) -> None:
    for new in (tmp_path / "new", tmp_path / "deep" / "er"):
        with pytest.raises(CheckpointError), claimed(new, resume=True, force=False):
            raise AssertionError
        assert not new.exists()
    with claimed(folder, resume=False, force=False):
        pass
    assert folder.exists(), "it was there before"


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(GPTVAEError, match=r"cannot make the run folder .*file/run") as caught,
        claimed(tmp_path / "file" / "run", resume=False, force=False),
    ):
        raise AssertionError
    assert caught.value.exit_code == ExitCode.FAILURE
    assert "--out" in str(caught.value.hint)


def test_a_folder_that_cannot_be_written_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs this: root may write whatever the mode says."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(GPTVAEError, match="it is not writable"), claimed(folder, resume=False, force=False):
        raise AssertionError


# A new run ------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_model_a_state_a_log_and_a_cache(folder: Path, corpus: str) -> None:
    job = finish(begin(folder, [corpus]))
    states = {"state.safetensors", "state.prev.safetensors"}
    companions = {"config.json", "tokenizer.json", "README.md"}
    assert names(folder) == {"model.safetensors", "metrics.jsonl", "cache"} | states | companions
    assert names(folder / "cache") == CORPUS_FILES
    saved = load(folder / "model.safetensors", device=torch.device("cpu"))
    assert saved.header.model == job.model_config
    assert saved.header.data == job.data
    assert saved.tokenizer.to_json() == job.corpus.tokenizer.to_json()
    assert measure(saved.model, [*_held_out(job)], seed=0) == job.figures


def _held_out(job: Job) -> list[Any]:
    from gptvae_cli.data import fixed_batches

    return fixed_batches(job.valid, job.learner.config.batch_tokens, 1000)


def test_the_model_file_says_how_it_was_trained(folder: Path, corpus: str) -> None:
    job = finish(begin(folder, [corpus], seed=5))
    training = read_header(folder / "model.safetensors").training
    assert job.figures is not None
    assert training["train"] == asdict(job.learner.config)
    assert training["train"]["seed"] == 5
    assert training["gptvae"] == __version__
    assert training["corpus"]["digest"] == job.corpus.facts.digest
    assert training["validation"] == asdict(job.figures)
    assert (training["device"], training["precision"]) == ("cpu", "float32")
    seen = sum(len(line) + 1 for line in LINES) * training["epochs"]
    assert training["tokens_seen"] == pytest.approx(seen, rel=0.1)
    assert 1 <= training["steps"] <= 10


def test_metrics_are_one_json_object_a_line(folder: Path, corpus: str) -> None:
    """Strict JSON: other readers do not know NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    finish(begin(folder, [corpus], steps=20))
    text = (folder / "metrics.jsonl").read_text()
    entries = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert text.endswith("\n")
    assert [entry["step"] for entry in entries] == [1, *range(2, 21, 2)], "every validation is there"
    assert [entry["done"] for entry in entries] == [False] * 10 + [True]
    for entry in entries:
        figures = entry["figures"]
        assert figures["nll_bound"] == figures["cross_entropy"] + figures["kl"]
        assert {"time", "cross_entropy_per_token", "kl", "beta", "learning_rate", "seconds"} <= entry.keys()


def test_the_log_has_a_line_for_every_few_seconds_too(
    folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 0.0)
    monkeypatch.setattr("gptvae_cli.run.METRICS_SECONDS", 0.0)
    finish(begin(folder, [corpus], steps=20))
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    assert [entry["step"] for entry in entries if "figures" in entry] == [1, *range(2, 21, 2)]


def test_a_state_is_saved_every_minute_and_not_after_every_step(
    folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("gptvae_cli.training.REPORT_SECONDS", 0.0)
    job = begin(folder, [corpus], steps=12)
    saved: list[int] = []

    def save_state() -> None:
        saved.append(job.learner.counters.step)
        Job.save_state(job)

    monkeypatch.setattr(job, "save_state", save_state)
    monkeypatch.setattr("gptvae_cli.run.time.monotonic", lambda: now)
    for _ in job.run(should_stop=lambda: False, seconds=lambda: 1.0):
        now += 25.0
    assert saved == [4, 7, 10, 12]


def test_the_padding_of_the_batches_is_told_in_percent(folder: Path, corpus: str) -> None:
    """Of two texts of 9 and 29 tokens, with their specials 11 and 31, the first is padded by 20."""
    Path(corpus).write_text("".join(f"{i:09}\n" if i % 2 else f"{i:029}\n" for i in range(2000)))
    job = begin(folder, [corpus], batch_tokens=10**7, shape={**TINY, "max_seq_len": 40})
    lengths = np.array([2 + length for part in job.corpus.train.lengths() for length in part])
    share = 1 - lengths.sum() / (len(lengths) * 31)
    assert 0.2 < share < 0.4
    assert any(f", {100 * share:.1f} % padding" in note for note in job.notes)


def test_what_was_decided_is_told_with_its_reason(folder: Path, corpus: str, tmp_path: Path) -> None:
    Path(corpus).write_text("\n".join([*LINES, "", "x" * 50]))
    job = begin(folder, [corpus], shape={**TINY, "max_seq_len": 40})
    text = "\n".join(job.notes)
    assert "corpus: 121 texts" in text
    assert "1 empty one dropped" in text
    assert f"{len(job.corpus.train)} to train on, {len(job.corpus.valid)} held out" in text
    assert "tokenizer: bytes, 259 tokens (asked for)" in text
    assert f"{sum(p.numel() for p in job.learner.model.parameters()):,} parameters" in text
    assert "encoder 1 and decoder 1 layers of 32, latent 8, up to 40 tokens" in text
    assert "% padding" in text
    assert "device: cpu (asked for), float32 (exact)" in text
    assert "1 text is longer than the model and is cut" in text


def test_sizes_come_from_the_preset_unless_given(folder: Path, corpus: str) -> None:
    model = begin(folder, [corpus], shape={}, preset="nano").model_config
    assert (model.dim, model.depth, model.enc_depth, model.heads, model.dim_latent) == (64, 3, 2, 2, 32)
    assert model.max_seq_len == 24, "the longest of these texts takes 18 tokens"
    other = begin(folder, [corpus], shape={"depth": 1, "dim_latent": 5, "max_seq_len": 77}).model_config
    assert (other.dim, other.depth, other.dim_latent, other.max_seq_len) == (64, 1, 5, 77)
    auto = begin(folder, [corpus], shape={}, preset="auto", max_time=30.0, steps=None)
    assert auto.model_config.dim == 128
    assert any("model: micro (small would learn from less" in note for note in auto.notes)


@pytest.mark.parametrize(("odd", "length", "cut"), [(35, 40, 0), (40, 48, 0), (41, 48, 0), (300, 48, 1)])
def test_the_longest_text_fits_unless_it_is_a_giant(folder: Path, corpus: str, odd: int, length: int, cut: int) -> None:
    """It may be twice as long as all but a thousandth of the texts are."""
    Path(corpus).write_text("\n".join([*[f"{number:020}" for number in range(3000)], "a" * odd]))
    job = begin(folder, [corpus], shape={}, preset="nano", data={"valid": "0.0004"})
    assert job.model_config.max_seq_len == length
    assert job.rows.count_cut() + job.valid.count_cut() == cut


def test_the_longer_of_texts_and_sources_sets_the_length(folder: Path, corpus: str, tmp_path: Path) -> None:
    """Commands are shorter than their descriptions, which the encoder must be able to read."""
    sources = tmp_path / "sources.txt"
    sources.write_text("\n".join(line * 3 for line in LINES))
    job = begin(folder, [corpus], data={"latents_from": str(sources)})
    assert job.model_config.max_seq_len == 56
    assert job.rows.count_cut() == 0
    assert not any("cut" in note for note in job.notes)


def test_initial_weights_are_a_function_of_the_seed(folder: Path, corpus: str) -> None:
    weights = [begin(folder, [corpus], seed=seed).learner.model.decoder.token_emb.emb.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_lines_are_reconstructed_without_line_breaks(
    folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, unit: Unit
) -> None:
    if unit == "paragraph":
        Path(corpus).write_text("\n\n".join(LINES))
    allowed: list[bool] = []

    def record(*arguments: Any, constraint: Constraint) -> list[list[int]]:
        allowed.extend(constraint.allowed_SV[0, [*b"\n\r"]])
        return reconstruct(*arguments, constraint=constraint)

    monkeypatch.setattr("gptvae_cli.run.reconstruct", record)
    assert begin(folder, [corpus], data={"unit": unit}).reconstructions(1)
    assert allowed == 2 * [unit != "line"]


def test_reconstructions_are_of_held_out_texts_in_turn(folder: Path, corpus: str) -> None:
    job = begin(folder, [corpus], data={"valid": "0.1"})
    held_out = [text for text, _ in job.reconstructions(1000)]
    assert len(held_out) == len(job.corpus.valid) > 3
    assert set(held_out) < set(LINES)
    half = len(held_out) // 2
    assert [text for text, _ in job.reconstructions(2, start=1)] == [held_out[1], held_out[half + 1]]
    assert [text for text, _ in job.reconstructions(1, start=len(held_out) - 1)] == [held_out[-1]]
    assert [text for text, _ in job.reconstructions(1, start=len(held_out))] == [held_out[0]]


def test_a_window_run_trains_and_goes_on(folder: Path, corpus: str) -> None:
    options: dict[str, Any] = {"data": {"unit": "window"}, "shape": {**TINY, "max_seq_len": 32}}
    undisturbed = finish(begin(folder, [corpus], **options))
    finish(begin(folder, [corpus], **options), until=4)
    found = finish(go_on(folder)).learner.tensors()
    for name, tensor in undisturbed.learner.tensors().items():
        assert torch.equal(found[name], tensor), name
    assert undisturbed.model_config.max_seq_len == 32
    tokens = undisturbed.corpus.train.count, undisturbed.corpus.valid.count
    assert f"; {tokens[0]:,} tokens to train on, {tokens[1]:,} tokens held out" in undisturbed.notes[0]


# Replacing a run ------------------------------------------------------------------------------------------------------


def test_a_new_run_removes_only_what_gptvae_made(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus]), until=3)
    finish(go_on(folder))
    assert "state.prev.safetensors" in names(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "old").mkdir()
    (folder / "old" / "model.safetensors").write_text("mine too")
    begin(folder, [corpus])
    model = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert names(folder) == {"cache", "state.safetensors", "notes.txt", "old", *model}
    assert load_state(folder / "state.safetensors").metadata["counters"]["step"] == 0
    assert (folder / "old" / "model.safetensors").read_text() == "mine too"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sources": ["nowhere.txt"]}, DataError),
        ({"text": b"one\n"}, DataError),
        ({"text": b"\xff\xfe broken\n" * 9}, DataError),
        ({"data": {"latents_from": "nowhere.txt"}}, DataError),
        ({"data": {"valid": "nowhere.txt"}}, DataError),
        ({"data": {"tokenizer": "nowhere.json"}}, DataError),
        ({"shape": {"dim": 0}}, ConfigError),
        ({"shape": {"heads": 1, "dim": 48, "attn_dim_head": 16}}, ConfigError),
        ({"shape": {"heads": 1, "dim": 30}}, ConfigError),
    ],
    ids=["missing", "one-text", "not-utf8", "no-sources", "no-valid", "no-tokenizer", "dim", "heads", "width"],
)
def test_what_cannot_start_loses_nothing(
    folder: Path, corpus: str, change: dict[str, Any], error: type[GPTVAEError]
) -> None:
    """Neither a file of the run that was to be replaced, nor anything left behind."""
    finish(begin(folder, [corpus]))
    before = contents(folder)
    change = dict(change)
    if "text" in change:
        Path(corpus).write_bytes(change.pop("text"))
    with pytest.raises(error):
        begin(folder, change.pop("sources", [corpus]), **change)
    assert contents(folder) == before


def test_one_head_is_as_wide_as_the_model(folder: Path, corpus: str) -> None:
    job = begin(folder, [corpus], shape={"heads": 1, "dim": 48, "depth": 1, "enc_depth": 1})
    assert (job.model_config.heads, job.model_config.attn_dim_head) == (1, 48)


def test_a_validation_file_that_is_not_there_is_told_before_the_corpus_is_read(
    folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptvae_cli.ingest.read_texts", None)
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        begin(folder, [corpus], data={"valid": "nowhere.txt"})


def test_the_tokens_of_the_same_corpus_are_used_again(folder: Path, corpus: str) -> None:
    """By a run that replaces one, and by one whose first start was interrupted; its weights are those of a new one."""
    first = finish(begin(folder, [corpus]))
    expected, before = first.learner.tensors(), (folder / "cache" / "corpus.json").stat()
    for leftover in (["model.safetensors", "state.safetensors", "metrics.jsonl"], []):
        for name in leftover:
            (folder / name).unlink()
        (folder / "cache.part").mkdir(exist_ok=True)
        (folder / "cache.part" / "train.tokens").write_bytes(b"half")
        with claimed(folder, resume=False, force=True):
            job = finish(begin(folder, [corpus]))
        assert "cache.part" not in names(folder)
        assert any("were not made again" in note for note in job.notes)
        assert (folder / "cache" / "corpus.json").stat().st_mtime_ns == before.st_mtime_ns
        assert job.corpus.facts == first.corpus.facts
        assert all(torch.equal(tensor, expected[name]) for name, tensor in job.learner.tensors().items())
    assert not any("were not made again" in note for note in first.notes)


def test_a_model_that_is_replaced_serves_until_there_is_another(folder: Path, corpus: str) -> None:
    """Others encode with it all the while, and it is all there is if the new run fails."""
    finish(begin(folder, [corpus]))
    kept = ("model.safetensors", "config.json", "tokenizer.json", "README.md")
    before = {name: (folder / name).read_bytes() for name in kept}
    with claimed(folder, resume=False, force=True):
        job = begin(folder, [corpus], shape={**TINY, "dim_latent": 3})
    assert {name: (folder / name).read_bytes() for name in kept} == before
    assert not (folder / "metrics.jsonl").exists()
    assert not any("stays as it is" in note for note in job.notes)
    finish(job, until=1)
    again = load(folder / "model.safetensors", device=CPU.device)
    assert (again.header.training["steps"], again.header.model.dim_latent) == (1, 3)
    assert all((folder / name).read_bytes() != before[name] for name in kept if name != "tokenizer.json")
    finish(go_on(folder))


def test_the_tokens_of_another_corpus_go(folder: Path, corpus: str) -> None:
    """Also those that no file of the new ones replaces."""
    sources = Path(corpus).with_name("sources.txt")
    sources.write_text("\n".join(LINES))
    begin(folder, [corpus], data={"latents_from": str(sources)})
    Path(corpus).write_text("\n".join(LINES[::-1]))
    job = begin(folder, [corpus])
    assert names(folder / "cache") == CORPUS_FILES
    assert not any("were not made again" in note for note in job.notes)
    assert job.corpus.facts.digest == json.loads((folder / "cache" / "corpus.json").read_text())["facts"]["digest"]


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"accumulate": 1}, {"accumulate": 2}, {"latents_dropout_prob": 1.0}], ids=["plain", "parts", "baseline"]
)
def test_a_run_that_goes_on_from_its_files_ends_as_one_that_was_not_interrupted(
    folder: Path, tmp_path: Path, corpus: str, options: dict[str, Any]
) -> None:
    """Of a baseline the optimizer has no moments but the decoder's."""
    other = tmp_path / "undisturbed"
    other.mkdir()
    options = {"word_dropout": 0.2, **options}
    finish(begin(other, [corpus], **options))
    finish(begin(folder, [corpus], **options), until=3)
    finish(go_on(folder), until=4)
    job = finish(go_on(folder))
    expected, found = state_of(other), state_of(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    model, undisturbed = (load(path / "model.safetensors", device=CPU.device).model for path in (folder, other))
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert job.learner.counters.step == 10
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 10


def test_a_resumed_job_knows_all_that_the_first_one_knew(folder: Path, corpus: str) -> None:
    first = finish(begin(folder, [corpus], seed=3, data={"unit": "line", "valid": "0.1"}), until=4)
    again = go_on(folder)
    assert again.model_config == first.model_config
    assert again.data == first.data
    assert again.learner.config == first.learner.config
    assert again.learner.counters == first.learner.counters
    assert again.corpus.facts == first.corpus.facts
    assert again.notes == ["resumed at step 4, after 1 s", "device: cpu (asked for), float32 (exact)"]


def test_a_run_that_goes_on_in_another_type_says_so(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus]), until=2)
    bfloat16 = Precision(torch.bfloat16, "asked for")
    notes = resume(folder, {}, sources=[], device=CPU, precision=bfloat16).notes
    assert notes[2] == "until here it computed in float32: its steps are not those of an undisturbed run"


@pytest.mark.parametrize("limits", [{"steps": 40}, {"epochs": 20.0}])
def test_a_treatment_stays_where_it_was_when_a_run_is_made_longer(
    folder: Path, corpus: str, limits: dict[str, Any]
) -> None:
    """Half of the way back to the beginning, whatever share of the run that now is."""
    job = finish(begin(folder, [corpus]), until=4)
    job.learner.counters.treated_at = 0.2
    job.save_state()
    done = {"steps": 4 / 40, "epochs": job.learner.counters.texts / len(job.rows) / 20}
    assert go_on(folder).learner.counters.treated_at == 0.2
    counters = go_on(folder, **{"steps": None, "epochs": None, "max_time": None} | limits).learner.counters
    assert counters.treated_at == pytest.approx(done[next(iter(limits))] / 2)


def test_a_model_says_that_its_run_was_treated(folder: Path, corpus: str) -> None:
    """Its configuration is that of the run, and not what was in force in the end."""
    job = begin(folder, [corpus], target_rate=0.0, steps=4)
    assert job.header().training["treatment"] is None
    job.learner.counters.treated_at = 0.25
    finish(job)
    said = load(folder / "model.safetensors", device=torch.device("cpu")).header.training["treatment"]
    assert "% of the run on: beta starts over from 0, the first 8 nats of KL are free" in said
    assert said in (folder / "README.md").read_text()


def test_a_treatment_is_not_over_when_a_run_is_made_shorter(folder: Path, corpus: str) -> None:
    """Of what was 0.65 of a hundred seconds, the last validation counted, nothing is after the end."""
    job = finish(begin(folder, [corpus], steps=None, max_time=100.0), until=4)
    counters = job.learner.counters
    counters.start_up, counters.seconds, counters.validation, counters.treated_at = 0.0, 50.0, 7.5, 0.65
    job.save_state()
    for max_time, treated_at in ((100.0, 0.65), (80.0, 0.65 * 100 / 80), (66.0, 65 / 66), (52.0, 1.0)):
        found = go_on(folder, steps=None, epochs=None, max_time=max_time).learner.counters
        assert found.treated_at == pytest.approx(treated_at)


def test_limits_may_change_when_a_run_goes_on(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus], steps=4))
    job = finish(go_on(folder, steps=6, strict=True))
    assert job.learner.counters.step == 6
    assert job.learner.config.strict
    assert finish(go_on(folder)).learner.counters.step == 6, "and are kept"
    assert finish(go_on(folder, steps=None, epochs=None, max_time=1e-3)).learner.counters.step == 6


def test_the_same_corpus_may_be_named_again_and_another_one_may_not(
    folder: Path, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(begin(folder, [corpus]), until=3)
    moved = tmp_path / "moved.txt"
    moved.write_bytes("\r\n".join(LINES).encode())
    go_on(folder, [str(moved)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(LINES).encode())))
    go_on(folder, ["-"])
    moved.write_text("\n".join(LINES[1:]))
    before = contents(folder)
    with pytest.raises(DataError, match=r"moved\.txt is not the corpus that .*run was trained on") as caught:
        go_on(folder, [str(moved)])
    assert "--out" in str(caught.value.hint)
    assert contents(folder) == before


def test_a_run_goes_on_without_its_corpus_but_not_without_its_cache(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus]), until=3)
    Path(corpus).unlink()
    go_on(folder)
    shutil.rmtree(folder / "cache")
    with pytest.raises(CheckpointError, match=r"token cache .* is missing, damaged or of another version"):
        go_on(folder)


@pytest.mark.parametrize("other", ["texts", "tokens"])
def test_a_run_does_not_go_on_with_the_cache_of_another(folder: Path, tmp_path: Path, corpus: str, other: str) -> None:
    """It is as whole as its own, and its numbers mean something else."""
    finish(begin(folder, [corpus]), until=3)
    lines, data = (
        (LINES[1:], DataConfig()) if other == "texts" else (LINES, DataConfig(tokenizer="bpe", vocab_size=300))
    )
    (tmp_path / "other.txt").write_text("\n".join(lines))
    shutil.rmtree(folder / "cache")
    Corpus.build([str(tmp_path / "other.txt")], data, folder / "cache")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"token cache .* is of another corpus than the run, or of other tokens"):
        go_on(folder)
    assert contents(folder) == before
    go_on(folder, [corpus])
    go_on(folder)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_lost_cache_is_made_again_where_the_corpus_is_named(folder: Path, corpus: str, damage: str) -> None:
    undisturbed = finish(begin(folder, [corpus]))
    finish(begin(folder, [corpus]), until=3)
    cache = contents(folder / "cache")
    if damage == "gone":
        shutil.rmtree(folder / "cache")
    else:
        (folder / "cache" / "train.tokens").write_bytes(b"")
    other = Path(corpus).with_name("other.txt")
    other.write_text("\n".join(LINES[1:]))
    with pytest.raises(DataError, match=r"other\.txt is not the corpus"):
        go_on(folder, [str(other)])
    assert not (folder / "cache.part").exists()
    found = finish(go_on(folder, [corpus])).learner.tensors()
    again = contents(folder / "cache")
    reasons = [json.loads(content.pop("corpus.json"))["facts"].pop("tokenizer_reason") for content in (cache, again)]
    assert again == cache
    assert reasons[1] == "that of the run"
    for name, tensor in undisturbed.learner.tensors().items():
        assert torch.equal(found[name], tensor), name


def test_a_lost_cache_of_a_pipe_is_made_again_of_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning is all that a tokenizer can learn from in a pipe; of a file it would learn other words."""
    for name in ("ingest.SAMPLE_CHARS", "corpus.SAMPLE_CHARS", "corpus._BEGINNING_CHARS"):
        monkeypatch.setattr(f"gptvae_cli.{name}", 2_000)
    text = "\n".join(f"{word} {i}" for word in ("antelope", "buffalo", "crocodile") for i in range(200))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    job = finish(begin(folder, ["-"], data={"tokenizer": "bpe"}), until=3)
    cache = contents(folder / "cache")
    shutil.rmtree(folder / "cache")
    (tmp_path / "file.txt").write_text(text)
    again = go_on(folder, [str(tmp_path / "file.txt")])
    assert again.corpus.tokenizer.to_json() == job.corpus.tokenizer.to_json()
    for name in ("train.tokens", "valid.tokens", "tokenizer.json"):
        assert contents(folder / "cache")[name] == cache[name], name
    finish(again)


def test_what_lies_in_a_lost_cache_and_is_not_ours_stays(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus]), until=3)
    (folder / "cache" / "corpus.json").unlink()
    (folder / "cache" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.txt is in the way"):
        go_on(folder, [corpus])
    assert (folder / "cache" / "thesis.txt").exists()


def test_a_damaged_state_gives_way_to_the_one_before_it(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus]), until=3)
    finish(go_on(folder), until=7)
    state = folder / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    job = go_on(folder)
    assert job.learner.counters.step == 3
    assert len(job.notes) == 3
    assert "state.prev.safetensors" in job.notes[2]
    (folder / "state.prev.safetensors").unlink()
    with pytest.raises(CheckpointError):
        go_on(folder)


@pytest.mark.parametrize("key", ["model", "data", "train", "tokenizer", "counters", "precision", "corpus"])
def test_a_state_that_says_too_little_is_refused(folder: Path, corpus: str, key: str) -> None:
    finish(begin(folder, [corpus]), until=3)
    state = load_state(folder / "state.safetensors")
    del state.metadata[key]
    save_state(folder / "state.safetensors", state.tensors, state.metadata)
    (folder / "state.prev.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"says too little about itself: '{key}'"):
        go_on(folder)


def assert_same_end(folder: Path, other: Path) -> None:
    """The very weights and moments, in the state and in the model. (The order of a header is safetensors' own.)"""
    for name in ("state.safetensors", "model.safetensors"):
        found, expected = load_file(folder / name), load_file(other / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


def test_a_run_goes_on_from_before_its_first_step(folder: Path, corpus: str, tmp_path: Path) -> None:
    """Reading the corpus may have taken hours, from a pipe."""
    other = tmp_path / "undisturbed"
    other.mkdir()
    finish(begin(other, [corpus]))
    begin(folder, [corpus])
    finish(go_on(folder))
    assert_same_end(folder, other)


def test_a_kill_at_any_moment_of_a_save_costs_nothing(
    folder: Path, tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after every call that the disk sees, the folder is as a SIGKILL would leave it: it is copied, and
    the run goes on from the copy to the very end of the run that was not killed."""
    monkeypatch.setattr("gptvae_cli.run.STATE_SECONDS", 0.0)
    moments: list[Path] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            keep()
            result = function(*args, **options)
            keep()
            return result

        return call

    def keep() -> None:
        if not moments or contents(folder) != contents(moments[-1]):
            moments.append(tmp_path / f"moment{len(moments)}")
            shutil.copytree(folder, moments[-1])

    job = begin(folder, [corpus], steps=3)
    with monkeypatch.context() as patch:
        patch.setattr("gptvae_cli.checkpoint.save_file", watched(save_file))
        patch.setattr("gptvae_cli.files.sync", watched(sync))
        patch.setattr(Path, "replace", watched(Path.replace))
        finish(job)
    torn = 0
    for moment in moments:
        torn += not (moment / "state.safetensors").exists()
        with claimed(moment, resume=True, force=False):
            finish(go_on(moment))
        assert not any(name.endswith(".tmp") for name in names(moment))
        assert_same_end(moment, folder)
        assert load(moment / "model.safetensors", device=CPU.device).header.training["steps"] == 3
        steps = [json.loads(line)["step"] for line in (moment / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]
    assert len(moments) > 15
    assert torn == 3, "between the two renames of each state"


def test_the_log_tells_every_step_once(folder: Path, corpus: str) -> None:
    """What was logged after the state was saved is logged again, and a line that was cut is no JSON."""
    finish(begin(folder, [corpus]), until=4)
    log = folder / "metrics.jsonl"
    good = log.read_text() + '{"mine": 1}\n'
    log.write_text(good + '{"step": 5}\n{"step": 9, "fig')
    job = go_on(folder)
    assert log.read_text() == good
    finish(job)
    logged = [json.loads(line).get("step") for line in log.read_text().splitlines()]
    assert sorted(step for step in logged if step is not None) == list(range(1, 11))


def test_a_run_starts_where_folders_cannot_be_synced(
    folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some network file systems. The files of its cache can be, and are."""
    sync, synced = os.fsync, []

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    begin(folder, [corpus])
    assert {path.stat().st_ino for path in (folder / "cache").iterdir()} <= set(synced)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no full device")
def test_a_full_disk_ends_a_run_in_one_line(folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/dev/full` fails as a full disk does. The state that was saved before is good."""
    job = begin(folder, [corpus])
    before = contents(folder)
    (folder / "metrics.jsonl").symlink_to("/dev/full")  # which a new command would refuse
    with pytest.raises(GPTVAEError, match=r"cannot write .*metrics\.jsonl: No space left on device") as caught:
        finish(job)
    assert caught.value.exit_code == ExitCode.FAILURE
    assert contents(folder)["state.safetensors"] == before["state.safetensors"]

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path(corpus).write_text("another\n" * 9)  # the tokens of the same one would be used again
    monkeypatch.setattr("gptvae_cli.run.Corpus.build", fail)
    with pytest.raises(GPTVAEError, match=r"cannot write .*cache\.part: No space left on device"):
        begin(folder, [corpus])
    assert contents(folder)["state.safetensors"] == before["state.safetensors"], "nor has a run to be replaced gone"


def edited(folder: Path, **changes: Any) -> None:
    """Gives a run one state alone, whose metadata are changed and signed again."""
    state = load_state(folder / "state.safetensors")
    save_state(folder / "state.safetensors", state.tensors, {**state.metadata, **changes})
    (folder / "state.prev.safetensors").unlink()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"counters": [1]}, "counters are"),
        ({"counters": {"step": 3, "stop": 1}}, "counters are"),
        ({"counters": {"step": -1}}, "counter step is -1"),
        ({"counters": {"step": 1.0}}, "counter step is 1.0"),
        ({"counters": {"step": 10**30}}, "counter step is 1000"),
        ({"counters": {"seconds": math.nan}}, "counter seconds is nan"),
        ({"train": 1}, "training configuration is not a JSON object"),
        ({"train": {"steps": "many"}}, "training configuration is wrong"),
        ({"data": {"unit": "word"}}, "data configuration is wrong"),
        ({"model": {}}, "model configuration is wrong"),
        ({"tokenizer": "{}"}, "the tokenizer is malformed"),
        ({"tokenizer": None}, "the tokenizer is malformed"),
        ({"tokenizer": Tokenizer.train_bpe(LINES, 280).to_json()}, "its tokenizer has"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_state_of_a_stranger_is_refused_in_one_line(
    folder: Path, corpus: str, changes: dict[str, Any], said: str
) -> None:
    finish(begin(folder, [corpus]), until=1)
    edited(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        go_on(folder)
    assert caught.value.message.startswith(f"cannot load {folder / 'state.safetensors'}: ")
    assert said in caught.value.message
    assert caught.value.message.isprintable()


def test_a_small_state_cannot_claim_a_huge_model(folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = finish(begin(folder, [corpus]), until=1)
    edited(folder, model=asdict(replace(job.model_config, dim=65536, heads=1024, attn_dim_head=1024)))
    build = GPTVAE.from_config

    def build_without_memory(config: ModelConfig) -> GPTVAE:
        assert torch.empty(0).is_meta
        return build(config)

    monkeypatch.setattr(GPTVAE, "from_config", build_without_memory)
    with pytest.raises(CheckpointError, match=r"the state's tensor .* is \[.*\], this run needs"):
        go_on(folder)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("weights.decoder.token_emb.emb.weight", lambda tensor: tensor.double(), "is of torch.float64"),
        ("weights.decoder.token_emb.emb.weight", lambda tensor: tensor[1:], "this run needs [259, 32]"),
        ("weights.decoder.token_emb.emb.weight", lambda tensor: tensor * math.nan, "holds NaN or infinity"),
        ("optimizer.exp_avg.decoder.token_emb.emb.weight", lambda tensor: tensor.long(), "is of torch.int64"),
        ("optimizer.step.decoder.token_emb.emb.weight", lambda tensor: None, "is missing"),
    ],
    ids=["type", "shape", "nan", "moment", "missing"],
)
def test_a_tensor_of_a_state_that_does_not_fit_is_named(
    folder: Path, corpus: str, name: str, change: Callable[[Tensor], Tensor | None], said: str
) -> None:
    finish(begin(folder, [corpus]), until=1)
    state = load_state(folder / "state.safetensors")
    changed = change(state.tensors.pop(name))
    tensors = state.tensors if changed is None else {**state.tensors, name: changed}
    save_state(folder / "state.safetensors", tensors, state.metadata)
    (folder / "state.prev.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        go_on(folder)
    assert name in caught.value.message
    assert said in caught.value.message


def test_an_interruption_before_the_first_validation_leaves_a_model_too(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus], steps=1000), until=1)
    assert {"model.safetensors", "state.safetensors"} <= names(folder)
    assert read_header(folder / "model.safetensors").training["validation"] is None


# The best model -------------------------------------------------------------------------------------------------------


def better(by: float, **changes: Any) -> Figures:
    return replace(FIGURES, cross_entropy=FIGURES.cross_entropy - by, **changes)


def test_the_model_file_holds_the_best_model_and_not_the_last(
    folder: Path, corpus: str, measured: Callable[[list[Figures]], None]
) -> None:
    """Its weights, and the figures that were measured with these weights."""
    figures = [better(9), better(8), better(7), FIGURES, better(1), better(3), better(2), better(1), FIGURES, FIGURES]
    measured(list(figures))
    job = begin(folder, [corpus], kl_warmup=0.4)
    kept: dict[int, Tensor] = {}
    files: dict[int, float] = {}
    for report in job.run(should_stop=lambda: False, seconds=lambda: 1.0):
        kept[report.step] = job.learner.model.decoder.token_emb.emb.weight.detach().clone()
        validation = read_header(folder / "model.safetensors").training["validation"]
        files[report.step] = validation["cross_entropy"]
    # Up to 40 % any model is better than none, then the best so far.
    found = [20 - files[step] for step in range(1, 11)]
    assert found == [9, 8, 7, 0, 1, 3, 3, 3, 3, 3]
    saved = load(folder / "model.safetensors", device=CPU.device)
    assert torch.equal(saved.model.decoder.token_emb.emb.weight, kept[6])
    assert (saved.header.training["steps"], saved.header.training["share_done"]) == (6, 0.6)
    assert not torch.equal(kept[6], kept[10])
    assert torch.equal(state_of(folder)["weights.decoder.token_emb.emb.weight"], kept[10]), "the state is the last step"
    job.load_best()
    assert torch.equal(job.learner.model.decoder.token_emb.emb.weight, kept[6])
    assert job.figures == better(3)


def test_a_collapsed_model_is_kept_only_until_there_is_another(
    folder: Path, corpus: str, measured: Callable[[list[Figures]], None]
) -> None:
    dead = better(15, mutual_information=0.5)
    measured([dead] * 6 + [FIGURES] + [dead] * 4)
    job = finish(begin(folder, [corpus], steps=20, kl_warmup=0.0, on_collapse="warn"))
    assert read_header(folder / "model.safetensors").training["steps"] == 12
    assert job.figures == FIGURES


def test_a_worse_model_of_a_resumed_run_does_not_replace_a_better_one(
    folder: Path, corpus: str, measured: Callable[[list[Figures]], None]
) -> None:
    measured([better(5), FIGURES, FIGURES, *[better(1)] * 7])
    finish(begin(folder, [corpus], kl_warmup=0.0), until=3)
    job = finish(go_on(folder))
    assert read_header(folder / "model.safetensors").training["steps"] == 1
    job.load_best()
    assert job.figures == better(5)


def test_a_diverged_run_keeps_the_good_state(folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptvae_cli.run.STATE_SECONDS", 0.0)
    job = begin(folder, [corpus], steps=20)
    with pytest.raises(DivergedError) as caught:
        for report in job.run(should_stop=lambda: False, seconds=lambda: 1.0):
            if report.step == 8:
                with torch.no_grad():
                    job.learner.named["decoder.token_emb.emb.weight"].fill_(math.nan)
    assert caught.value.exit_code == ExitCode.DIVERGED
    saved = state_of(folder)
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
    assert load_state(folder / "state.safetensors").metadata["counters"]["step"] == 8
    assert saved.keys() == job.learner.tensors().keys()
    load(folder / "model.safetensors", device=CPU.device)
    assert go_on(folder).learner.counters.step == 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_the_last_step_broke_is_not_saved(folder: Path, corpus: str, value: float) -> None:
    """No loss tells of it: there is no step after it that would have one."""
    job = begin(folder, [corpus], steps=2, accumulate=1)
    finish(job, until=1)
    before = contents(folder)
    with torch.no_grad():
        job.learner.named["decoder.token_emb.emb.weight"][3, 2] = value
    for save in (job.save_state, job.save_model):
        with pytest.raises(DivergedError, match=r"training diverged: .*token_emb.* is not finite at step 1"):
            save()
    assert contents(folder) == before


def test_figures_that_are_no_numbers_are_a_divergence(
    folder: Path, corpus: str, measured: Callable[[list[Figures]], None]
) -> None:
    """Weights may be finite where what they give is not; and the log would be no JSON."""
    measured([FIGURES, replace(FIGURES, kl=math.inf)])
    with pytest.raises(DivergedError, match="validation is not finite at step 2"):
        finish(begin(folder, [corpus]))
    assert read_header(folder / "model.safetensors").training["steps"] == 1


def test_a_users_tokenizer_stays_with_the_run(folder: Path, corpus: str, tmp_path: Path) -> None:
    """Its file may be gone when the run goes on."""
    path = tmp_path / "tokenizer.json"
    path.write_text(Tokenizer.train_bpe(LINES, 280).to_json())
    job = finish(begin(folder, [corpus], data={"tokenizer": str(path)}), until=2)
    path.unlink()
    again = go_on(folder)
    assert again.corpus.tokenizer.to_json() == job.corpus.tokenizer.to_json()
    assert any("read from" in note for note in job.notes)
