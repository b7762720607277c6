"""`gptvae info`, which reads a header that may come from a stranger."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from gptvae_cli.checkpoint import load
from gptvae_cli.cli.app import app
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
    rows = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    return {row[0]: row[1] if len(row) > 1 else "" for row in rows}


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


def test_people_see_what_a_model_is(models: Path) -> None:
    path = models / "paragraph.safetensors"
    found = shown(info(path))
    parameters = learnt(path)
    expected = {
        "file": str(path),
        "file_bytes": f"{path.stat().st_size:,}",
        "parameters": f"{parameters:,}",
        "dim_latent": str(WIDTH),
        "max_seq_len": str(LONGEST),
        "kind": "bytes",
        "unit": "paragraph",
        "steps": "7",
        "kl": "1.5",
        "texts": "30",
    }
    assert {name: found[name] for name in expected} == expected


def test_programs_see_the_same_as_json(models: Path) -> None:
    path = models / "line.safetensors"
    found = strict_json(info(path, "--json").stdout)
    assert found["file"] == str(path)
    assert found["file_bytes"] == path.stat().st_size
    assert found["parameters"] == learnt(path)
    assert (found["model"]["dim_latent"], found["model"]["max_seq_len"]) == (WIDTH, LONGEST)
    assert found["tokenizer"] == {"kind": "bytes", "num_tokens": 259}
    assert found["data"]["unit"] == "line"
    assert found["training"] == {"steps": 7, "validation": {"kl": 1.5, "texts": 30}}
    assert found["has_latent"] is True


@pytest.mark.parametrize(
    ("training", "has_latent"),
    [
        ({"train": {"latents_dropout_prob": 1.0}}, "no"),
        ({"train": {"latents_dropout_prob": 0.99}}, "yes"),
        ({"train": [1.0]}, "yes"),
        ({"train": {"latents_dropout_prob": [1]}}, "yes"),
    ],
    ids=["baseline", "hardly", "list", "nested"],
)
def test_a_baseline_is_said_to_have_no_latent(forged: MakeForged, training: dict[str, Any], has_latent: str) -> None:
    assert shown(info(forged(training=json.dumps(training))))["has_latent"] == has_latent


def test_every_leaf_of_the_json_is_shown_to_people(models: Path) -> None:
    def names(values: dict[str, Any]) -> set[str]:
        inner = [names(value) for value in values.values() if isinstance(value, dict)]
        return set(values).union(*inner)

    path = models / "line.safetensors"
    assert set(shown(info(path))) == names(strict_json(info(path, "--json").stdout))


def test_a_model_is_a_file_or_a_run_or_where_the_environment_says(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPTVAE_MODEL", raising=False)
    assert_fails(info(), 3, "no model in ./gptvae-run, the default place", "gptvae train")
    (tmp_path / "gptvae-run").mkdir()
    make_model(tmp_path / "gptvae-run" / "model.safetensors")
    assert shown(info())["unit"] == "line"
    monkeypatch.setenv("GPTVAE_MODEL", str(models / "window.safetensors"))
    assert shown(info())["unit"] == "window"
    assert shown(info("gptvae-run"))["unit"] == shown(info("--model", "gptvae-run"))["unit"] == "line"
    assert_fails(info("gptvae-run", "--model", "gptvae-run"), 2, "MODEL and --model were both given")
    monkeypatch.setenv("GPTVAE_MODEL", "nowhere")
    assert_fails(info(), 3, "no model in nowhere, named by $GPTVAE_MODEL")


HOSTILE = "[red]x[/b] \x1b]0;owned\x07\x1b[2J \x9b31m \u202e \r\nfile  fake \ud800 \x00"


def test_metadata_does_not_control_the_terminal(forged: MakeForged) -> None:
    """Markup is text, escapes are spelled out, and a line break makes no row of its own."""
    training = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE, {"a": HOSTILE}]}, "deep": {"a": {"b": {"c": {"d": 1}}}}}
    path = forged(training=json.dumps(training))
    result = info(path)
    assert result.exit_code == 0, result.stderr
    assert not UNPRINTABLE.search(result.stdout)
    assert "[red]x[/b] \\x1b]0;owned" in result.stdout
    assert shown(result)["file"] == str(path)
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
    assert shown(info(path))["loss"] == "-"


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
    assert shown(info(path))["unit"] == "line"
