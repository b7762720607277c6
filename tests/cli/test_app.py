"""What all commands share: help, errors, exit codes, a fast start, and behaviour in pipes and on terminals."""

from __future__ import annotations

import io
import json
import os
import pickle
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from gptvae_cli import __version__
from gptvae_cli.__main__ import main as console_script
from gptvae_cli.cli import console, streams
from gptvae_cli.cli.app import app
from tests.cli.conftest import WIDTH, array
from tests.cli.test_train import assert_fails

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = ["demo", "train", "encode", "generate", "interpolate", "evaluate", "info"]
HEAVY = {"torch", "numpy", "x_transformers", "tokenizers", "safetensors"}
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[red]"
GPTVAE = f"{shlex.quote(sys.executable)} -m gptvae_cli"

Shell = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: it holds a text and a latent, and the environment names the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTVAE_MODEL", str(models / "line.safetensors"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    np.save("z.npy", np.ones((2, WIDTH), np.float32))
    return tmp_path


@pytest.fixture
def shell(here: Path) -> Shell:
    """Runs a line of bash, in which `gptvae` is the command and the exit code is the first command's that failed."""

    def run(script: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        line = f'set -o pipefail; gptvae() {{ {GPTVAE} "$@"; }}; {script}'
        return subprocess.run(["bash", "-c", line], capture_output=True, check=False, timeout=120, **options)

    return run


def run(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)


def assert_one_error(stderr: str, *words: str) -> None:
    lines = stderr.splitlines()
    assert lines[0].startswith("gptvae: error: "), stderr
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), stderr
    for word in words:
        assert word in stderr


# Help -----------------------------------------------------------------------------------------------------------------


def test_the_commands_are_those_that_are_tested_here() -> None:
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []], ids=["help", "h", "nothing"])
def test_help_lists_the_commands_and_examples(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    for word in (*COMMANDS, "--version", "Examples", "gptvae encode - < a.txt | gptvae generate --latent -"):
        assert word in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options_and_gives_examples(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"})
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == CliRunner().invoke(app, [command, "-h"], env={"COLUMNS": "300"}).stdout
    assert "Examples" in result.stdout
    assert re.search(rf"\n +gptvae {command}", result.stdout.partition("Examples")[2])
    options = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    for option in options:
        assert option.help, option.name
        if option.param_type_name == "option":
            assert option.opts[-1] in result.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "info"])
def test_commands_share_their_common_options(command: str) -> None:
    names = {name for option in typer.main.get_command(app).commands[command].params for name in option.opts}  # type: ignore[attr-defined]
    assert {"--device", "-q", "--quiet", "--debug"} <= names
    if command not in ("demo", "train"):
        assert {"--model", "--dtype", "--threads", "--unit"} <= names


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_waiting_threads_spin_shortly_unless_told_otherwise(given: dict[str, str], expected: str | None) -> None:
    shown = "lambda **_: print(os.environ.get('GOMP_SPINCOUNT'))"
    program = f"import os; from gptvae_cli.cli import app; app.app = {shown}; app.main()"
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment | given, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == str(expected)


def test_the_version_is_that_of_the_package() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"gptvae {__version__}\n", "")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_a_command_too(command: str | None) -> None:
    names = [command] if command else []
    assert run("help", *names).stdout == run(*names, "--help").stdout != ""


@pytest.mark.parametrize("command", [None, *COMMANDS])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_help_fits_the_terminal_and_names_are_whole(command: str | None, width: int) -> None:
    """But for what is to be pasted: a name with its values, and an example, stay on one line."""
    arguments = [command] if command else []
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": str(width)})
    text, _, examples = result.stdout.partition("\nExamples\n")
    for line in text.splitlines():
        assert len(line) <= width or re.match(r"  (-\w, )?--[a-z-]+( \S+)?$|Usage: ", line), line
        assert "…" not in line
        assert line == line.rstrip()
    group = typer.main.get_command(app)
    for option in (group.commands[command] if command else group).params:  # type: ignore[attr-defined]
        assert f"{'Usage' if option.param_type_name == 'argument' else option.opts[-1]}" in text
    assert all(line.startswith("  ") and "gptvae" in line for line in examples.rstrip().splitlines())


