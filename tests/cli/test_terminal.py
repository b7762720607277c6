"""What texts, names and metadata hold never reaches a terminal as a control, but a pipe as it is, in every command.

Every command runs here with a terminal for standard output and error, on a model that knows nothing but controls.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from rich.console import Console
from rich.live import Live
from tokenizers import models as library_models
from typer.testing import CliRunner

from gptvae_cli.cli import console
from gptvae_cli.cli.app import app
from gptvae_cli.tokenizer import Tokenizer
from tests.cli.conftest import make_model
from tests.cli.test_train import QUICK

CONTROLS = [
    "\x1b]0;owned\x07",  # OSC: the title of the window
    "\x1b]8;;http://a\x1b\\",  # OSC: a link
    "\x1b[2J\x1b[31m",  # CSI: the screen, colours
    "\x9b31m\x90\x9c",  # the same in C1
    "\x00\x08\x0c\r\x7f",
    "\u202e\u2066\u200f\u061c\u206a",  # the direction of writing
    "[red]",
    "[/b]",
    "[link=a]",
    ":smile:",
]
HOSTILE = "".join(CONTROLS)
NAME = HOSTILE.replace("/", "").replace("\0", "") + "\udcff"
UNICODE_NAME = NAME.replace("\udcff", "")
"""TOML holds no other."""
OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[0-9]*[AK]|\x1b\[2K")
"""What rich writes: colours, and the moves of a live display."""
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]")

pytestmark = pytest.mark.usefixtures("one_thread")

OnTerminal = Callable[..., str]


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokens are controls and markup, and whose metadata holds them, too."""
    words = library_models.WordLevel({word: i for i, word in enumerate(["[UNK]", *CONTROLS])}, unk_token="[UNK]")
    tokenizer = Tokenizer.from_json(tokenizers.Tokenizer(words).to_str())
    path = tmp_path_factory.mktemp("hostile") / "model.safetensors"
    return make_model(path, tokenizer=tokenizer, steps=1, corpus=HOSTILE, nested={HOSTILE: [HOSTILE]})


