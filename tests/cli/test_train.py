"""`gptvae train`, through Typer's runner where that is enough and in real processes where it is not."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pkgutil
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from gptvae_cli.cli import train as train_module
from gptvae_cli.cli.app import app
from gptvae_cli.config import STOCK_RECIPE, TrainConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.header import read_header

NAMES = [first + last for first in ("an", "be", "cla", "do", "ele", "fi") for last in ("na", "lla", "ra", "ria", "ly")]
QUICK = ("--preset", "nano", "--threads", "1", "--device", "cpu", "--dtype", "float32", "--batch-tokens", "128")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

pytestmark = pytest.mark.usefixtures("one_thread")

Train = Callable[..., Result]


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES) + "\n")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def train(out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """Runs `gptvae train` in this process, by default for four steps."""
    monkeypatch.chdir(tmp_path)

    def invoke(*options: object, steps: int | None = 4, stdin: bytes | None = None) -> Result:
        flags = [] if steps is None else ["--steps", str(steps)]
        arguments = ["train", "--out", str(out), *flags, *QUICK, *map(str, options)]
        return CliRunner().invoke(app, arguments, input=stdin)

    return invoke


def assert_fails(result: Result, code: int, *words: str, hint: bool = True) -> None:
    """One line that says what was asked and what was found, at most one hint, and nothing on stdout."""
    assert result.exit_code == code, result.stderr
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("gptvae: error: ")]
    assert len(errors) == 1, result.stderr
    behind = lines[lines.index(errors[0]) + 1 :]
    assert len(behind) <= 1
    assert all(line.startswith("hint: ") for line in behind)
    if hint:
        assert behind, "there is always something to do"
    for word in words:
        assert word in result.stderr, f"{word!r} is not in {result.stderr!r}"
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def steps_of(out: Path) -> int:
    counters = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert isinstance(counters["step"], int)
    return counters["step"]


# A run ----------------------------------------------------------------------------------------------------------------


def test_a_run_prints_its_model_and_tells_people_the_rest(tmp_path: Path, names: Path) -> None:
    """In a process of its own, with stderr in a pipe: nothing there is animated or coloured."""
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "gptvae_cli",
            "train",
            "names.txt",
            "--out",
            "run",
            "--steps",
            "20",
            "--valid",
            "0.4",
            *QUICK,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "run/model.safetensors\n"
    assert read_header(tmp_path / "run" / "model.safetensors").training["steps"] >= 1
    for part in (
        "corpus: 30 texts of",
        "tokenizer: bytes, 259 tokens",
        "model: nano (asked for)",
        "% padding",
        "device: cpu (asked for), float32 (asked for)",
        "100%",
        "nats/token",
        "Verdict",
        "gptvae generate --prior 5 --model run",
    ):
        assert part in process.stderr, part
    assert process.stderr.count("from its z") == 3
    assert not CONTROLS.search(process.stderr.replace("\n", ""))


def test_a_run_tells_what_its_texts_were_taken_for(train: Train, tmp_path: Path) -> None:
    """Also where its tokens are used again, as the texts are not read then."""
    corpus = tmp_path / "export"
    corpus.write_bytes(b"".join(b'{"text": "%s"}\n' % name.encode() for name in NAMES) + b"\xff\n")
    for options in ([], ["--force"]):
        result = train(corpus, "--errors", "replace", *options)
        assert result.exit_code == 0, result.stderr
        said = " ".join(result.stderr.split())
        assert f"{corpus} looks like JSON lines and was read as plain text, see --field" in said
        assert "1 place is not UTF-8 and became U+FFFD" in said
    assert "were not made again" in said
    assert "looks like" not in train("--field", "text", "--force", stdin=corpus.read_bytes()[:-2]).stderr


@pytest.mark.parametrize(("variable", "model"), [("", ""), ("elsewhere", " --model gptvae-run")])
def test_the_next_command_is_about_this_model(
    names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, model: str
) -> None:
    """Also in a shell whose $GPTVAE_MODEL is another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTVAE_MODEL", variable)
    result = CliRunner().invoke(app, ["train", str(names), "--steps", "3", "--valid", "0.4", *QUICK])
    assert result.exit_code == 0, result.stderr
    *_, first, second, third = result.stderr.rstrip().split("\n")
    assert first == f"gptvae generate --prior 5{model}"
    assert re.fullmatch(rf"gptvae interpolate --from \w+ --to \w+ --refine{model}", second)
    assert third == f"gptvae evaluate {names} --held-out{model}"
    start, end = second.split()[3:6:2]
    assert {f"text        {name}" for name in (start, end)} <= {line.strip() for line in result.stderr.split("\n")}


