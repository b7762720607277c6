"""The terminal: what people read on stderr, where data comes from and goes to, and the options commands share.

Standard output is data, standard error is people. What a corpus or a model wrote may hold anything, so it reaches
a terminal only through `sanitize`; in a pipe bytes are exact.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TextIO

import typer
from rich.console import Console
from rich.text import Text

from gptvae_cli.config import DEVICE, DType, Errors, Unit
from gptvae_cli.errors import ConfigError, DataError, GPTVAEError
from gptvae_cli.files import behind_links, is_no_file, sync_folder

# Options --------------------------------------------------------------------------------------------------------------

COMMON = "Model and machine"
DEBUG_KEY = "gptvae.debug"
"""Where `ctx.meta` says whether an error shows its traceback."""


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[DEBUG_KEY] = value
    return value


DEVICES = ["auto", "cpu", "cuda"]


def _check_device(value: str) -> str:
    # Here, and not where the device is looked for, so that a wrong variable is told by its name.
    if DEVICE.fullmatch(value) is None:
        raise typer.BadParameter("auto, cpu, cuda or cuda:n")
    return value


ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="A run folder or a .safetensors file. [default: $GPTVAE_MODEL, else ./gptvae-run]",
        rich_help_panel=COMMON,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        envvar="GPTVAE_DEVICE",
        callback=_check_device,
        autocompletion=lambda: DEVICES,
        help="auto, cpu, cuda or cuda:1.",
        rich_help_panel=COMMON,
    ),
]
DTypeOption = Annotated[
    DType,
    typer.Option(
        envvar="GPTVAE_DTYPE",
        help="Numbers to compute with; auto is float32.",
        rich_help_panel=COMMON,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="GPTVAE_THREADS",
        help="CPU threads. [default: as torch finds best]",
        rich_help_panel=COMMON,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**63 - 1,
        envvar="GPTVAE_SEED",
        help="Seed of everything random. [default: one is picked and printed]",
        rich_help_panel=COMMON,
    ),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="No notes and no progress.", rich_help_panel=COMMON)]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug, rich_help_panel=COMMON),
]
UnitOption = Annotated[Unit | None, typer.Option(help="What one text is. [default: as the model was trained]")]
FieldOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="Of texts in .jsonl, .csv and .parquet files. [default: as the model was trained]"
    ),
]
ErrorsOption = Annotated[
    Errors | None,
    typer.Option(help="Bytes that are not UTF-8 are an error, or U+FFFD. [default: as the model was trained]"),
]
TextFormat = Literal["text", "jsonl"]
TextFormatOption = Annotated[TextFormat, typer.Option(help="Plain texts, or one JSON object a line.")]
NullOption = Annotated[
    bool, typer.Option("-0", "--null", help="End every text with a NUL, for xargs -0; one inside is left out.")
]


def pick_seed(seed: int | None, *, quiet: bool) -> int:
    """The seed that was given, or a new one, which a note tells."""
    if seed is None:
        seed = secrets.randbelow(2**32)
        note(f"seed {seed}; --seed {seed} gives the same again", quiet=quiet)
    return seed


# People ---------------------------------------------------------------------------------------------------------------

# FORCE_COLOR may colour a file, but nothing is to move there; on a dumb terminal, Rich sees to that itself.
_movable = None if sys.stderr is not None and sys.stderr.isatty() else False
stderr = Console(stderr=True, highlight=False, force_interactive=_movable)
PLAIN_SECONDS = 30.0
"""Between lines of progress where there is no terminal."""
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # what turns the direction of writing, or the shape of digits
    "\ud800-\udfff]"  # lone surrogates: bytes of a file name that are not UTF-8
)


def sanitize(text: str) -> str:
    r"""Text for a terminal: controls are spelled out (`\x1b`), but for newline and tab."""
    return _CONTROLS.sub(_spelled_out, text)


def _spelled_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """Sanitised text on one line."""
    return sanitize(text).replace("\n", "\\n")


def note(text: str | None, *, quiet: bool = False) -> None:
    """A line for people, where there is something to say; on a terminal it breaks between words, in a file nowhere."""
    if text is not None and not quiet:
        stderr.print(Text(one_line(text)), soft_wrap=not stderr.is_terminal)


def command(text: str, *, quiet: bool = False) -> None:
    """A command for people, in one piece, so that it can be pasted."""
    if not quiet:
        stderr.print(Text(one_line(text)), soft_wrap=True)


def heading(text: str, *, quiet: bool = False) -> None:
    """A heading over the notes that follow."""
    if not quiet:
        stderr.print()
        stderr.print(Text(one_line(text), style="bold"), soft_wrap=True)


def pair(text: str, written: str) -> None:
    """A text, and below it what a model made of it; on a terminal as much as fits on a line each."""
    for label, line in (("text      ", text), ("from its z", written)):
        shown = Text.assemble((f"  {label}  ", "cyan"), one_line(line))
        stderr.print(shown, no_wrap=True, overflow="ellipsis" if stderr.is_terminal else "ignore", crop=False)


def error(message: str, hint: str | None) -> None:
    """Says what went wrong in one line, and in another what to do."""
    stderr.print(Text.assemble(("gptvae: error: ", "bold red"), (one_line(message), "red")), soft_wrap=True)
    if hint:
        stderr.print(Text(f"hint: {one_line(hint)}", style="dim"), soft_wrap=True)


@contextmanager
def waiting(label: str, *, quiet: bool) -> Iterator[None]:
    """Shows on a terminal that something is under way."""
    if quiet or not stderr.is_interactive:
        yield
        return
    with stderr.status(label):
        yield


@contextmanager
def progress(
    label: str, things: str, *, quiet: bool, total: int | None = None, beside_data: bool = False
) -> Iterator[Callable[[int], None]]:
    """Shows how far a command is: a bar on a terminal, else a plain line now and then.

    Args:
        label: what is being done.
        things: what is counted.
        quiet: shows nothing.
        total: how many there will be, if that is known.
        beside_data: data is printed to stdout meanwhile; nothing is shown where that is a terminal too, and no bar
            where it is a pipe, whose reader may print to the terminal.

    Yields:
        a function to call with the number of things done so far.
    """
    if quiet or (beside_data and sys.stdout.isatty()):
        yield lambda done: None
    elif stderr.is_interactive and not (beside_data and _into_a_pipe()):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        counted = TextColumn("{task.completed:,} " + things)
        columns = (TextColumn("{task.description}"), BarColumn(), counted, TimeElapsedColumn())
        with Progress(*columns, console=stderr, transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        shown = time.monotonic()

        def report(done: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= PLAIN_SECONDS:
                shown = time.monotonic()
                note(f"{label}: {done:,} {things}" + (f" of {total:,}" if total else ""))

        yield report


def _into_a_pipe() -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    except OSError:  # it is none of the system's
        return False


# Data -----------------------------------------------------------------------------------------------------------------


class NothingToReadError(ConfigError):
    """A command was to read standard input, and that is a terminal; the help of the command goes with it."""


def refuse_terminal_stdin(example: str) -> None:
    """Keeps a command from waiting for somebody to type a corpus or a binary.

    Raises:
        NothingToReadError: where standard input is a terminal.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        raise NothingToReadError("nothing to read: standard input is a terminal", hint=example)