@pytest.fixture
def on_terminal(hostile_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnTerminal:
    """Runs a command on a terminal, in this process, and returns what that was sent, rich's own controls removed.

    The working folder holds a corpus of controls under a name of controls.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTVAE_MODEL", str(hostile_model))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "400")  # what is wrapped is not what is in a pipe
    (tmp_path / f"{NAME}.txt").write_text(f"{HOSTILE}\n" * 30, "utf-8", newline="\n")

    def run(*arguments: object, code: int = 0) -> str:
        leader, follower = pty.openpty()
        sent: list[bytes] = []
        reader = threading.Thread(target=lambda: sent.extend(iter(lambda: _read(leader), b"")))
        reader.start()
        with os.fdopen(follower, "w", encoding="utf-8", newline="") as screen, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            with pytest.raises(SystemExit) as ended:
                app(list(map(str, arguments)), prog_name="gptvae")
        reader.join()
        os.close(leader)
        shown = b"".join(sent).decode()
        assert (ended.value.code or 0) == code, shown
        shown = OURS.sub("", shown).replace("\r\n", "\n").replace("\r", "")
        assert not UNPRINTABLE.search(shown), repr(shown)
        return shown

    return run


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:  # how Linux says that nobody has the terminal open any more
        return b""


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prior", "5", "--seed", "1"],
        ["generate", "--prior", "5", "--seed", "1", "--stream"],
        ["generate", "--prior", "5", "--seed", "1", "--format", "jsonl"],
        ["generate", "--prior", "5", "--seed", "1", "--unit", "paragraph"],
        ["generate", "--text", CONTROLS[0], "--prompt", CONTROLS[0], "--seed", "1"],
        ["interpolate", "--from", CONTROLS[0], "--to", CONTROLS[3]],
        ["evaluate", f"{NAME}.txt", "--samples", "1"],
        ["evaluate", f"{NAME}.txt", "--samples", "1", "--json"],
        ["info"],
        ["train", f"{UNICODE_NAME}.txt", "--print-config", "--out", f"{UNICODE_NAME}-out"],
    ],
    ids=lambda arguments: " ".join(argument for argument in arguments if argument.isprintable()),
)
def test_data_is_spelled_out_on_a_terminal_and_exact_in_a_pipe(on_terminal: OnTerminal, arguments: list[str]) -> None:
    shown = on_terminal(*arguments)
    result = CliRunner().invoke(app, arguments)
    piped = result.stdout_bytes.decode("utf-8", "surrogateescape")
    assert shown.rstrip("\n").endswith(console.sanitize(piped).rstrip("\n"))
    if arguments[0] in ("generate", "interpolate") and "jsonl" not in arguments:
        assert any(control in piped for control in CONTROLS[:4])


def test_training_shows_controls_as_text(
    on_terminal: OnTerminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The display, the notes, the verdict with its held-out texts, and the path of the model."""
    corpus = "".join(f"{HOSTILE.replace(chr(13), '')} {i}\n" for i in range(30))
    (tmp_path / f"{NAME}.txt").write_text(corpus, "utf-8", newline="\n")
    arguments = ("train", f"{NAME}.txt", "--valid", "0.5", "--max-seq-len", 96, "--steps", 3, *QUICK)
    monkeypatch.setattr(console.stderr, "_width", 400)  # held-out texts are shown as far as a line goes
    shown = on_terminal(*arguments, "--out", NAME)
    assert "\\x1b]0;owned\\x07" in shown
    assert "[red][/b][link=a]:smile:" in shown, "markup is text"
    result = CliRunner().invoke(app, [*map(str, arguments), "--out", NAME, "--force"])
    assert not UNPRINTABLE.search(result.stderr.replace("\n", "")), "nor does it reach a log"
    assert result.stdout_bytes == f"{NAME}/model.safetensors\n".encode("utf-8", "surrogateescape"), (
        "a pipe gets the name itself"
    )


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["train", f"{NAME}-none.txt"], 3),
        (["train", f"{NAME}*none"], 3),
        (["encode", f"{NAME}.txt", "--out", f"{NAME}/z.npy"], 1),
        (["encode", f"{NAME}.jsonl", "--out", "z.npy"], 3),
        (["encode", f"{NAME}.bad", "--out", "z.npy"], 3),
        (["encode", f"{NAME}.zst", "--out", "z.npy"], 3),
        (["encode", f"{NAME}.parquet", "--out", "z.npy"], 3),
        (["encode", f"{NAME}.txt", "--field", HOSTILE, "--unit", HOSTILE], 2),
        (["generate", "--latent", f"{NAME}.txt"], 3),
        (["generate", "--model", NAME], 3),
        (["generate", f"--{NAME}"], 2),
        (["interpolate", f"{NAME}.txt", f"{NAME}.txt"], 3),
        (["info", f"{NAME}.txt"], 3),
        (["demo", "--out", f"{NAME}.txt"], 1),
        (["train", f"{NAME}.txt", "--config", f"{NAME}.toml"], 2),
        (["train", f"{NAME}-none.txt", "--debug"], 3),
        ([NAME], 2),
    ],
    ids=lambda value: " ".join(part for part in value if part.isprintable()) if isinstance(value, list) else "",
)
def test_errors_spell_out_the_names_and_texts_in_them(
    on_terminal: OnTerminal, tmp_path: Path, arguments: list[str], code: int
) -> None:
    (tmp_path / f"{NAME}.jsonl").write_text(json.dumps({HOSTILE: 1}) + "\n", "utf-8")
    (tmp_path / f"{NAME}.bad").write_bytes(HOSTILE.encode() + b"\xff")
    (tmp_path / f"{NAME}.zst").write_bytes(HOSTILE.encode())
    (tmp_path / f"{NAME}.parquet").write_bytes(HOSTILE.encode())
    (tmp_path / f"{NAME}.toml").write_text(f"[{json.dumps('[red]' + CONTROLS[3])}]\n", "utf-8")
    shown = on_terminal(*arguments, code=code)
    assert "gptvae: error: " in shown
    assert "this should not have happened" not in shown


