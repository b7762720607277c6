"""The log of a run as TensorBoard's event files, RUN/tensorboard/, with `--log tensorboard`.

`torch.utils.tensorboard` writes them, and needs the package `tensorboard`, an extra. Nothing of either is imported
where nobody asks for this log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptvae_cli.config import Log
from gptvae_cli.errors import ConfigError, GPTVAEError
from gptvae_cli.files import is_utf8

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


def remove_events(folder: Path) -> None:
    """Removes the event files of a run, and their folder if nothing else is in it; what a link leads to stays."""
    if (folder / EVENTS_NAME).is_symlink():
        return
    for path in (folder / EVENTS_NAME).glob("events.out.tfevents.*"):
        path.unlink()
    with suppress(OSError):  # it is not empty, or not there
        (folder / EVENTS_NAME).rmdir()
