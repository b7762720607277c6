"""The log of a run: RUN/metrics.jsonl, a line for every report, and, with `--log tensorboard`, the numbers of these
lines as TensorBoard's event files, RUN/tensorboard/.

`torch.utils.tensorboard` writes these, and needs the package `tensorboard`, an extra. Nothing of either is imported
where nobody asks for this log.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptvae_cli.config import Log
from gptvae_cli.errors import ConfigError, GPTVAEError
from gptvae_cli.files import NO_ROOM, is_utf8, remove_file, write_atomically, writing
from gptvae_cli.header import METRICS_NAME

if TYPE_CHECKING:
    from gptvae_cli.training import StepReport

EVENTS_NAME = "tensorboard"
_FLUSH_SECONDS = 10
_SPEED = ("tokens_per_second", "texts_per_second")


def require_log(folder: Path, log: Log | None) -> None:
    """Finds out that a log cannot be written before hours of training do.

    Raises:
        GPTVAEError: where TensorBoard is asked for and is not installed.
        ConfigError: where it is, for a folder whose name is not UTF-8, in which it cannot write.
    """
    if log is None:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise GPTVAEError(
            f"--log tensorboard was asked for, but it cannot be imported: {error}",
            hint="pip install 'gptvae[tensorboard]'",
        ) from error
    if not is_utf8(folder):
        raise ConfigError(
            f"--log tensorboard cannot write in {folder}: its name is not UTF-8",
            hint="name another --out; metrics.jsonl holds the same figures",
        )


@contextmanager
def open_log(folder: Path, log: Log | None, *, step: int) -> Iterator[Callable[[StepReport], None]]:
    """A function that logs a report; arguments as of `event_log`."""
    with event_log(folder, log, step=step) as write_events:

        def write(report: StepReport) -> None:
            values = {key: value for key, value in asdict(report).items() if value is not None}
            if report.figures is not None:
                values["figures"]["nll_bound"] = report.figures.nll_bound
            append_line(folder / METRICS_NAME, json.dumps({"time": round(time.time(), 3), **values}))
            write_events(values)

        yield write


def append_line(path: Path, line: str) -> None:
    """A line more, on the disk."""
    with writing(path, NO_ROOM), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def event_log(folder: Path, log: Log | None, *, step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that writes what a line of `metrics.jsonl` holds.

    Scalars have the names of that file: `training/` for what was measured on the batches, `validation/` for the
    figures of the held-out texts, `speed/` for tokens and texts a second.

    Args:
        log: None writes nothing.
        step: that the run goes on from; what an earlier session logged behind it is taken back.
    """
    if log is None:
        yield lambda values: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / EVENTS_NAME), purge_step=step + 1, flush_secs=_FLUSH_SECONDS)

    def write(values: Mapping[str, Any]) -> None:
        for name, value in scalars(values).items():
            writer.add_scalar(name, value, values["step"])

    try:
        yield write
    finally:
        writer.close()


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl`, under names that TensorBoard groups."""
    measured = {f"{'speed' if name in _SPEED else 'training'}/{name}": value for name, value in values.items()}
    measured |= {f"validation/{name}": value for name, value in values.get("figures", {}).items()}
    numbers = {name: value for name, value in measured.items() if type(value) in (int, float)}
    return {name: value for name, value in numbers.items() if name not in ("training/step", "training/time")}


def trim_log(folder: Path, step: int) -> None:
    """Drops what the log says of steps after the state's, which will be taken again, and a last line that was cut."""
    path = folder / METRICS_NAME
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        write_atomically(path, lambda new: new.write_bytes(b"".join(kept)))


def is_done(folder: Path, step: int | None = None) -> bool:
    """Whether a run reached its limit, as its log then says of its last step.

    Args:
        step: of its state, which may be that of a later session; None where it has none.
    """
    try:
        lines = (folder / METRICS_NAME).read_bytes().splitlines()
    except OSError:
        return False
    done = [line for line in lines if b'"done": true' in line]
    return bool(done) and step in (None, _step_of(done[-1]))


def _step_of(line: bytes) -> int:
    """The step that a line of the log is about; 0 for one of somebody else."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return 0
    return step if isinstance(step, int) else 0


def remove_log(folder: Path) -> None:
    """Removes the log of a run, and the folder of its events if nothing else is in it; what a link leads to stays."""
    remove_file(folder / METRICS_NAME)
    if (folder / EVENTS_NAME).is_symlink():
        return
    for path in (folder / EVENTS_NAME).glob("events.out.tfevents.*"):
        path.unlink()
    with suppress(OSError):  # it is not empty, or not there
        (folder / EVENTS_NAME).rmdir()
