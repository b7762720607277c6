"""Files that are replaced in one step, behind links, and on the disk before anything counts on them."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gptvae_cli.errors import GPTVAEError

_WRITE_HINTS = {
    errno.ENOSPC: "free some space; what was there is unchanged",
    errno.EDQUOT: "free some space; what was there is unchanged",
    errno.EACCES: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "make the folder first",
}
NO_ROOM = "make room there, or choose a folder on another disk with --out; what was there is unchanged"
"""A hint where it is the folder of a run that cannot be written to."""


def write_atomically(path: Path, write: Callable[[Path], object], *, previous_name: str | None = None) -> None:
    """As `replacing`, whatever fails; `write` writes the new content to the path that it is given."""
    with replacing(path, previous_name=previous_name) as new, writing(path):
        write(new)


@contextmanager
def replacing(path: Path, *, previous_name: str | None = None) -> Iterator[Path]:
    """Replaces a file in one step: readers, and whoever comes after a crash, see the old one or the new one.

    A new file gets the mode that the umask gives, one that is replaced keeps its own. A symbolic link is kept and the
    file it points to replaced.

    Args:
        previous_name: keep a file that is replaced under this name in the same folder.

    Yields:
        The path to write the new content to. Where that fails, a file that was there is unchanged.

    Raises:
        GPTVAEError: where a file cannot be made there, or be replaced; likewise.
    """
    with ExitStack() as stack:
        with writing(path):
            target = behind_links(path)
            exists = _is_replaceable(target)
            # A folder of its own, in the same file system: whatever is left in it by a failure goes with it.
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(
                    dir=target.parent, prefix=f".{target.name}.", suffix=".tmp", ignore_cleanup_errors=True
                )
            )
        new = Path(folder) / target.name
        yield new
        with writing(path):
            sync(new)
            # The only way to learn the umask without changing it for every thread is to make a file.
            probe = Path(folder) / "mode"
            probe.touch()
            mode = stat.S_IMODE((target if exists else probe).stat().st_mode)
            # All files of some systems, as of Windows's disks in WSL, have one mode, and asking for it is an error.
            if stat.S_IMODE(new.stat().st_mode) != mode:
                new.chmod(mode)
            if previous_name is not None and exists:
                target.replace(target.with_name(previous_name))
            new.replace(target)
    sync_folder(target.parent)


@contextmanager
def writing(name: str | Path, hint: str | None = None) -> Iterator[None]:
    """Says of an error of the system, unless it is a closed pipe, which file could not be written.

    Args:
        name: of the file.
        hint: by default what helps against this error, where what was there is unchanged.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        hint = hint or _WRITE_HINTS.get(error.errno or 0, "what was there is unchanged")
        raise GPTVAEError(f"cannot write {name}: {error.strerror or error}", hint=hint) from error


def remove_file(path: Path) -> None:
    """Removes a file that `write_atomically` made. A symbolic link to it is kept, for the next one."""
    behind_links(path).unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Removes what a `replacing` left there whose process was killed. Nobody else may be writing the file."""
    target = behind_links(path)
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def behind_links(path: Path) -> Path:
    """Where a path leads, whether there is something or not."""
    return Path(os.path.realpath(path))  # unlike `Path.resolve` it leaves a loop of links to the call that follows


def leads_elsewhere(path: Path) -> bool:
    """Whether there is a link to something of another name: what is of the same one was put on another disk."""
    return path.is_symlink() and behind_links(path).name != path.name


def is_utf8(path: Path) -> bool:
    """Whether a name is valid Unicode. On the disk it may hold any bytes, which arrive as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in str(path))


def _is_replaceable(target: Path) -> bool:
    """Whether there is a file to replace.

    Raises:
        GPTVAEError: for a folder, a device or a pipe, which a rename would destroy.
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise GPTVAEError(f"cannot write {target}: it is {kind}, not a file", hint="choose another name")
    return True


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """As `sync`, where the file system can: some network file systems cannot, and the file is in place all the same."""
    with suppress(OSError):
        sync(folder)


def is_no_file(path: Path) -> bool:
    """Whether a folder, a device or a pipe is there, which a rename would destroy, or a link to one or to itself."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
    except OSError:
        return True
