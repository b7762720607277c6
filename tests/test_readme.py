"""README tells the truth: every option and default, every exit code, and every example, here and in the help, runs."""

from __future__ import annotations

import gzip
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
import zstandard
from typer.testing import CliRunner

import gptvae_cli
from gptvae_cli.cli.app import app
from gptvae_cli.cli.help import described
from gptvae_cli.errors import ExitCode
from gptvae_cli.ingest import is_held_out
from gptvae_cli.options import TABLES, keys
from tests.cli.conftest import WIDTH, make_model

ROOT = Path(gptvae_cli.__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*|-[a-z0-9])(?![\w-])")


def section(heading: str) -> str:
    """What README says below a heading, up to the next one of its kind."""
    (text,) = re.findall(rf"^{heading}\b.*?$(.*?)(?=^##|\Z)", README, re.MULTILINE | re.DOTALL)
    return str(text)


def rows(text: str) -> Iterator[list[str]]:
    """The cells of the tables in a text, heads and rules included."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


COMMON = section("## Commands")


def options(command: Any) -> dict[str, Any]:
    """The options of a command by each of their names."""
    return {
        name: parameter
        for parameter in command.params
        if parameter.param_type_name == "option"
        for name in parameter.opts
    }


def default_of(parameter: Any) -> str:
    """As its help tells it."""
    found = re.search(r"\[default: (.*)\]$", described(parameter))
    return found[1] if found else ""


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_documented_with_its_command(name: str) -> None:
    told = set(OPTION.findall(section(f"### gptvae {name}") + COMMON))
    assert set(options(COMMANDS[name])) <= told


def test_the_options_before_a_command_are_documented() -> None:
    assert set(options(GROUP)) <= set(OPTION.findall(COMMON))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_no_table_has_an_option_that_its_command_has_not(name: str) -> None:
    told = {option for row in rows(section(f"### gptvae {name}")) for option in OPTION.findall(row[0])}
    assert told <= set(options(COMMANDS[name]))


def test_no_other_option_is_spoken_of() -> None:
    known = {name for command in (GROUP, *COMMANDS.values()) for name in options(command)}
    known |= {"-h", "--help", "--extra-index-url", "-m", "-q", "-e"}  # of python and pip
    ours = re.sub(r"python -m tests\S+[^`\n]*", "", README)  # benchmarks have options of their own
    assert set(OPTION.findall(ours)) <= known


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_defaults_are_those_of_the_help(name: str) -> None:
    """In a column of their own, one for each option of the row if they differ; else behind "by default"."""
    known, has_column = options(COMMANDS[name]), False
    for cells in rows(section(f"### gptvae {name}")):
        if "default" in cells:
            has_column = True
        names = [option for option in OPTION.findall(cells[0]) if option in known]
        if not names:
            continue
        defaults = [default_of(known[option]) for option in names]
        if has_column:
            assert cells[1].replace("`", "") == ", ".join(dict.fromkeys(defaults)), cells
        else:
            told = re.findall(r"([\w.]+) by default", cells[-1])
            numbers = {default for default in defaults if re.fullmatch(r"[\d.]+", default)}
            assert set(told) == numbers, cells


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_examples(name: str) -> None:
    command = COMMANDS[name]
    assert command.help and command.help.splitlines()[0].endswith(".")
    assert f"gptvae {name}" in command.epilog
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name} has no help"


def test_every_variable_is_one_that_is_read() -> None:
    read = {f"GPTVAE_{key.upper()}" for kind in TABLES.values() for key in keys(kind)} - {"GPTVAE_CORPUS"}
    read |= {parameter.envvar for command in COMMANDS.values() for parameter in command.params if parameter.envvar}
    assert set(re.findall(r"GPTVAE_[A-Z_]+", README)) <= read | {"GPTVAE_MODEL", "GPTVAE_TEST_DATA"}


def test_exit_codes_are_those_that_there_are() -> None:
    told = [code for row in rows(section("## Exit codes")) for code in re.findall(r"\d+", row[0])]
    assert told == [str(int(code)) for code in ExitCode]


# Examples -------------------------------------------------------------------------------------------------------------


def examples() -> list[str]:
    """Command lines in README's blocks, bare or behind a prompt, and in every help."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    helps = [command.epilog for command in (GROUP, *COMMANDS.values())]
    lines = [line.removeprefix("$ ") for text in (*blocks, *helps) for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if re.match(r"(zcat .* \| )?gptvae ", line)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which there is all that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    names = [first + last for first in ("an", "be", "cla", "do") for last in ("na", "lla", "ra", "ria", "ly")]
    text = "".join(f"{name}\n" for name in names)
    for name in ("corpus", "tatoeba_eng", "commands", "descriptions", "ref", "test", "reviews"):
        (folder / f"{name}.txt").write_text(text)
    (folder / "test.labels.txt").write_text("".join(f"{i % 2}\n" for i in range(len(names))))
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"{name}nna\n")
    for name in ("a", "b", "c", "direction"):
        np.save(folder / f"{name}.npy", np.full(WIDTH, ord(name[0]) % 7, np.float32))
    np.save(folder / "z.npy", np.ones((2, WIDTH), np.float32))
    (folder / "reviews.csv").write_text("review,stars\n" + "".join(f'"{name}",5\n' for name in names))
    (folder / "reviews.jsonl").write_text("".join(f'{{"review": "{name}"}}\n' for name in names))
    (folder / "big.txt.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "poems").mkdir()
    (folder / "logs").mkdir()
    (folder / "logs" / "one.log.zst").write_bytes(zstandard.compress(text.encode()))
    (folder / "poems" / "one.txt").write_text("\n\n".join(names))
    salt = next(i for i in range(99) if sum(is_held_out(name.encode(), 0.05, i) for name in names) > 1)
    model = make_model(folder / "model.safetensors", validation={"texts": 30}, corpus={"salt": salt})
    for run in ("gptvae-run", "names-run", "baseline"):
        (folder / run).mkdir()
        shutil.copy(model, folder / run)
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """A copy of the folder to work in, and an environment in which training is short."""
    folder = shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(folder)
    quick = {"STEPS": 2, "PRESET": "nano", "VALID": 0.2, "BATCH_TOKENS": 64, "DTYPE": "float32", "DEVICE": "cpu"}
    for name, value in {**quick, "THREADS": 1, "SEED": 1}.items():
        monkeypatch.setenv(f"GPTVAE_{name}", str(value))
    monkeypatch.delenv("GPTVAE_MODEL", raising=False)
    return folder


def shell(line: str) -> None:
    """Runs a pipeline with redirections, `gptvae` in this process and other programs where they are installed."""
    words = list(shlex.shlex(line, posix=True, punctuation_chars="|<>"))
    stages: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            stages.append([])
        else:
            stages[-1].append(word)
    for program in (stage[0] for stage in stages):
        if program != "gptvae" and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    data: bytes | None = None
    for stage in stages:
        target = stage[stage.index(">") + 1] if ">" in stage else None
        if "<" in stage:
            data = Path(stage[stage.index("<") + 1]).read_bytes()
        program, *arguments = stage[: next((i for i, word in enumerate(stage) if word in "<>"), len(stage))]
        if program == "gptvae":
            result = CliRunner().invoke(app, arguments, input=data)
            assert result.exit_code == 0, result.stderr
            data = result.stdout_bytes
        else:
            data = subprocess.run([program, *arguments], input=data, capture_output=True, check=True).stdout
        assert data or "--out" in arguments, stage
        if target is not None:
            Path(target).write_bytes(data)


def test_there_are_examples_of_every_command() -> None:
    found = {words[words.index("gptvae") + 1] for words in map(shlex.split, examples())}
    assert set(COMMANDS) <= found


@pytest.mark.parametrize("line", [line for line in examples() if not line.startswith("gptvae demo")])
def test_examples_run(here: Path, line: str) -> None:
    """Each by itself, on tiny files of the same names; the demo has tests of its own."""
    if "gptvae train" in line or "--with-baseline" in line:
        shutil.rmtree("gptvae-run")
        shutil.rmtree("baseline")
    if "--with-baseline" in line:
        shell("gptvae train corpus.txt")  # a baseline learns from the cache of the run
    if "--resume" in line:
        shell("gptvae train corpus.txt")
        line += " --steps 3"  # the environment has no say in what a resumed run may do
    if "--config run.toml" in line:
        shell("gptvae train corpus.txt --print-config > run.toml")
    shell(line)


@pytest.mark.parametrize("line", [line for line in examples() if line.startswith("gptvae demo")])
def test_examples_of_the_demo_are_understood(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    COMMANDS[name].make_context(name, arguments)
