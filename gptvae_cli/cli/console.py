"""The terminal: what people read on stderr.

What a corpus or a model wrote may hold anything, so it reaches a terminal only through `sanitize`.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, OverflowMethod
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from rich.live import Live

    from gptvae_cli.checkpoint import Checkpoint
    from gptvae_cli.config import DType


class Terminal(Console):
    """A console whose live displays leave room for a shell: nothing moves in the background, and Ctrl-Z shows the
    cursor and leaves a display as it is, which goes on below."""

    @property
    def is_interactive(self) -> bool:
        """Whether something may move; Rich asks whenever it draws."""
        try:
            # 0 is a group that cannot be seen from inside a container.
            return self._movable and os.tcgetpgrp(self.file.fileno()) in (0, os.getpgrp())
        except (OSError, ValueError):  # a string, or another session's terminal
            return self._movable

    @is_interactive.setter
    def is_interactive(self, movable: bool) -> None:
        self._movable = movable

    def set_live(self, live: Live) -> bool:
        is_first = super().set_live(live)
        if is_first and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, self._stop)
        return is_first

    def clear_live(self) -> None:
        if len(self._live_stack) == 1 and signal.getsignal(signal.SIGTSTP) == self._stop:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        super().clear_live()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        live, descriptor = self._live_stack[0], self.file.fileno()
        # Its thread does not draw meanwhile; it may be waiting for what this one was just printing.
        held = live._lock.acquire(timeout=1)
        os.write(descriptor, b"\n\x1b[?25h")  # not by the file, which this may have interrupted
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        signal.signal(number, self._stop)
        live._live_render._shape = None  # or it would go up, over what was typed
        if self.is_interactive:
            os.write(descriptor, b"\x1b[?25l")
        if held:
            live._lock.release()


# FORCE_COLOR may colour a file, but nothing is to move there, nor in a notebook, which calls itself a terminal and does
# not know how to move up. On a dumb terminal, Rich sees to that itself.
_movable = None if sys.stderr is not None and sys.stderr.isatty() and "JPY_PARENT_PID" not in os.environ else False
stderr = Terminal(stderr=True, highlight=False, force_interactive=_movable)
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


def writable(text: str, encoding: str) -> str:
    r"""What a stream makes of a text, where that is not UTF-8: `\u4e2d` takes more cells than the character."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str) -> str:
    """Sanitised text on one line."""
    return sanitize(text).replace("\n", "\\n")


def discard(*streams: TextIO) -> None:
    """Sends nowhere what is still to be written to a closed pipe, a full disk or a terminal that is gone."""
    with suppress(OSError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        for stream in streams:
            os.dup2(nowhere.fileno(), stream.fileno())


def _print(*lines: Text, **options: Any) -> None:
    """Prints for people. Where that fails, as on a full disk, the command goes on without: its data matter more."""
    try:
        stderr.print(*lines, **options)
    except OSError:  # but for a closed pipe, of which Rich makes a SystemExit
        discard(sys.stderr)


def _is_watched() -> bool:
    """Whether there is a terminal, with a width: FORCE_COLOR lets Rich take a file for one."""
    return stderr.file.isatty()


def note(text: str | None, *, quiet: bool = False) -> None:
    """A line for people, where there is something to say; on a terminal it breaks between words, in a file nowhere."""
    if text is not None and not quiet:
        _print(Text(one_line(text)), soft_wrap=not _is_watched())


def pick_seed(seed: int | None, *, quiet: bool) -> int:
    """The seed that was given, or a new one, which a note tells."""
    if seed is None:
        seed = secrets.randbelow(2**32)
        note(f"seed {seed}; --seed {seed} gives the same again", quiet=quiet)
    return seed


def command(text: str, *, quiet: bool = False) -> None:
    """A command for people, in one piece, so that it can be pasted."""
    if not quiet:
        _print(Text(one_line(text)), soft_wrap=True)


def heading(text: str, *, quiet: bool = False) -> None:
    """A heading over the notes that follow."""
    if not quiet:
        _print()
        _print(Text(one_line(text), style="bold"), soft_wrap=True)


def pair(text: str, written: str) -> None:
    """A text, and below it what a model made of it; on a terminal as much as fits on a line each."""
    for label, line in (("text      ", text), ("from its z", written)):
        shown = Text.assemble((f"  {label}  ", "cyan"), writable(one_line(line), stderr.encoding))
        cut: OverflowMethod = "crop" if stderr.options.ascii_only else "ellipsis"
        _print(shown, no_wrap=True, overflow=cut if _is_watched() else "ignore", crop=False)


def error(message: str, hint: str | None) -> None:
    """Says what went wrong in one line, and in another what to do; on a terminal they break between words."""
    whole = not _is_watched()
    _print(Text.assemble(("gptvae: error: ", "bold red"), (one_line(message), "red")), soft_wrap=whole)
    if hint:
        _print(Text.assemble(("hint: ", "bold"), one_line(hint)), soft_wrap=whole)


@contextmanager
def waiting(label: str, *, quiet: bool) -> Iterator[None]:
    """Shows on a terminal that something is under way."""
    if quiet or not stderr.is_interactive:
        yield
        return
    with stderr.status(label, spinner="line" if stderr.options.ascii_only else "dots"):
        yield


def load_model(path: Path, *, device: str, dtype: DType, threads: int | None, quiet: bool) -> Checkpoint:
    """A model to encode and write with, and a note on where and in what it computes, if that is not as usual.

    Raises:
        CheckpointError, DeviceError, ConfigError: as `sampling.open_model`.
    """
    with waiting("loading the model", quiet=quiet):
        from gptvae_cli.device import tune_cpu
        from gptvae_cli.sampling import open_model

        tune_cpu(threads)
        found = open_model(path, device=device, dtype=dtype)
    note(found.note, quiet=quiet)
    return found.checkpoint


@contextmanager
def progress(
    label: str, things: str, *, quiet: bool, total: int | None = None, beside_data: bool = False
) -> Iterator[Callable[[int], None]]:
    """Shows how far a command is: a bar on a terminal, else a plain line now and then.

    Args:
        things: what is counted.
        beside_data: data is printed to stdout meanwhile; nothing is shown where that is a terminal too, and no bar
            where it is a pipe, whose reader may print to the terminal.

    Yields:
        a function to call with the number of things done so far.
    """
    if quiet or (beside_data and sys.stdout.isatty()):
        yield lambda done: None
    elif stderr.is_interactive and not (beside_data and _into_a_pipe()):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        counted = TextColumn("{task.completed:,} " + ("of {task.total:,} " if total else "") + things)
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
