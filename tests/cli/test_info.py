"""`gptvae info`, which reads a header that may come from a stranger."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from gptvae_cli.checkpoint import load
from gptvae_cli.cli.app import app
from gptvae_cli.config import TrainConfig
from tests.cli.conftest import LONGEST, WIDTH, make_model
from tests.cli.test_train import assert_fails

UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

MakeForged = Callable[..., Path]


def info(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


def strict_json(text: str) -> Any:
    """As JSON is defined, without the infinities and NaN that Python reads as well."""

    def refuse(name: str) -> NoReturn:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def shown(result: Result) -> dict[str, str]:
    """What is shown to people, by name."""
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert all(line[8:10] == "  " for line in lines)
    return {line[:8].strip() or f"more {number}": line[10:] for number, line in enumerate(lines)}


@pytest.fixture
def forged(models: Path, tmp_path: Path) -> MakeForged:
    """Makes a model whose metadata are another's; None leaves an entry out."""

    def make(**changes: str | None) -> Path:
        with safe_open(models / "line.safetensors", framework="pt") as file:
            metadata = {**file.metadata(), **changes}
        path = tmp_path / "forged.safetensors"
        kept = {name: value for name, value in metadata.items() if value is not None}
        save_file(load_file(models / "line.safetensors"), path, kept)
        return path

    return make


def learnt(path: Path) -> int:
    """Parameters of a model, as torch counts them: buffers are none."""
    return sum(parameter.numel() for parameter in load(path, device=torch.device("cpu")).model.parameters())


TRAINING: dict[str, Any] = {
    "gptvae": "0.1.0",
    "train": {**asdict(TrainConfig(target_rate=16.0, seed=3, steps=7)), "max_time": None},
    "corpus": {"texts": 1200, "characters": 34567},
    "steps": 7,
    "epochs": 0.123456,
    "seconds": 61.4,
    "device": "cpu",
    "threads": 2,
    "precision": "float32",
    "validation": {
        "texts": 30,
        "tokens": 900,
        "cross_entropy": 21.549,
        "cross_entropy_shuffled": 37.8,
        "cross_entropy_without": 28.46,
        "kl": 7.887,
        "mutual_information": 6.04,
        "active_001": 8,
        "active_02": 5,
    },
    "verdict": "the latent carries 6.0 nats; it lowers the cross-entropy",
}