@pytest.mark.parametrize("width", [50, 80])
def test_in_a_help_names_are_coloured_and_what_they_mean_is_not(width: int) -> None:
    colours = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width)}
    for arguments, names in (([], COMMANDS), (["encode"], ["FILE...", "--out FILE", "-h, --help"])):
        shown = CliRunner().invoke(app, [*arguments, "--help"], env=colours).stdout
        coloured = [name.strip() for name in re.findall(r"\x1b\[36m(.*?)\x1b\[0m", shown, re.DOTALL)]
        assert set(names) <= set(coloured)
        assert all(name in COMMANDS or re.match(r"[A-Z.]+$|-", name) for name in coloured)


# Completion -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def completed(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """What bash offers at the end of a line, as `gptvae --install-completion` teaches it."""
    program = here / "bin" / "gptvae"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {GPTVAE} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def offer(line: str) -> list[str]:
        words = line.split(" ")
        script = (
            'eval "$(gptvae --show-completion)"\n'
            'complete -p gptvae | grep -q -- "-o default" || exit 9\n'  # readline's files, where nothing is offered
            f"COMP_WORDS=({' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}\n"
            "$(complete -p gptvae | sed 's/.*-F \\([^ ]*\\) .*/\\1/') gptvae\n"
            'printf "%s\\n" "${COMPREPLY[@]}"\n'
        )
        process = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert (process.returncode, process.stderr) == (0, "")
        return process.stdout.split()

    return offer


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("gptvae ", [*COMMANDS, "help"]),
        ("gptvae e", ["encode", "evaluate"]),
        ("gptvae he", ["help"]),
        ("gptvae help ev", ["evaluate"]),
        ("gptvae generate --to", ["--top-k", "--top-p"]),
        ("gptvae train --preset m", ["micro", "medium"]),
        ("gptvae train --tokenizer b", ["bytes", "bpe"]),
        ("gptvae train --tokenizer a.t", []),
        ("gptvae encode --device c", ["cpu", "cuda"]),
        ("gptvae encode ", []),
        ("gptvae encode --model ", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bash_completes_commands_options_and_values_and_leaves_files_to_readline(
    completed: Callable[[str], list[str]], line: str, offered: list[str]
) -> None:
    assert completed(line) == offered


@pytest.mark.parametrize(
    ("shell_name", "expected"),
    [("zsh", '_arguments \'*: :(("--preset":"Width, depths and heads under one name.'), ("fish", "--preset\tWidth,")],
)
def test_zsh_and_fish_are_told_what_an_option_does(
    monkeypatch: pytest.MonkeyPatch, shell_name: str, expected: str
) -> None:
    monkeypatch.setenv("_GPTVAE_COMPLETE", f"complete_{shell_name}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "gptvae train --pres")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    assert CliRunner().invoke(app, [], prog_name="gptvae").stdout.startswith(expected)


# Wrong usage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["no such command 'trian'", "train"]),
        (["encode", "--unti", "line"], ["no such option: --unti", "did you mean", "--unit"]),
        (["--bogus"], ["--bogus", "gptvae --help"]),
        (["generate", "extra"], ["extra", "gptvae generate --help"]),
        (["generate", "-n"], ["-n", "argument"]),
        (["generate", "--seed", "x"], ["--seed", "integer"]),
        (["generate", "5"], ["(5)", "--prior a number"]),
        (["generate", "--temp", "1"], ["did you mean --temperature?"]),
        (["generate", "--n", "5"], ["did you mean --copies?"]),
        (["train", "--learning-rate", "1e-3"], ["did you mean --lr?"]),
        (["sample"], ["did you mean generate?"]),
        (["info", "a", "b"], ["b", "gptvae info --help"]),
        (["info", "[red]\x1b[31m", "--b[/red]"], ["--b[/red]"]),
    ],
    ids=lambda value: " ".join(value[:2]) if value[0] in ("generate", "train", "info") else None,
)
def test_wrong_usage_is_one_line_and_what_was_meant(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert_fails(result, 2, *words, hint=False)
    assert_one_error(result.stderr)
    assert "\x1b" not in result.stderr


def test_debug_shows_where_an_error_came_from(here: Path) -> None:
    plain, debugged = run("info", "nowhere"), run("info", "nowhere", "--debug")
    assert "Traceback" not in plain.stderr
    assert plain.exit_code == debugged.exit_code == 3
    assert debugged.stderr.startswith("Traceback (most recent call last):\n")
    assert "CheckpointError" in debugged.stderr
    assert debugged.stderr.endswith(plain.stderr), "the line for people is the last all the same"


def test_without_docstrings_there_is_still_a_help() -> None:
    """As `PYTHONOPTIMIZE=2` leaves them out."""
    for arguments in (["--help"], ["train", "--help"]):
        command = [sys.executable, "-OO", "-m", "gptvae_cli", *arguments]
        assert "Usage: " in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_windows_is_told_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit) as caught:
        console_script()
    assert caught.value.code == "gptvae runs on Linux and macOS; on Windows use it in WSL"
    with pytest.raises(ImportError, match="on Windows use it in WSL"):
        from gptvae_cli import load  # noqa: F401