def refuse_terminal_stdout(example: str) -> None:
    """Keeps a binary off the terminal.

    Raises:
        ConfigError: where standard output is a terminal.
    """
    if sys.stdout.isatty():
        raise ConfigError("latents are binary, and standard output is a terminal", hint=f"redirect it: {example}")


def is_stdout(name: str | None) -> bool:
    """Whether a name means standard output. Opened by its path, a file that it was redirected to would be replaced."""
    return name in (None, "-", "/dev/stdout", "/dev/fd/1")


def refuse_stdout(option: str, name: str | None) -> None:
    """Keeps two things from being mixed on standard output.

    Raises:
        ConfigError: where the name is that.
    """
    if name is not None and is_stdout(name):
        raise ConfigError(f"{option} needs a file, standard output is in use", hint=f"{option} FILE.npy")


def refuse_input(option: str, name: str | None, inputs: Sequence[str]) -> None:
    """Keeps a command from replacing what it reads.

    Raises:
        ConfigError: where the name is that of one of the inputs.
    """
    for file in inputs:
        with suppress(OSError):
            if name is not None and Path(name).samefile(file):
                raise ConfigError(f"{option} {name} is what is read", hint="name another file")


def called(name: str) -> str:
    """What people call a file, or standard input for `-`."""
    return "stdin" if name == "-" else name


@contextmanager
def source(name: str, *, hint: str = "check the path") -> Iterator[BinaryIO]:
    """A file to read, or standard input for `-`.

    Raises:
        DataError: for one that cannot be opened.
    """
    if name == "-":
        if sys.stdin is None:
            raise DataError("cannot read stdin: it is closed", hint="name a file")
        yield sys.stdin.buffer
        return
    try:
        stream = Path(name).open("rb")  # noqa: SIM115
    except OSError as problem:
        raise DataError(f"cannot read {name}: {problem.strerror}", hint=hint) from problem
    with stream:
        yield stream