def test_an_empty_name_is_no_default(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """As of a variable that nobody set: another model than was meant would be shown."""
    monkeypatch.setenv("GPTVAE_MODEL", str(models / "line.safetensors"))
    assert info().exit_code == 0
    assert_fails(info(""), 2, "the name of the model is empty")


def test_people_see_what_a_model_is(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model.safetensors", unit="paragraph", **TRAINING)
    assert info(path).stdout.splitlines() == [
        f"model     {path}, {path.stat().st_size / 1e6:.1f} MB, by gptvae 0.1.0",
        f"size      {learnt(path):,} parameters, encoder of 1 and decoder of 2 layers, 32 wide",
        f"latent    {WIDTH} dimensions, conditioning token",
        f"texts     unit paragraph, up to {LONGEST} tokens; bytes",
        "corpus    1,200 texts, 34,567 characters",
        "training  7 steps, 0.123 epochs, 61 seconds, cpu, 2 thread(s), float32",
        "options   --unit paragraph --steps 7 --target-rate 16.0 --seed 3",
        "held out  30 texts, 900 tokens; in nats a text:",
        "          cross-entropy 21.55, 37.80 with another text's latent, 28.46 without one",
        "          KL 7.89, information 6.04, 8 dimensions active, 5 of them strongly",
        "verdict   the latent carries 6.0 nats;",
        "          it lowers the cross-entropy",
    ]
    treated = make_model(
        tmp_path / "treated.safetensors", treatment="from 7% of the run on: \x1b[31mbeta", verdict="dead"
    )
    assert info(treated).stdout.splitlines()[-2:] == [
        "treated   from 7% of the run on: \\x1b[31mbeta",
        "verdict   dead",
    ]


def test_on_a_terminal_words_are_whole_and_names_alone_at_the_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_model(tmp_path / f"{'long' * 20}.safetensors", **TRAINING)
    lines = info(path).stdout.splitlines()
    monkeypatch.setattr("gptvae_cli.cli.info.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    for width in (80, 40, 5):
        monkeypatch.setenv("COLUMNS", str(width))
        shown = info(path).stdout
        assert re.sub(r"\n {10}(?! )", " ", shown) == re.sub(r"\n {10}(?! )", " ", "\n".join(lines) + "\n")
        for line in shown.splitlines():
            assert len(line) <= width or " " not in line[10:].strip()


@pytest.mark.parametrize(("share", "shown_as"), [(0.431, ", 43% of the run"), (1.0, ""), ("all", "")])
def test_people_see_how_far_a_run_had_come(tmp_path: Path, share: object, shown_as: str) -> None:
    """One that was interrupted looks like any other otherwise."""
    path = make_model(tmp_path / "model.safetensors", **TRAINING, share_done=share)
    assert shown(info(path))["training"] == f"7 steps, 0.123 epochs, 61 seconds{shown_as}, cpu, 2 thread(s), float32"


def test_people_see_that_a_baseline_has_no_latent(tmp_path: Path) -> None:
    training = {**TRAINING, "train": asdict(TrainConfig(latents_dropout_prob=1.0))}
    found = info(make_model(tmp_path / "model.safetensors", **training)).stdout
    assert "\nlatent    none: the model is a baseline\n" in found
    assert "\noptions   --latents-dropout-prob 1.0\n" in found
    assert found.endswith("nats a text:\n          cross-entropy 28.46\n")
    assert "KL" not in found


def test_programs_see_the_same_as_json(models: Path, tmp_path: Path) -> None:
    path = models / "line.safetensors"
    found = strict_json(info(path, "--json").stdout)
    assert found["file"] == str(path)
    assert found["file_bytes"] == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert found["sha256"] == file.metadata()["sha256"]
    other = make_model(tmp_path / "other.safetensors", seed=1)
    assert strict_json(info(other, "--json").stdout)["sha256"] != found["sha256"]
    assert found["parameters"] == learnt(path)
    assert (found["model"]["dim_latent"], found["model"]["max_seq_len"]) == (WIDTH, LONGEST)
    assert found["tokenizer"] == {"kind": "bytes", "num_tokens": 259}
    assert found["data"]["unit"] == "line"
    assert found["training"] == {"steps": 7, "validation": {"kl": 1.5, "texts": 30}}
    assert found["has_latent"] is True


@pytest.mark.parametrize(
    ("training", "has_latent"),
    [
        ({"train": {"latents_dropout_prob": 1.0}}, False),
        ({"train": {"latents_dropout_prob": 0.99}}, True),
        ({"train": [1.0]}, True),
        ({"train": {"latents_dropout_prob": [1]}}, True),
    ],
    ids=["baseline", "hardly", "list", "nested"],
)
def test_a_baseline_is_said_to_have_no_latent(forged: MakeForged, training: dict[str, Any], has_latent: bool) -> None:
    path = forged(training=json.dumps(training))
    assert strict_json(info(path, "--json").stdout)["has_latent"] is has_latent
    assert shown(info(path))["latent"].startswith("none") is not has_latent


@pytest.mark.parametrize("value", [None, True, -1, 1e300, 10**400, -(10**400), "text", [], [1], {}, {"texts": []}])
def test_what_a_stranger_says_of_training_is_shown_or_left_out(forged: MakeForged, value: object) -> None:
    for name in (*TRAINING, "texts", "kl"):
        training = json.loads(json.dumps(TRAINING))
        for place in (training, training["corpus"], training["validation"]):
            if name in place:
                place[name] = value
        path = forged(training=json.dumps(training))
        assert shown(info(path))["model"].startswith(str(path)), name


def test_a_model_is_a_file_or_a_run_or_where_the_environment_says(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPTVAE_MODEL", raising=False)
    assert_fails(info(), 3, "no model in ./gptvae-run, the default place", "gptvae train")
    (tmp_path / "gptvae-run").mkdir()
    make_model(tmp_path / "gptvae-run" / "model.safetensors")
    assert "unit line" in shown(info())["texts"]
    monkeypatch.setenv("GPTVAE_MODEL", str(models / "window.safetensors"))
    assert "unit window" in shown(info())["texts"]
    for arguments in (["gptvae-run"], ["--model", "gptvae-run"]):
        assert "unit line" in shown(info(*arguments))["texts"]
    assert_fails(info("gptvae-run", "--model", "gptvae-run"), 2, "MODEL and --model were both given")
    monkeypatch.setenv("GPTVAE_MODEL", "nowhere")
    assert_fails(info(), 3, "no model in nowhere, named by $GPTVAE_MODEL")


HOSTILE = "[red]x[/b] \x1b]0;owned\x07\x1b[2J \x9b31m \u202e \r\nfile  fake \ud800 \x00"


def test_metadata_does_not_control_the_terminal(forged: MakeForged) -> None:
    """Markup is text, escapes are spelled out, and a line break makes no row of its own."""
    training = {HOSTILE: HOSTILE, "gptvae": HOSTILE, "device": HOSTILE, "train": {"seed": [HOSTILE, {"a": HOSTILE}]}}
    path = forged(training=json.dumps(training))
    result = info(path)
    assert result.exit_code == 0, result.stderr
    assert not UNPRINTABLE.search(result.stdout)
    assert "[red]x[/b] \\x1b]0;owned" in result.stdout
    assert shown(result)["model"].startswith(str(path))
    assert strict_json(info(path, "--json").stdout)["training"] == training
    assert not UNPRINTABLE.search(info(path, "--json").stdout)


def test_the_name_of_a_file_does_not_control_the_terminal(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "[red]\x1b]0;owned\x07\udcff.safetensors"
    path.write_bytes((models / "line.safetensors").read_bytes())
    result = info(path)
    assert result.exit_code == 0, result.stderr
    assert not UNPRINTABLE.search(result.stdout)
    assert "[red]\\x1b]0;owned\\x07\\udcff.safetensors" in result.stdout
    assert strict_json(info(path, "--json").stdout)["file"] == str(path)
    path.write_bytes(b"garbage")
    broken = info(path)
    assert_fails(broken, 3, "[red]\\x1b]0;owned", "not a .safetensors file")
    assert not UNPRINTABLE.search(broken.stderr)


def test_numbers_that_json_does_not_know_are_null(forged: MakeForged) -> None:
    path = forged(training='{"loss": NaN, "best": Infinity, "huge": 1e999, "list": [-Infinity, 1]}')
    found = strict_json(info(path, "--json").stdout)["training"]
    assert found == {"loss": None, "best": None, "huge": None, "list": [None, 1]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": None}, ["no 'training'"]),
        ({"training": "[1]"}, ["training summary", "not a JSON object"]),
        ({"training": '{"a": 1, "a": 2}'}, ["training summary", "twice"]),
        ({"training": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"}, ["training summary", "not valid JSON"]),
        ({"model": '{"dim": -1}'}, ["model configuration"]),
        ({"tokenizer": "{"}, ["tokenizer", "not valid JSON"]),
        ({"tokenizer": "[]"}, ["tokenizer", "not a JSON object"]),
        ({"gptvae_format_version": "99"}, ["99"]),
        ({"gptvae_format_version": None}, []),
    ],
    ids=["missing", "list", "twice", "nested", "model", "tokenizer", "tokenizer-list", "newer", "foreign"],
)
def test_damaged_metadata_are_bad_input_of_a_named_file(
    forged: MakeForged, changes: dict[str, str | None], words: list[str]
) -> None:
    path = forged(**changes)
    for options in ([], ["--json"]):
        assert_fails(info(path, *options), 3, f"cannot load {path}", *words)


def test_latents_are_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "z.npy"
    np.save(path, np.zeros((3, 8), "float32"))
    assert_fails(info(path), 3, "z.npy: it holds latents, not a model", "gptvae generate --latent")


def test_a_training_state_is_not_a_model(forged: MakeForged) -> None:
    assert_fails(info(forged(state="{}")), 3, "it is a training state, not a model", "model.safetensors")


def test_the_header_is_enough(models: Path, tmp_path: Path) -> None:
    """Weights that are cut off are noticed, for their places are in the header; their values are not read."""
    data = (models / "line.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:-1000])
    assert_fails(info(path), 3, "cut.safetensors", "bytes")
    path.write_bytes(data[:-1000] + b"\xff" * 1000)
    assert "unit line" in shown(info(path))["texts"]
