"""Every error that a user can cause or meet, and the exit code that goes with it.

    GPTVAEError                1  run-time failure: unwritable folder, full disk
    |-- DeviceError            1  a device that this machine does not have
    |-- ConfigError            2  a field, option or combination that cannot be
    |   `-- FieldError         2  one field with a value that it cannot have
    |-- DataError              3  a corpus or a latent that is missing, unreadable or malformed
    |-- CheckpointError        3  a model or state file that is missing, foreign or broken
    |-- DivergedError          4  a loss that is no longer a number
    |-- CollapsedError         5  a latent that is not being used, under --strict
    `-- BusyError             75  a run folder that another process is training in

The library raises these and never prints or exits; `cli/app.py` renders them once.
"""

from __future__ import annotations

from enum import IntEnum
from functools import partial
from typing import Any

NOT_ON_WINDOWS = "gptvae runs on Linux and macOS; on Windows use it in WSL"


class ExitCode(IntEnum):
    """What a `gptvae` process says to the shell."""

    DONE = 0
    FAILURE = 1
    USAGE = 2
    BAD_INPUT = 3
    DIVERGED = 4
    COLLAPSED = 5
    BUSY = 75
    HUNG_UP = 129
    INTERRUPTED = 130
    CLOSED_PIPE = 141
    TERMINATED = 143


class GPTVAEError(Exception):
    """A failure that can be told in one line.

    Args:
        message: what was asked and what was found, one line, without a full stop.
        hint: what to do about it, one line.
    """

    exit_code = ExitCode.FAILURE

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint is not None:
            self.add_note(f"hint: {hint}")  # for a traceback


class DeviceError(GPTVAEError):
    """A device was asked for that is not there."""


class ConfigError(GPTVAEError):
    """An option, a field of a configuration or a combination of them is not allowed."""

    exit_code = ExitCode.USAGE


class FieldError(ConfigError):
    """One field of a configuration has a value that it cannot have.

    Args:
        label: what the place where it was set calls the field; by default its name as a flag has it.
    """

    def __init__(
        self, field: str, value: object, allowed: str, *, label: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(f"{label or field.replace('_', '-')} is {value!r}, it must be {allowed}", hint=hint)
        self.field, self.value, self.allowed, self.label = field, value, allowed, label

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew of its parts where it comes from another process, as it takes more than a message."""
        return partial(FieldError, label=self.label, hint=self.hint), (self.field, self.value, self.allowed)

    def named(self, label: str) -> FieldError:
        """The same error, naming the field as the place where it was set does."""
        return FieldError(self.field, self.value, self.allowed, label=label, hint=self.hint)


class DataError(GPTVAEError):
    """A corpus or a latent file is missing, unreadable or malformed."""

    exit_code = ExitCode.BAD_INPUT


class CheckpointError(GPTVAEError):
    """A model or state file is missing, foreign, damaged or of another shape."""

    exit_code = ExitCode.BAD_INPUT


class DivergedError(GPTVAEError):
    """Training met a loss or a gradient that is not finite."""

    exit_code = ExitCode.DIVERGED


class CollapsedError(GPTVAEError):
    """The trained latent is not being used and `--strict` was given."""

    exit_code = ExitCode.COLLAPSED


class BusyError(GPTVAEError):
    """Another process is writing to this run folder."""

    exit_code = ExitCode.BUSY
