"""Where the data of a command comes from and goes to: standard input and output, files, pipes and devices.

Standard output is data. Bytes are exact in a pipe or a file, and what a terminal gets is sanitised.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gptvae_cli.arrivals import Item, as_they_come, in_pools
from gptvae_cli.cli.console import discard, sanitize
from gptvae_cli.cli.flags import TextFormat
from gptvae_cli.config import Unit
from gptvae_cli.errors import ConfigError, DataError, GPTVAEError
from gptvae_cli.files import is_no_file, replacing, writing
from gptvae_cli.sources import is_stdin

_HINT = "choose another place, or make room there"
"""Of what cannot be written."""


class NothingToReadError(ConfigError):
    """A command was to read standard input, and that is a terminal; the help of the command goes with it."""


def refuse_terminal_stdin(example: str) -> None:
    """Raises a `NothingToReadError` where standard input is a terminal: nobody types a corpus or a binary."""
    if sys.stdin is not None and sys.stdin.isatty():
        raise NothingToReadError("nothing to read: standard input is a terminal", hint=example)


def is_fed() -> bool:
    """Whether standard input is a pipe or a file with something in it."""
    try:
        found = os.fstat(0)
    except OSError:
        return False
    return stat.S_ISFIFO(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_size > 0)


def pools(items: Iterable[Item], names: Sequence[str]) -> Iterator[list[Item]]:
    """What is read from these sources in long lists, or, where one is a pipe, as it comes."""
    return in_pools(items) if _are_files(names) else as_they_come(items)


def _are_files(names: Sequence[str]) -> bool:
    """Whether all of what is read is there already, none of it in a pipe."""
    try:
        return all(stat.S_ISREG((os.fstat(0) if is_stdin(name) else Path(name).stat()).st_mode) for name in names)
    except OSError:
        return False


def refuse_terminal_stdout(example: str) -> None:
    """Raises a `ConfigError` where standard output is a terminal, to keep a binary off it."""
    if sys.stdout.isatty():
        raise ConfigError("latents are binary, and standard output is a terminal", hint=f"redirect it: {example}")


def is_stdout(name: str | None) -> bool:
    """Whether a name means standard output."""
    return name in (None, "-") or _descriptor(name) == 1


def _descriptor(name: str | None) -> int | None:
    """The open file that a name means, such as `/dev/stderr` or the `/dev/fd/63` of a shell's `>(...)`. Opened by its
    path, a file that it was redirected to would be replaced."""
    match = re.fullmatch(r"/dev/(?:fd/([0-9]{1,9})|stdout|stderr)", name or "")
    return None if match is None else int(match[1] or {"/dev/stdout": 1, "/dev/stderr": 2}[match[0]])


def refuse_stdout(option: str, name: str | None) -> None:
    """Raises a `ConfigError` where a name means standard output, on which two things would be mixed."""
    if name is not None and is_stdout(name):
        raise ConfigError(f"{option} needs a file, standard output is in use", hint=f"{option} FILE")


def refuse_input(option: str, name: str | None, inputs: Sequence[str]) -> None:
    """Raises a `ConfigError` where a command would replace what it reads."""
    for file in inputs:
        with suppress(OSError):
            if name is not None and Path(name).samefile(file):
                raise ConfigError(f"{option} {name} is what is read", hint="name another file")


def called(name: str) -> str:
    """What people call a file, or standard input for `-`."""
    return "stdin" if is_stdin(name) else name


@contextmanager
def source(name: str, *, hint: str = "check the path") -> Iterator[BinaryIO]:
    """A file to read, or standard input for `-`; a `DataError` tells of one that cannot be opened."""
    if is_stdin(name):
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
    path, descriptor = Path(name), _descriptor(name)
    with nullcontext(path) if descriptor is not None or is_no_file(path) else replacing(path) as written:
        with writing(name, _HINT):
            stream = io.BufferedWriter(_NamedFile(written if descriptor is None else os.dup(descriptor), name))
        try:
            if binary and stream.isatty():
                raise ConfigError(f"{name} is a terminal, latents are binary", hint="name a file, or pipe them on")
            yield stream
            with writing(name, _HINT):
                stream.close()
        except BaseException:
            with suppress(OSError, GPTVAEError):
                stream.close()
            raise


class _NamedFile(io.FileIO):
    """A file to write whose errors name it. A command may write to several, and an OSError does not say to which."""

    def __init__(self, file: Path | int, label: str) -> None:
        super().__init__(file, "wb")
        self.label = label

    def write(self, data: Any) -> int:
        with writing(self.label, _HINT):
            return super().write(data)


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