def test_a_traceback_does_not_control_the_terminal(here: Path) -> None:
    result = run("info", f"nowhere{HOSTILE}", "--debug")
    assert "Traceback" in result.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.stderr)


def torch_out_of_memory(device: str) -> Exception:
    """What torch raises where it wants more memory than a device has."""
    if device == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024.00 GiB.")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    return caught.value


@pytest.mark.parametrize(
    ("problem", "code", "words"),
    [
        (RuntimeError("of\nmany lines"), 1, ["this should not have happened", "RuntimeError: of", "--debug"]),
        (MemoryError(), 1, ["out of memory", "--batch-tokens"]),
        (torch_out_of_memory("cpu"), 1, ["out of memory", "--batch-tokens"]),
        (torch_out_of_memory("cuda"), 1, ["out of memory", "--batch-tokens"]),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), 1, ["out of memory", "--device cpu"]),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `c`"), 1, ["out of memory"]),
        (RuntimeError("CUDA error: an illegal access\nmore"), 1, ["the GPU failed: CUDA error: an illegal access"]),
        (OSError(28, "No space left on device", "z.npy"), 1, ["z.npy: No space left on device"]),
        (KeyboardInterrupt(), 130, []),
    ],
    ids=["bug", "memory", "of torch", "of a GPU", "taken by others", "of cuBLAS", "GPU", "disk", "interrupt"],
)
def test_what_nobody_foresaw_is_no_traceback_either(
    here: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException, code: int, words: list[str]
) -> None:
    def fail(path: str | None) -> Path:
        raise problem

    monkeypatch.setattr("gptvae_cli.header.locate_model", fail)
    result = run("info")
    assert result.exit_code == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "many lines" not in result.stderr
    for word in words:
        assert word in result.stderr


# The environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "command", "words"),
    [
        ("GPTVAE_SEED", "-1", "generate", "is '-1', it must be greater than or equal to 0"),
        ("GPTVAE_SEED", "x", "evaluate", "is 'x', it must be a valid integer"),
        ("GPTVAE_THREADS", "0", "encode", "is '0', it must be greater than or equal to 1"),
        ("GPTVAE_DTYPE", "float23", "interpolate", "is 'float23', it must be one of auto, float32, bfloat16"),
        ("GPTVAE_DEVICE", "tpu", "demo", "is 'tpu', it must be auto, cpu, cuda or cuda:n"),
        ("GPTVAE_DEVICE", "tpu", "train", "is 'tpu', it must be auto, cpu, cuda or cuda:n"),
        ("GPTVAE_THREADS", "0", "train", "is 0, it must be between 1 and 4096"),
        ("GPTVAE_DIM", "two", "train", "is 'two', it must be a whole number"),
        ("GPTVAE_KL_WARMUP", "2", "train", "is 2.0, it must be between 0 and 1"),
        ("GPTVAE_PRESET", "mirco", "train", "is 'mirco', it must be one of auto, nano, micro"),
    ],
)
def test_a_wrong_variable_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, command: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    result = run(command)
    assert_fails(result, 2, f"error: {variable} {words}")
    assert run(command, "--help").exit_code == 0