class Screen(io.StringIO):
    """A string that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("forced", [None, True], ids=["", "FORCE_COLOR"])
def test_a_note_breaks_between_words_on_a_terminal_and_a_command_nowhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, forced: bool | None
) -> None:
    """Nor does a note in a file, whatever is forced: it has no width."""
    make = Screen if is_terminal else io.StringIO
    said, shown, commands = (
        Console(file=make(), force_terminal=forced, width=20, color_system=None, highlight=False) for _ in "abc"
    )
    monkeypatch.setattr(console, "stderr", said)
    console.note("the latent carries 6.2 nats of 30.7")
    broken = ["the latent carries", "6.2 nats of 30.7"]
    assert [line.rstrip() for line in written(said)] == (broken if is_terminal else [" ".join(broken)])
    monkeypatch.setattr(console, "stderr", shown)
    console.pair("a long text of words", "another one")
    lines = ["  text        a lon…", "  from its z  anoth…"]
    assert written(shown) == (
        lines if is_terminal else ["  text        a long text of words", "  from its z  another one"]
    )
    monkeypatch.setattr(console, "stderr", commands)
    console.command("gptvae train --resume --out somewhere")
    assert written(commands) == ["gptvae train --resume --out somewhere"]


@pytest.mark.parametrize("group", [0, os.getpgrp(), 2**30], ids=["unseen", "foreground", "background"])
def test_a_display_that_is_stopped_leaves_room_for_a_shell(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """It was drawn over what was typed meanwhile, without a cursor, and went on in the background."""
    leader, follower = pty.openpty()
    before = signal.getsignal(signal.SIGTSTP)
    with os.fdopen(follower, "w", encoding="utf-8", newline="") as screen:
        shown = console.Terminal(file=screen, force_terminal=True, width=40, color_system=None)
        monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp())
        with Live("above\nbelow", console=shown, auto_refresh=False) as live:
            live.refresh()

            def stop(number: int) -> None:
                assert (number, signal.getsignal(number)) == (signal.SIGTSTP, signal.SIG_DFL)
                os.write(follower, b"$ fg\n")
                monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: group)

            press = signal.raise_signal
            monkeypatch.setattr(signal, "raise_signal", stop)
            press(signal.SIGTSTP)
            live.refresh()
            os.write(follower, b"|")
            monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp())
            live.refresh()
    sent = b"".join(iter(lambda: _read(leader), b""))
    os.close(leader)
    shown_then, _, later = sent.decode().replace("\r\n", "\n").partition("$ fg\n")
    assert shown_then.endswith("above\nbelow\n\x1b[?25h"), "the cursor is back, below"
    again = "" if group == 2**30 else "\x1b[?25labove\nbelow"
    assert later.startswith(f"{again}|"), "below what was typed, if anybody sees it"
    assert signal.getsignal(signal.SIGTSTP) == before


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_to_do_is_as_plain_to_see_as_what_went_wrong(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    """Hints were the faintest of all, and both broke within words."""
    shown = Console(file=Screen() if is_terminal else io.StringIO(), force_terminal=True, width=28, highlight=False)
    monkeypatch.setattr(console, "stderr", shown)
    console.error("a.txt cannot be read", "check its permissions, or ask")
    between = "\n" if is_terminal else " "
    wrong = f"\x1b[1;31mgptvae: error: \x1b[0m\x1b[31ma.txt cannot{between}be read\x1b[0m"
    lines = "\n".join(written(shown)).replace("\x1b[0m\n\x1b[31m", "\n").replace(" \n", "\n")
    assert lines == f"{wrong}\n\x1b[1mhint: \x1b[0mcheck its permissions,{between}or ask"


def written(to: Console) -> list[str]:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue().splitlines()


@pytest.mark.parametrize("notebook", [False, True])
def test_nothing_moves_in_a_notebook(notebook: bool) -> None:
    """Which gives a command a terminal that cannot move up: a display would be there a hundred times, one below the
    other. Jupyter's kernels have the variable."""
    program = "from gptvae_cli.cli.console import stderr; print(stderr.is_interactive)"
    environment = {**os.environ, "TERM": "xterm-color", "FORCE_COLOR": "1", "JPY_PARENT_PID": "1"}
    if not notebook:
        del environment["JPY_PARENT_PID"]
    leader, follower = pty.openpty()
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=follower, check=True, text=True
    )
    os.close(follower)
    os.close(leader)
    assert found.stdout.strip() == str(not notebook)