@contextmanager
def output(name: str | None, *, binary: bool = False) -> Iterator[BinaryIO]:
    """Where data goes: standard output for None or `-`, else a file, which is there once it is complete.

    A file that was there is replaced then, and stays as it was if the command fails. Devices and pipes are written
    to as they are.

    Args:
        name: of the file.
        binary: what is written is not for a terminal.

    Raises:
        ConfigError: for a name that is empty, or binary that would go to a terminal.
        GPTVAEError: for a file that cannot be written.
    """
    if name == "":
        raise ConfigError("the name of the file to write is empty", hint="name one, or - for standard output")
    if is_stdout(name):
        yield sys.stdout.buffer
        return
    assert name is not None
    in_place = is_no_file(Path(name))
    # A link is kept and the file it points to replaced; the links of /dev/fd lead to no path at all.
    path = Path(name) if in_place else behind_links(Path(name))
    part = path if in_place else path.with_name(f".{path.name}.{os.getpid()}.part")
    with _naming(name):
        stream = io.BufferedWriter(_NamedFile(part, name))
    if binary and stream.isatty():
        stream.close()
        raise ConfigError(f"{name} is a terminal, latents are binary", hint="name a file, or pipe them on")
    try:
        yield stream
        if in_place:
            stream.close()
        else:
            with _naming(name):
                stream.flush()
                os.fsync(stream.fileno())  # or a power cut may leave the name without its content
                stream.close()
                part.replace(path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError, GPTVAEError):
            stream.close()
        if not in_place:
            part.unlink(missing_ok=True)
        raise


class _NamedFile(io.FileIO):
    """A file to write whose errors name it. A command may write to several, and an OSError does not say to which."""

    def __init__(self, path: Path, label: str) -> None:
        super().__init__(path, "wb")
        self.label = label

    def write(self, data: Any) -> int:
        with _naming(self.label):
            return super().write(data)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as problem:
        raise GPTVAEError(
            f"cannot write {name}: {problem.strerror}", hint="choose another place, or make room there"
        ) from problem


def discard(*streams: TextIO) -> None:
    """Sends nowhere what is still to be written to a closed pipe, a full disk or a terminal that is gone."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        for stream in streams:
            os.dup2(nowhere.fileno(), stream.fileno())


def forget_terminal() -> None:
    """Sends nowhere what is still to be written to the terminal, which is gone: that would fail."""
    for stream in (sys.stdout, sys.stderr):
        if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # a closed terminal does not say that it is one
            discard(stream)


def write_text(text: str) -> None:
    """Data on stdout at once: exact UTF-8 in a pipe or a file, sanitised on a terminal.

    The name of a file that is not UTF-8 is written as its bytes, so that the next command finds it.
    """
    if sys.stdout.isatty():
        sys.stdout.buffer.write(sanitize(text).encode(sys.stdout.encoding, "replace"))
    else:
        sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


class TextWriter:
    """Prints texts in the form that was asked for, each at once.

    Lines are lines. Texts of other units hold line breaks, so there is an empty line between them.

    Args:
        format: plain text, or one JSON object a line.
        unit: of the texts.
        null: end every text with a NUL instead, and leave out those that a model of bytes writes inside.

    Raises:
        ConfigError: for NULs in JSON.
    """

    def __init__(self, format: TextFormat, unit: Unit, *, null: bool) -> None:
        if null and format == "jsonl":
            raise ConfigError("-0 and --format jsonl exclude each other")
        self._format = format
        self._null = null
        self._end = "\0" if null else "\n"
        self._between = "" if null or unit == "line" else "\n"
        self._due = ""  # what still has to be printed before the next text

    def write(self, text: str, **fields: int | None) -> None:
        """Prints a text; the fields go with it in JSON, where they are not None."""
        if self._format == "jsonl":
            known = {name: value for name, value in fields.items() if value is not None}
            write_text(json.dumps({**known, "text": text}, ensure_ascii=False) + "\n")
        else:
            write_text(self._due + self._inside(text) + self._end)
            self._due = self._between

    def piece(self, text: str) -> None:
        """Prints a piece of a plain text."""
        write_text(self._due + self._inside(text))
        self._due = ""

    def end(self) -> None:
        """Ends a plain text that was printed in pieces."""
        self.write("")

    def _inside(self, text: str) -> str:
        return text.replace("\0", "") if self._null else text