def test_an_option_goes_over_its_variable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("generate", "--seed", "3").stdout
    monkeypatch.setenv("GPTVAE_SEED", "3")
    by_variable = run("generate")
    assert (by_variable.stdout, by_variable.stderr) == (expected, ""), "no seed was picked, so none is told"
    assert run("generate", "--seed", "4").stdout != expected
    monkeypatch.setenv("GPTVAE_SEED", "x")
    assert run("generate", "--seed", "3").stdout == expected


# Bad input ------------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("trapped",)


GOOD = np.ones((3, WIDTH), np.float32)
BAD_LATENTS: dict[str, tuple[bytes, list[str]]] = {
    "width": (array(GOOD[:, :-1]), ["(3, 7)", "8 dimensions"]),
    "rank": (array(GOOD[None]), ["(1, 3, 8)"]),
    "integers": (array(GOOD.astype(np.int64)), ["integers"]),
    "booleans": (array(GOOD > 0), ["booleans"]),
    "complex": (array(GOOD.astype(np.complex64)), ["complex"]),
    "nan": (array(GOOD * np.array([[1], [np.nan], [1]])), ["row 1", "nan", "not a finite number"]),
    "infinite": (array(GOOD * np.inf), ["row 0", "not a finite number"]),
    "objects": (array(np.array([Trap()], object)), ["Python objects"]),
    "cut": (array(GOOD)[:-1], ["claims 3 latents and holds 2"]),
    "cut-header": (array(GOOD)[:40], ["cut within its header"]),
    "too-long": (array(GOOD) + b"x", ["goes on after its 3 latents"]),
    "terabytes": (
        array(GOOD).replace(b"(3, 8), }" + 12 * b" ", b"(3333333333333, 8), }"),
        ["is cut: it claims 3333333333333"],
    ),
    "pickle": (pickle.dumps(Trap()), ["not a .npy file"]),
    "text": (b"one\ntwo\n", ["not a .npy file"]),
    "empty": (b"", ["it is empty"]),
}


@pytest.mark.parametrize("case", BAD_LATENTS)
@pytest.mark.parametrize("command", ["generate", "interpolate"])
def test_bad_latents_are_named_before_anything_is_written(here: Path, command: str, case: str) -> None:
    data, words = BAD_LATENTS[case]
    (here / "bad.npy").write_bytes(data)
    result = run(command, "--latent", "bad.npy", "-q")
    assert_fails(result, 3, "bad.npy", *words, hint=False)
    assert not (here / "trapped").exists(), "a pickle was run"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nowhere"],
        ["encode", "nowhere"],
        ["generate", "--latent", "nowhere"],
        ["generate", "--ref", "nowhere"],
        ["interpolate", "a.npy", "nowhere"],
        ["interpolate", "--latent", "nowhere"],
        ["evaluate", "nowhere"],
        ["info", "nowhere"],
        ["encode", "a.txt", "--model", "nowhere"],
        ["evaluate", "a.txt", "--model", "nowhere"],
        ["generate", "--model", "nowhere"],
        ["interpolate", "--from", "a", "--to", "b", "--model", "nowhere"],
    ],
    ids=" ".join,
)
def test_what_is_missing_is_named(here: Path, arguments: list[str]) -> None:
    (here / "a.npy").write_bytes(array(GOOD[0]))
    assert_fails(run(*arguments), 3, "nowhere", hint=False)


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["encode"], ["generate", "-q", "--ref"], ["interpolate", "ok.txt"]],
    ids=lambda arguments: str(arguments[0]),
)
def test_bytes_that_are_not_text_are_named_with_their_line(here: Path, arguments: list[str]) -> None:
    (here / "ok.txt").write_text("fine\n")
    (here / "bad.txt").write_bytes(b"fine\nna\xefve\n" if arguments[0] != "interpolate" else b"na\xefve\n")
    out = ["--out", "z.npy"] if arguments[0] == "encode" else []
    line = 1 if arguments[0] == "interpolate" else 2
    assert_fails(run(*arguments, "bad.txt", *out), 3, f"bad.txt, line {line}", "0xef", "UTF-8", "iconv")


