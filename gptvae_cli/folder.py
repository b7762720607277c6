"""A run folder: what lies in it, whose it is, and how it is cleared. What is not gptvae's stays as it is.

RUN/model.safetensors        the best model so far, alone all that other commands need
RUN/state.safetensors        the last step: weights, optimizer, counters (and state.prev.safetensors)
RUN/metrics.jsonl            one JSON object for every few seconds and every validation
RUN/tensorboard/             the log for TensorBoard, with `--log tensorboard`
RUN/cache/                   the corpus as tokens
RUN/config.json, tokenizer.json, README.md
                             for other programs and for people, see `hub.py`
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptvae_cli.checkpoint import remove_state, state_exists
from gptvae_cli.corpus import is_cache_file
from gptvae_cli.errors import BusyError, CheckpointError, ConfigError, GPTVAEError
from gptvae_cli.files import is_no_file, leads_elsewhere, remove_file, remove_unfinished, sync, sync_folder
from gptvae_cli.header import CACHE_NAME, METRICS_NAME, MODEL_NAME, STATE_NAME, VERSION_KEY, read_layout
from gptvae_cli.hub import COMPANION_NAMES, remove_companions
from gptvae_cli.log import remove_log

NEW_CACHE_NAME = "cache.part"
SHARED_CACHE = Path("..", CACHE_NAME)
"""What the cache of a baseline, which lies in the folder of its model, is a link to."""
_FILES = (MODEL_NAME, STATE_NAME, "state.prev.safetensors", METRICS_NAME)


@contextmanager
def claimed(folder: Path, *, resume: bool, force: bool) -> Iterator[None]:
    """Makes the folder, and keeps every other training run out of it meanwhile.

    Args:
        resume: there must be a state to go on from.
        force: an earlier run may be there; `start` replaces it once the new corpus has been read.

    Raises:
        BusyError: where another process is training in it.
        ConfigError: for an existing run without `resume` or `force`.
        CheckpointError: for `resume` without a state.
        GPTVAEError: for a folder that cannot be written.
    """
    with _locked(folder):
        if resume and not state_exists(folder / STATE_NAME):
            raise CheckpointError(f"no run to resume in {folder}", hint="start one without --resume")
        # A folder may come from a stranger: no link in it may lead what is written to any file of the user's.
        foreign = [path for name in (*_FILES, *COMPANION_NAMES) if leads_elsewhere(path := folder / name)]
        foreign += [path for name in _FILES if is_no_file(path := folder / name) or _is_foreign(path)]
        caches = [NEW_CACHE_NAME] if resume else [NEW_CACHE_NAME, CACHE_NAME]
        foreign += filter(None, (_foreign_in(folder / name) for name in caches))
        if foreign:
            raise ConfigError(
                f"{foreign[0]} is in the way and is not of gptvae's making", hint="choose another folder with --out"
            )
        if not (resume or force) and any((folder / name).exists() for name in _FILES):
            raise ConfigError(f"{folder} holds a run already", hint="--resume goes on with it, --force replaces it")
        # What a run left that was killed while it wrote: nobody writes now.
        for name in (*_FILES, *COMPANION_NAMES):
            remove_unfinished(folder / name)
        shutil.rmtree(folder / NEW_CACHE_NAME, ignore_errors=True)
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within, the folder is there, and ours alone; one that was made for it and is empty goes again."""
    was_there, locked = folder.exists(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise GPTVAEError(
            f"cannot make the run folder {folder}: {error.strerror}", hint="choose another one with --out"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise BusyError(
                f"{folder} is in use by another training run", hint="wait for it, or choose another folder with --out"
            ) from error
        except OSError as error:  # some network file systems know no locks
            raise GPTVAEError(
                f"cannot lock {folder}: {error.strerror}", hint="choose a folder on another disk with --out"
            ) from error
        if not os.access(folder, os.W_OK):
            raise GPTVAEError(f"cannot write to {folder}: it is not writable", hint="choose another one with --out")
        yield
    finally:
        # While it is ours: an empty folder may be another run's, which has just claimed it.
        if locked and not was_there and not any(folder.iterdir()):
            folder.rmdir()
        os.close(handle)


def _is_foreign(path: Path) -> bool:
    """Whether another program wrote a file that has the name of one of ours; of a damaged one nobody can tell."""
    try:
        if path.name != METRICS_NAME:
            return VERSION_KEY not in read_layout(path).metadata
        with path.open("rb") as file:
            first = json.loads(file.readline())
        return not (isinstance(first, dict) and "step" in first)
    except (CheckpointError, OSError, ValueError, RecursionError):
        return False


def _foreign_in(cache: Path) -> Path | None:
    """Something in the place of the cache that a corpus did not leave there, such as a folder of the user's own."""
    if not os.path.lexists(cache):
        return None
    if cache.is_symlink() or not cache.is_dir():
        return None if cache.is_symlink() and cache.readlink() == SHARED_CACHE else cache
    return next(
        (path for path in sorted(cache.iterdir()) if not (is_cache_file(path.name) or _is_finder_s(path))), None
    )


def _is_finder_s(path: Path) -> bool:
    """Whether macOS leaves a file of this name: in a folder that was looked at, and on a disk of another system."""
    return path.name == ".DS_Store" or path.name.startswith("._")


def remove_run(folder: Path, *, replaced: bool = False) -> None:
    """Removes what a run left in its folder, and nothing else.

    Args:
        replaced: leaves the model, and what lies beside it, and the corpus as tokens, until others take their place:
            a model may be in use.
    """
    if not replaced:
        remove_companions(folder)  # which are known by the model
        remove_file(folder / MODEL_NAME)
    remove_state(folder / STATE_NAME)  # before the cache, without which it would only be in the way
    if not replaced:
        _remove_cache(folder / CACHE_NAME)
    remove_log(folder)


def place_cache(new: Path, folder: Path) -> None:
    """Puts the new cache in the place of an old one, which may be damaged. It is on the disk before any state that
    needs it: a power cut may come.

    Raises:
        ConfigError: where something else is in its place.
    """
    cache = folder / CACHE_NAME
    if foreign := _foreign_in(cache):
        raise ConfigError(f"{foreign} is in the way and is not of gptvae's making", hint="move it elsewhere")
    for path in new.iterdir():
        sync(path)
    sync_folder(new)
    _remove_cache(cache)
    new.rename(cache)
    sync_folder(folder)


def _remove_cache(cache: Path) -> None:
    if cache.is_symlink():
        cache.unlink()
    shutil.rmtree(cache, ignore_errors=True)  # what stays is in the way of a new one, which then tells
