"""`gptvae demo`, on a training run of a second."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gptvae_cli.cli.app import app

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return CliRunner().invoke(app, ["demo", "--out", str(folder / "d"), "--max-time", "1s"])


def test_demo_shows_every_command_and_what_it_writes(result: Result, folder: Path) -> None:
    assert result.exit_code == 0, result.stderr
    commands = [line[2:] for line in result.stderr.splitlines() if line.startswith("$ ")]
    assert [shlex.split(command)[1] for command in commands] == [
        "train", "encode", "generate", "interpolate", "generate",
    ]  # fmt: skip
    # The model's path, three names from each of three latents, a path of seven, ten from the prior.
    assert result.stdout.count("\n") == 1 + 9 + 7 + 10
    assert result.stdout.startswith(f"{folder / 'd' / 'run' / 'model.safetensors'}\n")


def test_demo_leaves_a_model_and_latents_behind(result: Result, folder: Path) -> None:
    assert np.load(folder / "d" / "z.npy").shape == (3, 32)
    again = CliRunner().invoke(app, ["info", str(folder / "d" / "run"), "--json"])
    assert again.exit_code == 0


def test_commands_that_the_demo_shows_do_what_it_did(result: Result, folder: Path) -> None:
    commands = [line[2:] for line in result.stderr.splitlines() if line.startswith("$ ")]
    _, _, printed = result.stdout.partition("\n")
    again = ""
    for command in commands[1:]:
        shown = CliRunner().invoke(app, shlex.split(command)[1:])
        assert shown.exit_code == 0, shown.stderr
        again += shown.stdout
    assert again == printed


def test_a_second_demo_does_not_replace_the_first(result: Result, folder: Path) -> None:
    second = CliRunner().invoke(app, ["demo", "--out", str(folder / "d")])
    assert second.exit_code == 2
    assert "--force" in second.stderr
    assert second.stdout == ""


@pytest.mark.parametrize("name", ["names.txt", "three.txt", "z.npy"])
@pytest.mark.parametrize("option", ["--force", "--quiet"])
def test_files_of_the_users_own_stay(tmp_path: Path, name: str, option: str) -> None:
    """As of `--out .` beside them."""
    (tmp_path / name).write_text("my list")
    refused = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--max-time", "1s", option])
    assert refused.exit_code == 2
    assert f"{tmp_path / name} is in the way" in refused.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["my list"]


@pytest.mark.parametrize(("time", "said"), [("1x", "max-time is '1x'"), ("0", "max-time is 0.0")])
def test_a_time_that_is_none_leaves_nothing(tmp_path: Path, time: str, said: str) -> None:
    refused = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d"), "--max-time", time])
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert not (tmp_path / "d").exists()


def test_quiet_prints_data_alone(tmp_path: Path) -> None:
    quiet = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "d"), "--max-time", "1s", "--quiet"])
    assert quiet.exit_code == 0
    assert quiet.stderr == ""
    assert quiet.stdout.count("\n") == 27


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    failed = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "d")])
    assert failed.exit_code == 1
    assert "cannot write" in failed.stderr


def test_force_replaces_an_earlier_demo(result: Result, folder: Path, tmp_path: Path) -> None:
    assert result.exit_code == 0
    out = Path(shutil.copytree(folder / "d", tmp_path / "d"))
    before = (out / "run/model.safetensors").read_bytes()
    again = CliRunner().invoke(app, ["demo", "--out", str(out), "--max-time", "1s", "--force", "--quiet"])
    assert again.exit_code == 0, again.stderr
    assert again.stdout.count("\n") == 1 + 9 + 7 + 10
    assert (out / "run/model.safetensors").read_bytes() != before