@pytest.mark.parametrize("command", ["encode", "generate", "interpolate", "evaluate", "info"])
@pytest.mark.parametrize("case", ["cut", "garbage", "empty", "foreign", "folder", "state"])
def test_a_bad_model_is_named(here: Path, models: Path, command: str, case: str) -> None:
    path, good = here / "bad.safetensors", (models / "line.safetensors").read_bytes()
    words = {
        "cut": ["bytes", "hint: "],
        "garbage": ["not a .safetensors file"],
        "empty": ["not a .safetensors file"],
        "foreign": ["not a gptvae model"],
        "folder": ["no model in"],
        "state": ["training state", "--resume"],
    }[case]
    match case:
        case "cut":
            path.write_bytes(good[:-100])
        case "garbage":
            path.write_bytes(bytes(range(256)) * 40)
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            save_file({"weight": torch.zeros(3)}, path)
        case "folder" | "state":
            path.mkdir()
            if case == "state":
                (path / "state.safetensors").write_bytes(good)
    options = {"encode": ["a.txt"], "evaluate": ["a.txt"], "interpolate": ["--from", "a", "--to", "b"]}.get(command, [])
    assert_fails(run(command, *options, "--model", path), 3, "bad.safetensors", *words)


@pytest.mark.parametrize("command", ["encode", "generate", "interpolate", "evaluate", "info"])
def test_without_a_model_a_command_says_where_it_looked(
    here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    options = {"encode": ["a.txt"], "evaluate": ["a.txt"], "interpolate": ["--from", "a", "--to", "b"]}.get(command, [])
    monkeypatch.setenv("GPTVAE_MODEL", "elsewhere")
    assert_fails(run(command, *options), 3, "no model in elsewhere, named by $GPTVAE_MODEL", "gptvae train")
    monkeypatch.delenv("GPTVAE_MODEL")
    assert_fails(run(command, *options), 3, "no model in ./gptvae-run, the default place", "--model PATH")


@pytest.mark.parametrize(("content", "found"), [(b"", 0), (b"\n\n", 0), (b"one\n", 1)], ids=["empty", "blank", "one"])
def test_a_corpus_needs_two_texts(here: Path, content: bytes, found: int) -> None:
    (here / "few.txt").write_bytes(content)
    assert_fails(run("train", "few.txt", "--steps", "1"), 3, f"{found} non-empty text(s)", "few.txt")


def test_an_existing_run_is_not_overwritten(here: Path) -> None:
    (here / "gptvae-run").mkdir()
    (here / "gptvae-run" / "model.safetensors").write_bytes(b"precious")
    assert_fails(run("train", "a.txt", "--steps", "1"), 2, "holds a run already", "--resume", "--force")
    assert (here / "gptvae-run" / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "a.txt", "--steps", "1", "--out", "a.txt/run"],
        ["encode", "a.txt", "--out", "a.txt/z.npy"],
        ["interpolate", "--from", "a", "--to", "b", "--latents-out", "a.txt/z.npy"],
    ],
    ids=lambda arguments: str(arguments[0]),
)
def test_a_place_that_cannot_be_written_is_a_failure(here: Path, arguments: list[str]) -> None:
    """A folder below a file, which stops root, too."""
    assert_fails(run(*arguments), 1, "a.txt/")
    assert (here / "a.txt").read_text() == "one\ntwo\n\nthree\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "arguments",
    [["encode", "a.txt"], ["generate", "-q"], ["interpolate", "--from", "a", "--to", "b"]],
    ids=lambda arguments: str(arguments[0]),
)
def test_a_gpu_that_is_not_there_is_a_failure(here: Path, arguments: list[str]) -> None:
    assert_fails(run(*arguments, "--device", "cuda"), 1, "device cuda was asked for", "--device cpu")


