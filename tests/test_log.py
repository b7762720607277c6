"""The log for TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gptvae_cli.cli.app import app
from gptvae_cli.errors import GPTVAEError
from gptvae_cli.log import event_log, remove_log
from tests.test_run import begin, finish, go_on, names

pytestmark = pytest.mark.usefixtures("one_thread")
needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the extra tensorboard")


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars of a run: values by step, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {name: {event.step: event.value for event in reader.Scalars(name)} for name in reader.Tags()["scalars"]}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(corpus: str, folder: Path, *options: str) -> Result:
    small = ("--preset", "nano", "--threads", "1", "--device", "cpu", "--batch-tokens", "128", "--steps", "3")
    return CliRunner().invoke(app, ["train", corpus, "--out", str(folder), *small, *options])


@needs_tensorboard
def test_tensorboard_reads_what_metrics_hold(folder: Path, corpus: str) -> None:
    job = begin(folder, [corpus], log="tensorboard")
    assert f"log: tensorboard --logdir {folder}/tensorboard" in job.notes
    finish(job)
    found, lines = logged(folder), metrics(folder)
    assert len(lines) >= 5
    for name in ("cross_entropy_per_token", "kl", "bag_of_words_per_token", "gradient_norm", "learning_rate", "beta"):
        assert found[f"training/{name}"] == pytest.approx({line["step"]: line[name] for line in lines}), name
    for name in ("nll_bound", "cross_entropy", "cross_entropy_shuffled", "kl", "mutual_information", "active_02"):
        expected = {line["step"]: line["figures"][name] for line in lines if "figures" in line}
        assert found[f"validation/{name}"] == pytest.approx(expected), name
    assert set(found["speed/tokens_per_second"]) == set(found["training/kl"])
    assert not {"training/step", "training/time", "training/done", "training/improved"} & set(found)


@needs_tensorboard
def test_a_resumed_run_goes_on_with_its_log(folder: Path, corpus: str) -> None:
    """A killed session has logged steps that its last state knows nothing of: they are taken again."""
    finish(begin(folder, [corpus], log="tensorboard"), until=4)
    with event_log(folder, "tensorboard", step=4) as write:
        write({"step": 6, "kl": 99.0})
    assert logged(folder)["training/kl"][6] == 99
    job = finish(go_on(folder))
    assert job.learner.config.log == "tensorboard"
    kl = logged(folder)["training/kl"]
    assert 99 not in kl.values()
    assert kl == pytest.approx({line["step"]: line["kl"] for line in metrics(folder)})
    assert min(kl) <= 4 < max(kl) == 10


@needs_tensorboard
def test_a_run_that_was_killed_before_its_first_save_logs_its_steps_anew(folder: Path) -> None:
    with event_log(folder, "tensorboard", step=0) as write:
        write({"step": 1, "kl": 99.0})
        write({"step": 2, "kl": 99.0})
    with event_log(folder, "tensorboard", step=0) as write:
        write({"step": 1, "kl": 1.0})
    assert logged(folder)["training/kl"] == {1: 1.0}


@needs_tensorboard
def test_a_new_run_removes_the_log_of_the_old_one_and_no_more(folder: Path, corpus: str) -> None:
    finish(begin(folder, [corpus], log="tensorboard"), until=1)
    (folder / "tensorboard" / "notes.txt").write_text("mine")
    begin(folder, [corpus])
    assert names(folder / "tensorboard") == {"notes.txt"}
    (folder / "tensorboard" / "notes.txt").unlink()
    begin(folder, [corpus])
    assert "tensorboard" not in names(folder)


def test_a_log_that_cannot_be_written_is_found_out_before_training(
    folder: Path, corpus: str, not_installed: None
) -> None:
    assert train(corpus, folder).exit_code == 0, "nobody else needs it"
    before = (folder / "model.safetensors").read_bytes()
    result = train(corpus, folder, "--log", "tensorboard", "--force")
    assert result.exit_code == 1
    assert result.stderr.startswith("gptvae: error: --log tensorboard was asked for, but it cannot be imported: ")
    assert result.stderr.endswith("\nhint: pip install 'gptvae[tensorboard]'\n")
    assert len(result.stderr.splitlines()) == 2
    assert (folder / "model.safetensors").read_bytes() == before
    assert "tensorboard" not in names(folder)


@needs_tensorboard
def test_a_folder_that_tensorboard_cannot_name_is_found_out_before_training(tmp_path: Path, corpus: str) -> None:
    """`--force` had by then removed the earlier run."""
    folder = tmp_path / os.fsdecode(b"run\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    assert train(corpus, folder).exit_code == 0
    before = (folder / "model.safetensors").read_bytes()
    result = train(corpus, folder, "--log", "tensorboard", "--force")
    assert result.exit_code == 2, result.stderr
    assert "its name is not UTF-8\nhint: name another --out" in result.stderr
    assert (folder / "model.safetensors").read_bytes() == before


@needs_tensorboard
def test_a_run_does_not_go_on_without_its_log(
    folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    finish(begin(folder, [corpus], log="tensorboard"), until=1)
    request.getfixturevalue("not_installed")
    with pytest.raises(GPTVAEError, match="--log tensorboard was asked for"):
        go_on(folder)


@needs_tensorboard
def test_the_command_line_has_one_kind_of_log(folder: Path, corpus: str) -> None:
    result = train(corpus, folder, "--log", "tensorboard")
    assert result.exit_code == 0, result.stderr
    assert f"log: tensorboard --logdir {folder}/tensorboard\n" in result.stderr
    assert max(logged(folder)["validation/kl"]) == 3
    result = train(corpus, folder, "--log", "wandb", "--force")
    assert result.exit_code == 2
    assert "log is 'wandb', it must be one of tensorboard" in result.stderr


def test_a_link_to_a_folder_of_events_is_not_followed(tmp_path: Path) -> None:
    """The events of another run would be gone."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/events.out.tfevents.1").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").symlink_to(tmp_path / "other")
    remove_log(tmp_path / "run")
    assert names(tmp_path / "other") == {"events.out.tfevents.1"}