def test_texts_that_are_long_or_are_not_read_are_not_in_the_next_command(train: Train, tmp_path: Path) -> None:
    names, longer = tmp_path / "names.txt", tmp_path / "longer.txt"
    names.write_text("".join(f"name {i}\n" for i in range(60)))
    longer.write_text("".join(f"{i} {'x' * 61}\n" for i in range(60)))
    for options in (["--latents-from", names], []):
        result = train(longer, *options, "--force", "--max-seq-len", "80")
        assert result.exit_code == 0, result.stderr
        assert result.stderr.rstrip().split("\n")[-2].startswith("gptvae generate --prior 5")
    result = train(names, "--latents-from", longer, "--force")
    assert result.stderr.rstrip().split("\n")[-2].startswith("gptvae generate --prior 5")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["names.txt", "--valid", "0.4"], ["names.txt", "--held-out"]),
        (["names.txt"], []),  # of 30 names it is one
        (
            ["names.txt", "--valid", "0.4", "--latents-from", "it's.txt"],
            ["names.txt", "--held-out", "--latents-from", "it's.txt"],
        ),
        (["names.txt", "--valid", "it's.txt"], ["it's.txt"]),
        (["names.txt", "it's.txt"], []),
        (["names.txt", "--unit", "window"], []),
        (["-"], []),
    ],
)
def test_the_last_command_evaluates_what_was_held_out(
    train: Train, names: Path, out: Path, options: list[str], texts: list[str]
) -> None:
    """Where one can tell in a line which texts these are."""
    Path("it's.txt").write_text("".join(f"name {i}\n" for i in range(len(NAMES))))
    result = train(*options, stdin=names.read_bytes())
    assert result.exit_code == 0, result.stderr
    commands = [shlex.split(line)[1:] for line in result.stderr.split("\n") if line.startswith("gptvae evaluate")]
    assert commands == ([["evaluate", *texts, "--model", str(out)]] if texts else [])
    for command in commands:
        measured = CliRunner().invoke(app, [*command, "--samples", "2", "--json"])
        assert measured.exit_code == 0, measured.stderr
        assert json.loads(measured.stdout)["texts"] == len(Corpus.open(out / "cache").valid)


def test_the_next_command_can_be_pasted(train: Train, names: Path, tmp_path: Path) -> None:
    """A folder with a space in its name was printed as it is."""
    names.write_text("".join(f"it's {name}\n" for name in NAMES))
    result = train(names, "--out", str(tmp_path / "my run"), "--valid", "0.4")
    assert result.exit_code == 0, result.stderr
    words, path = (shlex.split(line) for line in result.stderr.splitlines()[-3:-1])
    assert words == ["gptvae", "generate", "--prior", "5", "--model", str(tmp_path / "my run")]
    assert {path[3].removeprefix("it's "), path[5].removeprefix("it's ")} <= set(NAMES)
    texts = CliRunner().invoke(app, path[1:])
    assert texts.exit_code == 0, texts.stderr
    assert texts.stdout.count("\n") == 7


def test_a_second_run_needs_to_be_told_what_to_do_with_the_first(train: Train, names: Path, out: Path) -> None:
    assert train(names).exit_code == 0
    before = (out / "model.safetensors").read_bytes()
    assert_fails(train(names), 2, "holds a run already", "--resume", "--force")
    assert (out / "model.safetensors").read_bytes() == before
    again = train(names, "--force", "--seed", "7")
    assert again.exit_code == 0
    assert f"its tokens were in {out / 'cache'}, and were not made again" in again.stderr
    assert read_header(out / "model.safetensors").training["train"]["seed"] == 7