# A fast start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["help", "train"], 0),
        (["train", "a.txt", "--print-config"], 0),
        (["info"], 0),
        (["generate", "--bogus"], 2),
        (["interpolate", "a.txt"], 2),
        (["generate", "--temperature", "0"], 2),
        (["generate", "--model", "nowhere"], 3),
        (["encode", "nowhere.txt"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_model_does_not_wait_for_torch(here: Path, arguments: list[str], code: int) -> None:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gptvae_cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == code, process.stderr
    imported = {
        line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if line.startswith("import time")
    }
    assert "gptvae_cli.cli.app" in imported
    heavy = HEAVY & imported
    assert not heavy


def test_completion_does_not_wait_for_torch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"_GPTVAE_COMPLETE": "complete_bash", "COMP_WORDS": "gptvae train --pre", "COMP_CWORD": "2"}
    program = (
        "import sys; from gptvae_cli.cli.app import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert process.stdout == "--preset\n"
    assert "gptvae_cli.cli.train" in process.stderr.split()
    assert not HEAVY & set(process.stderr.split())


def test_a_bad_latent_file_is_told_before_torch_is_loaded(here: Path) -> None:
    (here / "bad.npy").write_bytes(array(GOOD[:, :-1]))
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gptvae_cli", "generate", "--latent", "bad.npy", "--greedy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 3
    assert "8 dimensions" in process.stderr
    assert not re.search(r"\| +torch$", process.stderr, re.MULTILINE)


# Pipes ----------------------------------------------------------------------------------------------------------------


def test_latents_flow_through_a_pipeline(shell: Shell) -> None:
    program = "import json, sys; [print(json.loads(line)['text']) for line in sys.stdin]"
    script = (
        "gptvae encode - < a.txt | gptvae generate --latent - --greedy --format jsonl"
        f" | {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    )
    process = shell(script)
    assert (process.returncode, process.stderr) == (0, b"")
    assert process.stdout == run("generate", "--ref", "a.txt", "--greedy").stdout_bytes
    assert process.stdout.count(b"\n") == 4


def test_a_reader_that_has_enough_ends_the_writer_quietly(shell: Shell) -> None:
    """A million texts are never written."""
    process = shell("gptvae generate --prior 1000000 --seed 1 | head -n 3; echo ${PIPESTATUS[0]} >&2")
    assert process.stdout.count(b"\n") == 3
    assert process.stderr == b"141\n"


def test_a_reader_that_does_not_read_ends_the_writer_quietly(shell: Shell) -> None:
    process = shell("gptvae encode a.txt | true; echo ${PIPESTATUS[0]} >&2")
    assert (process.stdout, process.stderr) == (b"", b"141\n")


@pytest.mark.parametrize("arguments", ["info", "--help", "info --json"])
def test_a_short_output_to_nobody_is_quiet_too(shell: Shell, arguments: str) -> None:
    process = shell(f"(sleep 0.1; gptvae {arguments}; echo $? >&2) | true")
    assert process.stderr == b"141\n"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no full device")
@pytest.mark.parametrize("arguments", ["info", "--help", "generate --seed 1"])
def test_a_full_disk_is_one_line(shell: Shell, arguments: str) -> None:
    process = shell(f"gptvae {arguments} > /dev/full")
    assert process.returncode == 1
    assert_one_error(process.stderr.decode(), "No space left on device")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no full device")
def test_messages_that_cannot_be_written_cost_no_data(shell: Shell) -> None:
    written = shell("gptvae generate --prior 2 2>/dev/full")
    assert (written.returncode, written.stdout.count(b"\n")) == (0, 2)
    trained = shell("gptvae train a.txt --out full --preset nano --steps 2 2>/dev/full")
    assert (trained.returncode, trained.stdout) == (0, b"full/model.safetensors\n")
    assert shell("gptvae encode nowhere 2>/dev/full").returncode == 3


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no full device")
def test_a_full_disk_is_named_where_it_has_a_name(here: Path) -> None:
    """And the device is still a device."""
    assert_fails(run("encode", "a.txt", "--out", "/dev/full"), 1, "cannot write /dev/full", "No space left")
    assert_fails(
        run("interpolate", "--from", "a", "--to", "b", "--latents-out", "/dev/full"), 1, "cannot write /dev/full"
    )
    assert Path("/dev/full").is_char_device()


def test_streams_that_are_closed_are_named(shell: Shell) -> None:
    no_input = shell("gptvae encode <&- | cat")
    assert no_input.returncode == 3
    assert_one_error(no_input.stderr.decode(), "cannot read stdin: it is closed")
    no_output = shell("gptvae info >&-")
    assert no_output.returncode == 1
    assert_one_error(no_output.stderr.decode(), "standard output is closed")
    no_errors = shell("gptvae info nowhere 2>&-")
    assert (no_errors.returncode, no_errors.stdout, no_errors.stderr) == (3, b"", b"")


def test_an_interrupt_while_the_command_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the signal does not end the process, as it is the first of a container, the code is the shell's for it."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    raised: list[int] = []
    monkeypatch.setattr("gptvae_cli.cli.app.main", interrupted)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    with pytest.raises(SystemExit) as ended:
        console_script()
    assert (raised, ended.value.code) == ([signal.SIGINT], 130)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "a.txt", "--steps", "1", "--preset", "nano"],
        ["encode", "a.txt"],
        ["generate", "--prior", "1", "--seed", "1"],
        ["interpolate", "--from", "a", "--to", "b"],
        ["evaluate", "a.txt"],
        ["evaluate", "a.txt", "--with-baseline"],
    ],
    ids=["train", "encode", "generate", "interpolate", "evaluate", "baseline"],
)
def test_an_interrupt_while_numpy_is_imported_is_heard(here: Path, arguments: list[str]) -> None:
    """Torch imports it from C and drops what is raised meanwhile: commands went on, with half of it."""
    program = (
        "import signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy.exceptions': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from gptvae_cli.__main__ import main\n"
        "main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_stopped_leaves_no_unfinished_file(here: Path, number: int) -> None:
    """While it waits for more texts. It ends by the signal, as a shell that runs a loop has to see."""
    before = set(here.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-m", "gptvae_cli", "encode", "--out", "new.npy"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs ignore interrupts, and nohup hang-ups, and what they start inherits that.
        preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.SIG_DFL), signal.signal(signal.SIGHUP, signal.SIG_DFL)),
    )
    deadline = time.monotonic() + 60
    while set(here.iterdir()) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert set(here.iterdir()) > before
    process.send_signal(number)
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (-number, b"")
    assert b"Traceback" not in told
    assert set(here.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--seed", "-5"], ["--seed is '-5'", "it must be greater than or equal to 0"]),
        (["generate", "--prior=x"], ["--prior is 'x'", "it must be a valid integer"]),
        (["encode", "--dtype", "f8"], ["--dtype is 'f8'", "one of auto, float32, bfloat16"]),
        (["encode", "--unit", "lines"], ["hint: did you mean line?"]),
        (["generate", "--device", "tpu"], ["--device is 'tpu'", "auto, cpu, cuda or cuda:n"]),
        (["interpolate", "--steps", "1"], ["--steps is '1'", "greater than or equal to 2"]),
        (["generate", "-n"], ["-n", "requires an argument"]),
    ],
    ids=lambda value: value[1] if value[0] in ("generate", "encode", "interpolate") else "",
)
def test_a_wrong_option_is_told_what_was_expected_and_found(arguments: list[str], words: list[str]) -> None:
    result = run(*arguments)
    assert_fails(result, 2, *words)
    assert "Value error" not in result.stderr


