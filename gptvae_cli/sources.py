"""Where texts come from: files, folders, patterns and standard input, plain or packed.

`zstandard` and `pyarrow` are extras, loaded only for a file that needs them.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from stat import S_ISDIR
from typing import Any, BinaryIO

from gptvae_cli.errors import ConfigError, DataError, GPTVAEError
from gptvae_cli.header import METRICS_NAME, MODEL_NAME, STATE_NAME

STDIN = "-"
STDIN_RECORDS = "-.jsonl"
"""Standard input again, where its lines are JSON."""
_FOLDER_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst", ".parquet")
_PACKINGS = {".gz": "gzip", ".zst": "Zstandard"}
_EXTRAS = {".zst": ("zstandard", "zstd"), ".parquet": ("pyarrow", "parquet")}
"""The packages that read these, and the extras that bring them."""
_EXCERPTS = 64
"""Places that an excerpt is from."""
_ZSTD_PIECE = 2**10
"""Bytes that are unpacked at once. Four bytes may stand for 128 kB, so at most 32 MB come of it."""


def expand(sources: Sequence[str]) -> list[str]:
    """The files that names stand for, in order; `-` stays as it is.

    A folder stands for the files below it with one of the endings of texts, sorted by path. A name with `*`, `?` or
    `[` that no file has is a pattern, as a shell's, `**` for any folders, and stands for the files that match it,
    sorted by path.

    Raises:
        ConfigError: for standard input where it is named twice.
        DataError: for a name that stands for nothing, or that cannot be looked up.
        GPTVAEError: for a file that needs a package which is not installed.
    """
    files = [file for source in sources for file in _expand(source)]
    if sum(map(is_stdin, files)) > 1:
        raise ConfigError("standard input was named twice, and can be read once", hint="leave one - out")
    for file in files:
        package, extra = _EXTRAS.get(ending(file), (None, None))
        if package is not None and find_spec(package) is None:
            raise GPTVAEError(
                f"reading {file} needs the package {package}, which is not installed",
                hint=f"pip install 'gptvae[{extra}]'",
            )
    return files


def is_stdin(file: str) -> bool:
    """Whether a name means standard input, of whatever form."""
    return file in (STDIN, STDIN_RECORDS)


def ending(file: str, *, unpacked: bool = False) -> str:
    """The last ending of a file's name, in lower case: `.gz` of `A.TXT.GZ`, or `.txt` of what is `unpacked`."""
    name = Path(file.lower())
    return name.with_suffix("").suffix if unpacked and name.suffix in _PACKINGS else name.suffix


def is_packed(file: str) -> bool:
    """Whether what is read of a file is not its bytes."""
    return ending(file) in _PACKINGS


def excerpt(files: Sequence[str], most: int) -> bytes:
    """Lines from all of some plain files, about as many bytes of them as wanted."""
    starts = list(accumulate((Path(file).stat().st_size for file in files), initial=0))
    pieces = []
    for number in range(_EXCERPTS):
        place = starts[-1] * number // _EXCERPTS
        index = bisect_right(starts, place) - 1
        with Path(files[index]).open("rb") as raw:
            raw.seek(place - starts[index])
            data = raw.read(most // _EXCERPTS)
        if place > starts[index]:
            data = data[data.find(b"\n") + 1 :]  # what is left of a line; all of it where there are none
        pieces.append(data[: data.rfind(b"\n") + 1] or data + b"\n")
    return b"".join(pieces)


def _expand(source: str) -> list[str]:
    if is_stdin(source):
        return [source]
    with reading_errors(source):
        try:
            is_folder = S_ISDIR(Path(source).stat().st_mode)
        except FileNotFoundError:
            if not glob.has_magic(source):
                raise
            return _matches(source)
        if not is_folder:
            return [source]
        paths = [path for path in _below(source) if not _is_log(path)]
        texts = [path for path in paths if path.name.lower().endswith(_FOLDER_ENDINGS)]
        # A pipe or a device has no end. What is not there, as behind a link, is told when it is read.
        files = sorted(path for path in texts if path.is_file() or not path.exists())
    if not files:
        raise DataError(
            f"found no texts in the folder {source}: no file ends in {', '.join(_FOLDER_ENDINGS)}",
            hint="name files with other endings one by one, or with a pattern: 'FOLDER/*.log'",
        )
    return [str(file) for file in files]


def _below(folder: str) -> Iterator[Path]:
    """All files of a folder and of those in it, but hidden ones: macOS puts a `._poem.txt` beside a `poem.txt`."""
    # Not Path.rglob, which passes over folders that it may not read.
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _is_log(path: Path) -> bool:
    """Whether a file is the log of a run: a corpus may be `.`, where `./gptvae-run` is as well."""
    return path.name == METRICS_NAME and any((path.parent / name).exists() for name in (MODEL_NAME, STATE_NAME))


def _matches(pattern: str) -> list[str]:
    files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if not path.is_dir())  # noqa: PTH207
    if not files:
        raise DataError(
            f"no file matches {pattern}", hint="a pattern stands for files: * and ? within a name, ** below"
        )
    # A file of this name is not standard input.
    return [f"./{file}" if is_stdin(str(file)) else str(file) for file in files]


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def reading_errors(name: str) -> Iterator[None]:
    """Translates what may go wrong while a file is read, and names it.

    Raises:
        DataError: in its place.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        packing = _PACKINGS.get(ending(name), "packed text")
        program = "zstd" if ending(name) == ".zst" else "gzip"
        raise DataError(
            f"{name} is not {packing}, or cut or damaged: {error}",
            hint=f"what can still be read of it: {program} -dc FILE | gptvae ...",
        ) from error
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = "check the path; a text itself comes through a pipe, named -" if missing else None
        raise DataError(f"cannot read {name}: {error.strerror or error}", hint=hint) from error


@contextmanager
def opened(file: str, stdin: BinaryIO | None) -> Iterator[io.BufferedIOBase | BinaryIO]:
    """The bytes of a file, unpacked, or of standard input, which is left open."""
    if is_stdin(file):
        assert stdin is not None
        yield stdin
        return
    with Path(file).open("rb") as raw:
        packing = ending(file)
        if packing not in _PACKINGS:
            yield raw
        elif not raw.peek(1):
            raise EOFError("it is empty")  # which Python's gzip takes for an empty text
        elif packing == ".gz":
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked
        else:
            yield io.BufferedReader(_Zstd(raw))


class _Zstd(io.RawIOBase):
    """What is packed in a `.zst` file of one or more frames.

    zstandard's own reader takes a file that was cut for one that ends there.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw, self._error = raw, zstandard.ZstdError
        self._unpacker = zstandard.ZstdDecompressor()
        self._frame = self._unpacker.decompressobj()
        self._unread = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._unread:
            # What is left behind a frame comes first: there may be thousands of small ones in it.
            packed = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(_ZSTD_PIECE)
            if self._frame.eof:
                if not packed:
                    return 0
                self._frame = self._unpacker.decompressobj()
            elif not packed:
                raise EOFError("it ends within a frame")
            try:
                self._unread = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise EOFError(str(error)) from error
        count = min(len(into), len(self._unread))
        into[:count] = self._unread[:count]
        self._unread = self._unread[count:]
        return count