def test_a_bad_corpus_with_force_loses_nothing(train: Train, names: Path, out: Path, tmp_path: Path) -> None:
    train(names)
    (out / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert_fails(train(tmp_path / "nowhere.txt", "--force"), 3, "nowhere.txt", hint=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert train(names, "--force").exit_code == 0
    assert (out / "mine.txt").read_text() == "mine"


def test_quiet_says_nothing_but_the_path(train: Train, names: Path, out: Path) -> None:
    result = train(names, "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{out}/model.safetensors\n"


def test_texts_of_the_corpus_do_not_control_the_terminal(train: Train, tmp_path: Path) -> None:
    """The verdict shows held-out texts."""
    bad = tmp_path / "bad.txt"
    bad.write_text("\n".join(f"[red]{i}[/b] \x1b]0;owned\x07\x1b[2J\x9b\u202e" for i in range(30)))
    result = train(bad, "--valid", "0.5", "--max-seq-len", "64")
    assert result.exit_code == 0, result.stderr
    assert "[red]" in result.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result.stderr.replace("\n", ""))


def test_a_folder_may_have_any_name(names: Path, tmp_path: Path) -> None:
    """Markup in it, and what a shell would split."""
    folder = tmp_path / "a run[/b]"
    result = CliRunner().invoke(app, ["train", str(names), "--out", str(folder), "--steps", "2", *QUICK])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{folder}/model.safetensors\n"


# The texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [["-"], []], ids=["dash", "nothing"])
def test_standard_input_is_a_corpus(train: Train, out: Path, argument: list[str]) -> None:
    result = train(*argument, stdin="\n".join(NAMES).encode())
    assert result.exit_code == 0, result.stderr
    assert read_header(out / "model.safetensors").training["corpus"]["texts"] == len(NAMES)


@pytest.mark.parametrize("unit", ["line", "paragraph", "file", "window"])
def test_every_unit_trains_and_is_stored_in_the_model(train: Train, out: Path, tmp_path: Path, unit: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        (folder / f"{i:02}.txt").write_text(f"{name}\n\nand {name[::-1]}\n")
    result = train(folder, "--unit", unit, "--max-seq-len", "16")
    assert result.exit_code == 0, result.stderr
    header = read_header(out / "model.safetensors")
    assert header.data.unit == unit
    assert header.training["corpus"]["texts"] == {"line": 60, "paragraph": 60, "file": 30, "window": 30}[unit]
    assert header.training["corpus"]["empty"] == {"line": 30}.get(unit, 0)


def test_a_json_field_is_the_text(train: Train, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "names.jsonl"
    path.write_text("\n".join(json.dumps({"name": name, "text": 1}) for name in NAMES))
    assert train(path, "--field", "name").exit_code == 0
    assert read_header(out / "model.safetensors").data.field == "name"
    digest = read_header(out / "model.safetensors").training["corpus"]["digest"]
    assert train("--field", "name", "--force", stdin=path.read_bytes()).exit_code == 0
    assert read_header(out / "model.safetensors").training["corpus"]["digest"] == digest


def test_descriptions_teach_the_encoder_and_commands_the_decoder(train: Train, out: Path, tmp_path: Path) -> None:
    data = os.environ.get("GPTVAE_TEST_DATA")
    if not data:
        pytest.skip("needs the corpora that GPTVAE_TEST_DATA names")
    for name in ("nl2bash_train.txt", "nl2bash_train.descriptions.txt"):
        with Path(data, name).open("rb") as lines:
            (tmp_path / name).write_bytes(b"".join(islice(lines, 300)))
    descriptions = str(tmp_path / "nl2bash_train.descriptions.txt")
    result = train(tmp_path / "nl2bash_train.txt", "--latents-from", descriptions, steps=3)
    assert result.exit_code == 0, result.stderr
    assert read_header(out / "model.safetensors").data.latents_from == descriptions
    assert {"train.source.tokens", "valid.source.tokens"} <= {path.name for path in (out / "cache").iterdir()}


def test_aligned_texts_of_another_number_are_refused(train: Train, names: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    assert_fails(train(names, "--latents-from", tmp_path / "few.txt"), 3, "more than 2 texts", "few.txt has 2")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot read", "corpus.txt"]),
        (b"", ["0 non-empty text(s)", "corpus.txt", "--unit"]),
        (b"\n \n\n", ["1 non-empty text(s)"]),
        (b"only one\n", ["1 non-empty text(s)"]),
        (b"fine\nna\xefve\nfine\n", ["corpus.txt, line 2", "0xef", "UTF-8", "iconv"]),
    ],
    ids=["missing", "empty", "blank", "one-text", "not-utf8"],
)
def test_a_corpus_that_cannot_be_used_is_bad_input(
    train: Train, out: Path, tmp_path: Path, content: bytes | None, words: Sequence[str]
) -> None:
    if content is not None:
        (tmp_path / "corpus.txt").write_bytes(content)
    assert_fails(train(tmp_path / "corpus.txt"), 3, *words, hint=content is not None)
    assert not out.exists(), "a folder that was made for it is gone again"


def test_an_empty_standard_input_is_bad_input(train: Train) -> None:
    for named in ([], ["-"], ["--field", "text"]):
        assert_fails(train(*named, stdin=b""), 3, "0 non-empty text(s) in standard input")


# Wrong usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dim", "0"], ["dim", "0"]),
        (["--dim", "30", "--heads", "1"], ["dim", "30"]),
        (["--dim", "100", "--heads", "1", "--attn-dim-head", "64"], ["attn-dim-head is 64", "dim (100)"]),
        (["--dim", "two"], ["--dim", "integer"]),
        (["--max-seq-len", "2"], ["max-seq-len", "2"]),
        (["--unit", "word"], ["unit", "word", "line, paragraph, file, window"]),
        (["--valid", "0.9"], ["valid", "0.9"]),
        (["--vocab-size", "10"], ["vocab-size", "10"]),
        (["--preset", "giant"], ["preset", "giant", "nano"]),
        (["--objective", "best"], ["objective", "best", "elbo"]),
        (["--vae-kl-div-floor", "-1"], ["vae-kl-div-floor", "-1"]),
        (["--latents-dropout-prob", "1.5"], ["latents-dropout-prob", "1.5"]),
        (["--kl-warmup", "2"], ["kl-warmup", "2"]),
        (["--lr", "nan"], ["lr", "nan"]),
        (["--batch-tokens", "3"], ["batch-tokens", "3"]),
        (["--accumulate", "0"], ["accumulate", "0"]),
        (["--max-time", "soon"], ["max-time", "soon", "10m"]),
        (["--max-time", "0"], ["max-time", "0"]),
        (["--epochs", "-1"], ["epochs", "-1"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--device", "tpu"], ["device", "tpu", "cuda"]),
        (["--dtype", "float8"], ["dtype", "float8"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
        (["--latents-from", "x.txt", "--unit", "window"], ["latents-from", "line, paragraph or file"]),
        (["--latents-from", "names.txt", "--valid", "names.txt"], ["valid", "names.txt", "share"]),
        (["--stepz", "3"], ["--stepz", "--steps"]),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_a_wrong_value_is_named_beside_what_is_allowed(
    train: Train, names: Path, out: Path, options: list[str], words: list[str]
) -> None:
    assert_fails(train(names, *options), 2, *words, hint=False)
    assert not out.exists()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[train]\nlearning_rate = 1.0\n", ["learning_rate"]),
        ("[learn]\nlr = 1.0\n", ["learn", "run, data, model, train"]),
        ("[model]\nwidth = 3\n", ["width"]),
        ("[model]\ndim = 'wide'\n", ["dim", "wide"]),
        ("[train]\nsteps = true\n", ["steps"]),
        ("[data]\nunit = 'word'\n", ["unit", "word"]),
        ("[run]\nfolder = 'x'\n", ["folder"]),
        ("not toml", ["not TOML"]),
    ],
    ids=["field", "table", "size", "type", "bool", "value", "run", "syntax"],
)
def test_a_wrong_configuration_file_is_wrong_usage(
    train: Train, names: Path, tmp_path: Path, toml: str, words: list[str]
) -> None:
    (tmp_path / "c.toml").write_text(toml)
    assert_fails(train(names, "--config", tmp_path / "c.toml", steps=None), 2, *words, hint=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_failure(names: Path, out: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(names), "--out", str(out), "--device", "cuda"])
    assert_fails(result, 1, "device cuda was asked for", "--device cpu")
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_a_failure(names: Path, tmp_path: Path) -> None:
    """As a file where a folder should be, which also stops root."""
    result = CliRunner().invoke(app, ["train", str(names), "--out", str(names / "run"), *QUICK])
    assert_fails(result, 1, "cannot make the run folder", "--out")


# Configuration --------------------------------------------------------------------------------------------------------


def print_config(*options: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["train", *map(str, options), "--print-config"])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return tomllib.loads(result.stdout)


def test_several_processes_are_refused(names: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_fails(CliRunner().invoke(app, ["train", str(names), "--out", str(out)]), 2, "several processes")
    assert not out.exists()


def test_a_run_folder_has_a_name(names: Path) -> None:
    assert_fails(CliRunner().invoke(app, ["train", str(names), "--out", ""]), 2, "out is ''")


def test_a_variable_with_a_typo_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTVAE_TARGETRATE", "16")
    result = CliRunner().invoke(app, ["train", "--print-config"])
    assert result.stderr == "GPTVAE_TARGETRATE is set and names no option; did you mean target_rate?\n"
    assert tomllib.loads(result.stdout)["train"]["target_rate"] == TrainConfig().target_rate


def test_a_printed_configuration_reproduces_the_run(train: Train, names: Path, out: Path, tmp_path: Path) -> None:
    """Printed again from its file it is the same, and two runs of it are equal to the bit."""
    flags = [names, "--preset", "nano", "--dim-latent", "5", "--steps", "4", "--seed", "3", "--word-dropout", "0.1"]
    flags += ["--threads", "1", "--device", "cpu", "--dtype", "float32"]
    text = CliRunner().invoke(app, ["train", *map(str, flags), "--out", str(out), "--print-config"]).stdout
    assert not out.exists(), "printing is all that was asked for"
    config = tmp_path / "run.toml"
    config.write_text(text)
    assert CliRunner().invoke(app, ["train", "--config", str(config), "--print-config"]).stdout == text
    models = []
    for arguments in ([*map(str, flags), "--out", str(out)], ["--config", str(config), "--force"]):
        result = CliRunner().invoke(app, ["train", *arguments])
        assert result.exit_code == 0, result.stderr
        header = read_header(out / "model.safetensors")
        assert (header.model.dim_latent, header.training["train"]["seed"]) == (5, 3)
        state = (out / "model.safetensors").read_bytes()
        models.append(state[8 + int.from_bytes(state[:8], "little") :])
    assert models[0] == models[1]


def test_flags_go_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        '[run]\ncorpus = ["a.txt"]\nout = "there"\n[data]\nunit = "paragraph"\nvalid = "0.1"\n'
        '[model]\npreset = "small"\ndim = 96\n[train]\nlr = 0.5\nseed = 9\nmax_time = 50\n'
    )
    plain = print_config("--config", config)
    assert plain["run"] == {"corpus": ["a.txt"], "out": "there"}
    assert (plain["data"]["unit"], plain["data"]["valid"], plain["data"]["field"]) == ("paragraph", "0.1", "text")
    assert plain["model"] == {"preset": "small", "dim": 96}
    assert (plain["train"]["lr"], plain["train"]["seed"], plain["train"]["max_time"]) == (0.5, 9, 50)
    assert plain["train"]["clip"] == TrainConfig().clip
    over = print_config(
        "b.txt", "--config", config, "--out", "here", "--unit", "file", "--dim", "32", "--lr", "0.1", "--max-time", "2m"
    )
    assert over["run"] == {"corpus": ["b.txt"], "out": "here"}
    assert (over["data"]["unit"], over["data"]["valid"]) == ("file", "0.1")
    assert over["model"] == {"preset": "small", "dim": 32}
    assert (over["train"]["lr"], over["train"]["seed"], over["train"]["max_time"]) == (0.1, 9, 120)


def test_the_file_goes_over_the_environment_and_that_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"DIM": "32", "LR": "0.5", "CLIP": "2", "OUT": "there", "MAX_TIME": "2m", "STRICT": "1"}.items():
        monkeypatch.setenv(f"GPTVAE_{name}", value)
    (tmp_path / "c.toml").write_text("[model]\ndim = 64\n[train]\nlr = 0.25\nstrict = false\n")
    found = print_config("a.txt", "--config", tmp_path / "c.toml", "--lr", "0.125")
    assert (found["model"]["dim"], found["train"]["lr"], found["train"]["clip"]) == (64, 0.125, 2)
    assert (found["run"]["out"], found["train"]["max_time"], found["train"]["strict"]) == ("there", 120, False)
    assert found["train"]["decay"] == TrainConfig().decay


def test_a_size_that_cannot_be_is_named_by_its_place(
    train: Train, names: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that shows only once the model is built."""
    (tmp_path / "c.toml").write_text("[model]\nheads = 1\nattn_dim_head = 32\n")
    assert_fails(train(names, "--config", "c.toml"), 2, "c.toml, [model] attn_dim_head is 32, it must be dim (64)")
    monkeypatch.setenv("GPTVAE_HEADS", "1")
    monkeypatch.setenv("GPTVAE_ATTN_DIM_HEAD", "32")
    assert_fails(train(names), 2, "GPTVAE_ATTN_DIM_HEAD is 32")


def test_a_resumed_run_takes_the_machine_but_no_limit_from_the_environment(
    train: Train, names: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(names)
    for name, value in {"STEPS": "1", "DIM": "32", "DTYPE": "float32", "DEVICE": "cpu", "OUT": str(out)}.items():
        monkeypatch.setenv(f"GPTVAE_{name}", value)
    monkeypatch.setenv("GPTVAE_HEADS", "many")
    result = CliRunner().invoke(app, ["train", "--resume", "--steps", "6"])
    assert result.exit_code == 0, result.stderr
    assert steps_of(out) == 6
    training = read_header(out / "model.safetensors").training
    assert (training["device"], training["precision"], training["threads"]) == ("cpu", "float32", 1)


def test_every_field_of_the_training_has_a_flag() -> None:
    values: dict[str, Any] = asdict(TrainConfig(steps=3, epochs=2.0, lr=0.25, strict=True, log="tensorboard"))
    values |= {"objective": "stock", "target_rate": 0.0, "on_collapse": "warn", "max_time": 77.0}
    flags: list[object] = []
    for name, value in values.items():
        flags.append(f"--{name.replace('_', '-')}")
        if name == "strict":
            continue
        changed = value + 1 if isinstance(value, int) else value / 2 if isinstance(value, float) else value
        values[name] = changed
        flags.append(changed)
    assert print_config("x.txt", *flags)["train"] == values
    assert print_config("x.txt", "--target-rate", "4", "--on-collapse", "warn")["train"] == print_config("x.txt")[
        "train"
    ] | {"target_rate": 4.0, "on_collapse": "warn"}


def test_without_a_limit_a_run_takes_ten_minutes_and_with_one_no_time_limit() -> None:
    assert print_config("x.txt")["train"]["max_time"] == 600
    for limit in (("--steps", "5"), ("--epochs", "1")):
        assert "max_time" not in print_config("x.txt", *limit)["train"]
    assert print_config("x.txt", "--steps", "5", "--max-time", "1h")["train"]["max_time"] == 3600
    assert print_config("x.txt")["run"] == {"corpus": ["x.txt"], "out": "gptvae-run"}


def test_the_stock_objective_brings_its_recipe_unless_told_otherwise() -> None:
    stock = print_config("x.txt", "--objective", "stock")["train"]
    assert {name: stock[name] for name in STOCK_RECIPE} == STOCK_RECIPE
    mixed = print_config("x.txt", "--objective", "stock", "--bag-of-words", "0.5")["train"]
    assert (mixed["bag_of_words"], mixed["latents_dropout_prob"]) == (0.5, 0.5)
    for option, value in (("--target-rate", "16"), ("--on-collapse", "treat")):
        refused = CliRunner().invoke(app, ["train", "x.txt", "--objective", "stock", option, value, "--print-config"])
        assert_fails(refused, 2, f"{option[2:]} is ", "with --objective stock", hint=False)


# Resuming -------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_without_being_told_its_corpus(train: Train, names: Path, out: Path) -> None:
    train(names, "--seed", "3")
    assert steps_of(out) == 4
    names.unlink()
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--steps", "7", "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}/model.safetensors\n"
    assert "resumed at step 4" in result.stderr
    assert steps_of(out) == 7
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--device", "cpu"])
    assert again.exit_code == 0, "a run that is over tells its verdict again"
    assert "Verdict" in again.stderr
    assert steps_of(out) == 7


def test_a_run_does_not_go_on_with_another_corpus(train: Train, names: Path, out: Path, tmp_path: Path) -> None:
    train(names)

    def resume(*options: object) -> Result:
        return CliRunner().invoke(app, ["train", "--resume", *map(str, options), "--out", str(out), "--device", "cpu"])

    assert resume(names, "--steps", "5").exit_code == 0
    other = tmp_path / "other.txt"
    other.write_text("\n".join(NAMES[1:]))
    assert_fails(resume(other), 3, "other.txt is not the corpus", "--out")


@pytest.mark.parametrize(
    "options", [["--dim", "32"], ["--lr", "0.1"], ["--unit", "file"], ["--seed", "3"], ["--preset", "small"]], ids=str
)
def test_a_run_keeps_its_configuration(train: Train, names: Path, out: Path, options: list[str]) -> None:
    out.mkdir()
    (out / "state.safetensors").write_bytes(b"")
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), *options])
    assert_fails(result, 2, "--resume keeps the run's configuration", options[0], "--max-time")


def test_a_run_is_resumed_or_replaced_and_not_both(out: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--resume", "--force", "--out", str(out)])
    assert_fails(result, 2, "--resume goes on with a run, --force replaces it, both were given", "leave one out")


def test_there_must_be_a_run_to_resume(out: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--device", "cpu"])
    assert_fails(result, 3, "no run to resume in", str(out))
    assert not out.exists()


# Interruptions --------------------------------------------------------------------------------------------------------


class Spawned:
    """`gptvae train` in a process of its own, past its first validation: 500 steps of many."""

    def __init__(self, cwd: Path, stderr: int | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptvae_cli", "train", "names.txt", "--out", "run", "--steps", "2000", *QUICK],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if stderr is None else stderr,
            env={**os.environ, "COLUMNS": "110", "LINES": "40", "TERM": "xterm-256color"},
            # A shell's background jobs ignore interrupts, and what they start inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __enter__(self) -> Spawned:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(train: Train, tmp_path: Path, names: Path, out: Path) -> None:
    """And nobody else may train in the folder meanwhile."""
    with Spawned(tmp_path) as spawned:
        assert spawned.process.stderr is not None
        told = b""
        for line in spawned.process.stderr:
            told += line
            if b" held out: " in line:
                break
        assert_fails(train(names), 75, "in use by another training run", "--out")
        spawned.process.send_signal(signal.SIGINT)
        stdout, rest = spawned.process.communicate(timeout=60)
    told += rest
    assert spawned.process.returncode == -signal.SIGINT, told
    assert stdout == b"", "there is no model to go on with in a pipeline"
    assert b"the state is saved" in told
    assert b"gptvae train --resume --out run" in told
    assert b"Traceback" not in told
    step = int(re.findall(rb"stopped at step ([\d,]+);", told)[0].replace(b",", b""))
    assert 100 <= step < 2000
    result = CliRunner().invoke(
        app, ["train", "--resume", "--out", str(out), "--steps", str(step + 3), "--device", "cpu", "--dtype", "float32"]
    )
    assert result.exit_code == 0, result.stderr
    assert f"resumed at step {step:,}" in result.stderr
    assert steps_of(out) == step + 3


def test_a_run_whose_messages_nobody_reads_is_saved(tmp_path: Path, names: Path, out: Path) -> None:
    """As where its log went through a program that has ended."""
    with Spawned(tmp_path) as spawned:
        assert spawned.process.stderr is not None
        for line in spawned.process.stderr:
            if b" held out: " in line:
                break
        spawned.process.stderr.close()
        assert spawned.process.wait(timeout=60) == 141
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--device", "cpu", "--steps", "1"])
    assert again.exit_code == 0, again.stderr
    assert int(re.findall(r"resumed at step ([\d,]+)", again.stderr)[0].replace(",", "")) >= 100


def test_termination_saves_too_and_gives_the_terminal_back(tmp_path: Path, names: Path, out: Path) -> None:
    """With people watching: the display is drawn on their terminal, and the cursor is back when it ends."""
    leader, follower = pty.openpty()
    with Spawned(tmp_path, stderr=follower) as spawned:
        os.close(follower)
        shown = b""
        for chunk in terminal_output(leader):
            if b"dimensions active" in chunk and b"dimensions active" not in shown:
                spawned.process.terminate()
            shown += chunk
        stdout, _ = spawned.process.communicate(timeout=60)
    os.close(leader)
    assert spawned.process.returncode == -signal.SIGTERM, shown
    assert stdout == b""
    assert (out / "state.safetensors").exists()
    for part in (
        b"getting ready",
        b"nats/token",
        b"dimensions active",
        b"from its z",
        b"\x1b[?25h",
        b"the state is saved",
    ):
        assert part in shown, part
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def terminal_output(leader: int) -> Iterator[bytes]:
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            return
        if not chunk:
            return
        yield chunk


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `train` that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    arguments = ["train", str(folder / "names.txt"), "--out", str(folder / "run"), "--steps", "4", *QUICK]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    return folder / "run"


def stop_at(monkeypatch: pytest.MonkeyPatch, place: str, call: int, *numbers: int) -> None:
    """Lets signals arrive just before a call of a function, the one with this number."""
    owner_name, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original, calls = getattr(owner, name), 0

    def wrapper(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        for number in numbers if calls == call else ():
            signal.raise_signal(number)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("gptvae_cli.training._step", 1),
        ("gptvae_cli.training.measure", 2),
        ("gptvae_cli.run.save_model", 1),
        ("gptvae_cli.log.append_line", 2),
    ],
    ids=["before the first step", "validation", "save", "log"],
)
@pytest.mark.parametrize(
    ("numbers", "code"),
    [([signal.SIGINT], 130), ([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)],
    ids=["int", "term", "int twice"],
)
def test_a_run_that_is_stopped_ends_as_one_that_is_not(
    train: Train, names: Path, out: Path, undisturbed: Path, place: str, call: int, numbers: list[int], code: int
) -> None:
    """Twice, because keys are, and because a wrapper may pass on what the terminal has sent to all already."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, place, call, *numbers)
        result = train(names)
    assert result.exit_code == code, result.stderr
    assert "; the state is saved" in result.stderr
    assert result.stdout == ""
    machine = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), *machine])
    assert again.exit_code == 0, again.stderr
    for name in ("state.safetensors", "model.safetensors"):
        found, expected = load_file(out / name), load_file(undisturbed / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name


def test_time_in_which_the_process_is_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run that is put to sleep for a while would end when it wakes up, with its learning rate at the peak."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.getsignal(signal.SIGCONT)
    with train_module._clock(90.0) as seconds:
        assert seconds() == 10
        now = 105.0
        assert seconds() == 15
        now = 1000.0
        signal.raise_signal(signal.SIGCONT)
        assert seconds() == 15
        now = 1001.0
        assert seconds() == 16
    assert signal.getsignal(signal.SIGCONT) == before


@pytest.mark.parametrize("place", ["gptvae_cli.tokens.BulkTokenizer.__call__", "gptvae_cli.run.remove_run"])
def test_a_stop_while_the_corpus_is_read_leaves_nothing(
    train: Train, names: Path, out: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, place, 1, signal.SIGINT)
        result = train(names)
    assert (result.exit_code, result.stdout) == (130, "")
    assert not out.exists()
    assert train(names).exit_code == 0


def test_a_second_wish_to_stop_is_heard_at_once_and_costs_no_state(
    train: Train, names: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a second it is another one. What was saved before is good."""
    monkeypatch.setattr("gptvae_cli.cli.train._SAME_WISH_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        stop_at(patch, "gptvae_cli.training.measure", 1, signal.SIGINT, signal.SIGINT)
        result = train(names)
    assert result.exit_code == 130
    assert "the state is saved" not in result.stderr
    assert "Traceback" not in result.stderr
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--device", "cpu"])
    assert again.exit_code == 0, again.stderr
    assert "resumed at step 0" in again.stderr
    assert steps_of(out) == 4


# How a run may end ----------------------------------------------------------------------------------------------------


def test_a_collapse_is_a_verdict_and_under_strict_a_failure(train: Train, names: Path, out: Path) -> None:
    """The stock units press the latent flat within a few steps."""
    recipe = ("--objective", "stock", "--vae-kl-loss-weight", "1000", "--lr", "0.03", "--kl-warmup", "0.5")
    stock = (*recipe, "--valid", str(names))
    lenient = train(names, *stock, steps=40)
    assert lenient.exit_code == 0, lenient.stderr
    assert "collapsed: the latent carries 0." in lenient.stderr
    assert "train without --objective stock" in lenient.stderr, "what to do about it"
    strict = train(names, *stock, "--strict", "--force", steps=40)
    assert strict.exit_code == 5
    assert "the latent is not being used: it carries 0." in strict.stderr
    assert "--strict was given" in strict.stderr
    assert strict.stderr.endswith("hint: the stock objective seldom uses a latent, train without --objective stock\n")
    assert strict.stdout == f"{out}/model.safetensors\n", "the model is there all the same"


def test_under_strict_a_latent_that_the_decoder_does_not_hear_is_a_failure(
    train: Train, names: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much it carries."""
    monkeypatch.setattr("gptvae_cli.doctor.diagnosis", lambda *about: "the latent is not being used: nobody listens")
    found = train(names, "--strict")
    assert found.exit_code == 5
    assert "nobody listens, and --strict was given" in found.stderr


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(train: Train, names: Path, out: Path) -> None:
    assert "nothing is left" not in train(names).stderr
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--device", "cpu"])
    assert again.exit_code == 0, again.stderr
    assert "nothing is left to do" in again.stderr
    more = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--device", "cpu", "--steps", "6"])
    assert "nothing is left" not in more.stderr
    assert steps_of(out) == 6


def test_the_model_that_is_kept_is_named_where_it_is_not_the_last(
    train: Train, names: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 1.0, *[2.0] * 20])
    monkeypatch.setattr("gptvae_cli.training.score", lambda figures, config: next(scores))
    found = train(names, "--kl-warmup", "0", steps=10)
    assert found.exit_code == 0, found.stderr
    assert re.search(r"model of step \d+ of 10, the best on held-out texts", found.stderr), found.stderr


def test_standard_input_is_read_once(train: Train, names: Path) -> None:
    """And no corpus is standard input, too."""
    for arguments in (
        ("-", "-"),
        ("-", "--valid", "-"),
        ("-", "--latents-from", "-"),
        (names, "-", "--valid", "-"),
        ("--valid", "-"),
        ("--latents-from", "-"),
    ):
        assert_fails(train(*arguments), 2, "standard input was named twice")


def test_a_mistyped_name_is_told_before_the_run_that_is_there(train: Train, names: Path) -> None:
    assert train(names).exit_code == 0
    assert_fails(train("nowhere.txt"), 3, "nowhere.txt", "No such file")
    assert_fails(train(names), 2, "holds a run already")


def test_equal_texts_that_make_up_a_corpus_are_spoken_of(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "alike.txt"
    path.write_text("aaaa\nbbbb\n" * 100)
    found = train(path)
    assert found.exit_code == 0, found.stderr
    assert "of the texts are held out and not 5.0%" in found.stderr
    path.write_text("".join(f"{i}\n" for i in range(200)))
    assert "are held out and not" not in train(path, "--force").stderr


def test_a_run_whose_terminal_is_closed_saves_its_state(names: Path, out: Path) -> None:
    """As one over ssh; writing to the terminal would fail from then on."""
    leader, follower = pty.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    arguments = ["train", str(names), "--out", str(out), "--steps", "100000", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptvae_cli", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        preexec_fn=take_terminal,
    )
    os.close(follower)
    shown = b""
    while not re.search(rb"step [1-9][0-9]", shown):
        shown += os.read(leader, 65536)
    os.close(leader)
    assert process.wait(timeout=60) == -signal.SIGHUP
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--device", "cpu", "--steps", "1"])
    assert again.exit_code == 0, again.stderr
    found = re.search(r"resumed at step ([\d,]+)", again.stderr)
    assert found is not None and int(found[1].replace(",", "")) >= 10


def test_a_run_that_learns_by_heart_says_that_it_had_been_better(train: Train, out: Path, tmp_path: Path) -> None:
    """Random letters: there is nothing to learn but their frequencies, and a model keeps its best of them."""
    letters = Random(0).choices("abcdefghijklmnop", k=480)
    path = tmp_path / "random.txt"
    path.write_text("\n".join("".join(letters[i : i + 12]) for i in range(0, 480, 12)) + "\n")
    baseline = ("--latents-dropout-prob", "1", "--dropout", "0", "--valid", "0.3")
    long = train(path, *baseline, steps=150)
    assert long.exit_code == 0, long.stderr
    assert read_header(out / "model.safetensors").training["steps"] < 150
    assert ", the best on held-out texts; these were at" in long.stderr
    assert "train for longer" not in long.stderr, "that would contradict it"
    short = train(path, *baseline, "--force", steps=10)
    assert "these were at" not in short.stderr


def test_a_divergence_has_an_exit_code_of_its_own(train: Train, names: Path) -> None:
    assert_fails(train(names, "--lr", "1e30", "--warmup", "0", steps=50), 4, "training diverged", "--lr")


def test_help_is_sorted_into_panels_and_ends_with_examples() -> None:
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for part in ("The texts", "The model", "Learning", "The run", "--latents-from", "gptvae train --resume"):
        assert part in result.stdout


def test_a_terminal_as_the_corpus_shows_the_help(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    """Nobody types a corpus."""
    monkeypatch.setattr("gptvae_cli.cli.streams.sys", FakeSys())
    for options in ([], ["-"], ["x.txt", "--valid", "-"], ["x.txt", "--latents-from", "-"], ["--resume", "-"]):
        result = CliRunner().invoke(app, ["train", "--out", str(out), *options])
        assert result.exit_code == 2, options
        assert "standard input is a terminal" in result.stderr
        assert not out.exists()


class FakeSys:
    """The `sys` of a shell without a pipe in front."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stdin = Terminal()
    stdout = Terminal()


def test_a_baseline_is_not_told_that_its_latent_carries_anything(train: Train, names: Path, out: Path) -> None:
    """Its encoder is as random as it began, and even a random one tells texts apart."""
    result = train(names, "--latents-dropout-prob", "1", "--strict")
    assert result.exit_code == 0, result.stderr
    assert "trained without a latent" in result.stderr
    assert f"--baseline {out}" in result.stderr
    for claim in ("information", "carries", "from its z", "collapsed"):
        assert claim not in result.stderr


@pytest.mark.parametrize("tokenizer", ["bytes", "tokenizer.json"])
def test_a_size_of_a_vocabulary_that_has_one_is_refused(
    train: Train, names: Path, tmp_path: Path, tokenizer: str
) -> None:
    """It was ignored, and a user believed that it had been heeded."""
    (tmp_path / "c.toml").write_text("[data]\nvocab_size = 300\n")
    said = f"left out where the tokenizer is {tokenizer}"
    flags = ("--tokenizer", tokenizer)
    assert_fails(train(names, *flags, "--vocab-size", "300"), 2, f"--vocab-size is 300, it must be {said}")
    assert_fails(train(names, *flags, "--config", "c.toml"), 2, "c.toml, [data] vocab_size is 300", "--tokenizer bpe")


def test_the_latent_is_added_to_bos_unless_a_token_is_asked_for(train: Train, names: Path, out: Path) -> None:
    """Stored in the model; the commands need not be told."""
    for flags, expected in (
        ([], "bos"),
        (["--conditioning", "token"], "token"),
        (["--objective", "stock"], "token"),
        (["--objective", "stock", "--conditioning", "bos"], "bos"),
    ):
        assert train(names, "--force", "--steps", "2", *flags).exit_code == 0
        assert read_header(out / "model.safetensors").model.conditioning == expected
        written = CliRunner().invoke(app, ["generate", "--model", str(out), "--text", "emma", "--greedy"])
        assert written.exit_code == 0, written.stderr
    assert_fails(
        train(names, "--force", "--conditioning", "everywhere"),
        2,
        "--conditioning is 'everywhere', it must be one of token, bos",
    )