# Terminals ------------------------------------------------------------------------------------------------------------


def on_a_terminal(arguments: Sequence[str], *, stdin: bool = False, stdout: bool = False) -> tuple[int, str, str]:
    """Exit code, what the terminal shows and what stderr, a pipe, holds."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gptvae_cli", *arguments],
        stdin=follower if stdin else subprocess.DEVNULL,
        stdout=follower if stdout else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    os.close(follower)
    _, told = process.communicate(timeout=120)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    return process.returncode, shown.decode(), told.decode()


@pytest.mark.parametrize("arguments", [["encode", "a.txt"], ["encode", "a.txt", "--out", "-"]], ids=" ".join)
def test_a_binary_never_goes_to_a_terminal(here: Path, arguments: list[str]) -> None:
    code, shown, told = on_a_terminal(arguments, stdout=True)
    assert (code, shown) == (2, "")
    assert_one_error(told, "binary", "standard output is a terminal", "> z.npy")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["encode"],
        ["evaluate"],
        ["generate", "--latent", "-"],
        ["generate", "--ref", "-"],
        ["interpolate", "-", "a.txt"],
    ],
    ids=" ".join,
)
def test_nobody_has_to_type_a_corpus_or_a_binary(here: Path, arguments: list[str]) -> None:
    """The help tells what else can be done; it is not data, so it goes to stderr."""
    code, _, told = on_a_terminal(arguments, stdin=True)
    assert code == 2
    assert f"gptvae {arguments[0]} [OPTIONS]" in told
    assert "Examples" in told
    assert "gptvae: error: nothing to read: standard input is a terminal" in told


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, False),
    ],
    ids=["pipe", "forced", "no-color", "dumb"],
)
def test_colours_are_as_the_environment_wants_them(here: Path, environment: dict[str, str], coloured: bool) -> None:
    """In help and errors; and nothing moves where nobody watches, whatever is forced."""
    base = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    for arguments in (["--help"], ["info", "nowhere"], ["encode", "a.txt", "--out", "new.npy"]):
        process = subprocess.run(
            [sys.executable, "-m", "gptvae_cli", *arguments],
            env={**base, "TERM": "xterm-256color", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        shown = process.stdout + process.stderr
        moves = re.findall(r"\x1b\[[^m]*[A-Za-ln-z]|\r", shown)
        assert not moves
        if arguments[0] != "encode":
            assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]m", shown)) == coloured


def test_texts_do_not_control_the_terminal_and_are_exact_in_a_pipe(here: Path) -> None:
    arguments = ["generate", "--text", "a", "--greedy", "--max-tokens", "20", "--prompt", HOSTILE]
    code, shown, told = on_a_terminal(arguments, stdout=True)
    assert (code, told) == (0, "")
    assert shown.startswith("\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e[red]")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", shown)
    assert run(*arguments).stdout.startswith(HOSTILE)


def test_texts_in_pieces_do_not_control_the_terminal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(shown, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", shown)
    printer = streams.TextWriter("text", "line", null=False)
    for piece in HOSTILE:
        printer.piece(piece)
    printer.end()
    printer.write(HOSTILE)
    printer.piece("")
    assert isinstance(shown.buffer, io.BytesIO)
    assert shown.buffer.getvalue().decode() == 2 * (console.sanitize(HOSTILE) + "\n")


def test_a_nul_inside_a_text_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of bytes may write one, and `xargs -0` then saw two texts."""
    written = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", written)
    printer = streams.TextWriter("text", "paragraph", null=True)
    printer.write("a\0b")
    for piece in ("c", "\0", "d"):
        printer.piece(piece)
    printer.end()
    streams.TextWriter("text", "line", null=False).write("e\0f")
    assert isinstance(written.buffer, io.BytesIO)
    assert written.buffer.getvalue() == b"ab\0cd\0e\0f\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain naïve 日本 😀\n\t", "plain naïve 日本 😀\n\t"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b\x85", "\\x9b\\x85"),
        ("\r\x08\x7f\x00", "\\x0d\\x08\\x7f\\x00"),
        ("\u202e\u2066\u200f\u061c", "\\u202e\\u2066\\u200f\\u061c"),
        ("\udcff", "\\udcff"),
    ],
    ids=["plain", "escape", "c1", "c0", "bidi", "surrogate"],
)
def test_controls_are_spelled_out(text: str, shown: str) -> None:
    assert console.sanitize(text) == shown


def test_json_lines_are_one_line_each_whatever_the_text_holds(here: Path) -> None:
    result = run(
        "generate", "--text", "a", "--unit", "paragraph", "--prompt", "a\n\u2028\x85b", "--format", "jsonl", "-q"
    )
    assert result.stdout_bytes.count(b"\n") == 1
    assert json.loads(result.stdout_bytes)["text"].startswith("a\n\u2028\x85b")
