"""Latents in `.npy` files and pipes, or as lines of JSON, checked before memory is taken for them.

`numpy.load` and `numpy.save` are not used: the one cannot read a pipe and allocates what a header claims, the other
hides that a pipe is closed.

Shapes: N latents, Z latent width, n rows at a time.
"""

from __future__ import annotations

import ast
import fcntl
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from types import TracebackType
from typing import IO, BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gptvae_cli.errors import DataError, GPTVAEError
from gptvae_cli.sources import reading_errors

Floats = npt.NDArray[np.float32]

_MAGIC = b"\x93NUMPY"
_LARGEST = 1e15
"""What a number of a latent may be at most; a standard normal has none above 10. Their squares still fit in float32."""
_LONGEST_HEADER = 10_000
"""Bytes; numpy's own limit, below which parsing a literal is safe. An array of floats needs 118."""
_PIECE_BYTES = 2**16
"""Read at a time, so that the first rows of a long stream are there early."""
_FLOATS = re.compile(r"[<>=|]?f[248]")
_KINDS = {"i": "integers", "u": "integers", "b": "booleans", "c": "complex numbers", "f": "floats of another size"}
_NUMBERS = ("integers", "booleans", "floats of another size")
"""Kinds whose conversion to floats loses nothing that a latent has."""
_KINDS |= {"O": "Python objects", "S": "bytes", "U": "text", "M": "dates", "m": "time spans", "V": "raw data"}


def is_npy(head: bytes) -> bool:
    """Whether a file that starts with these bytes (6 or more) is a `.npy` file."""
    return head.startswith(_MAGIC)


# Reading ----------------------------------------------------------------------------------------------------


def read_latents(source: BinaryIO, name: str, *, width: int) -> Floats:
    """All latents of a `.npy` file or pipe [N Z].

    Takes f2, f4 and f8 of any byte order and layout; one dimension is one latent. Lines of JSON are taken too, lists of
    numbers or what `gptvae encode --format jsonl` writes.

    Args:
        source: at the start of the file.
        name: what errors call it.
        width: Z, the width of the model's latent.

    Raises:
        DataError: for a file that is unreadable, not `.npy`, cut, too long, not of floats, not of this width, or
            that holds a number that is not finite, or beyond 1e15.
    """
    pieces = [piece_nZ for _, piece_nZ in _pieces(source, name, width)]
    return np.concatenate(pieces) if pieces else np.empty((0, width), np.float32)


def iter_latents(source: BinaryIO, name: str, *, width: int) -> Iterator[tuple[int, Floats]]:
    """Like `read_latents`, one latent [Z] at a time as they arrive, and the row it is: of an array its place, of a line
    of JSON what it says, so that some of many lines keep theirs. Memory does not grow with N.

    An array in Fortran order comes column by column and is read whole first.
    """
    for rows_n, piece_nZ in _pieces(source, name, width):
        yield from zip(rows_n, piece_nZ, strict=True)


def checked_latents(values: npt.NDArray[np.generic], name: str, *, width: int) -> Floats:
    """An array in memory under the rules of `read_latents` [N Z].

    Raises:
        DataError: for what is not of floats, not of this width, or holds a number that is not finite, or beyond 1e15.
    """
    _check_floats(values.dtype.str, name)
    count = _check_shape(values.shape, name, width)
    floats: npt.NDArray[np.floating] = values.reshape(count, width)  # type: ignore[assignment]
    return _to_float32(floats, name, 0)


def _pieces(source: BinaryIO, name: str, width: int) -> Iterator[tuple[Sequence[int], Floats]]:
    """Which rows, and their checked latents [n Z], a few at a time."""
    with reading_errors(name):
        first = _read(source, 1)
        if first in (b"[", b"{"):
            yield from _lines(first, source, name, width)
            return
        header = _read_header(first, source, name)
        count = _check_shape(header.shape, name, width)
        row_bytes = width * header.dtype.itemsize
        by_column = header.fortran_order and count > 1
        step = count if by_column else max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, count, step):
            rows = min(step, count - start)
            data = _read(source, rows * row_bytes)
            if len(data) < rows * row_bytes:
                found = (start * row_bytes + len(data)) // row_bytes
                raise DataError(f"{name} is cut: it claims {count} latents and holds {found}")
            values = np.frombuffer(data, header.dtype)
            values_nZ = values.reshape(width, rows).T if by_column else values.reshape(rows, width)
            yield range(start, start + rows), _to_float32(values_nZ, name, start)
        if source.read(1):
            raise DataError(
                f"{name} goes on after its {count} latents", hint="concatenate arrays with numpy, not with cat"
            )


def _lines(first: bytes, source: BinaryIO, name: str, width: int) -> Iterator[tuple[Sequence[int], Floats]]:
    """The latents of lines of JSON, of which the first byte has been read."""
    count = 0
    for number, line in enumerate(chain([first + source.readline()], source), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            found = json.loads(line)
            numbers = found["latent"] if isinstance(found, dict) else found
            if not isinstance(numbers, list) or not all(type(each) in (int, float) for each in numbers):
                raise ValueError("expected numbers")
            values_1Z = np.array([numbers], dtype=np.float64)
        except (ValueError, KeyError, RecursionError, OverflowError) as error:
            raise DataError(
                f"{place} is no latent: expected a list of numbers, or an object that has one as 'latent'",
                hint="gptvae encode --format jsonl writes such lines",
            ) from error
        _check_shape((len(numbers),), place, width)
        row = found.get("row") if isinstance(found, dict) else None
        if type(row) is not int or not 0 <= row < 2**63:
            row = count
        yield [row], _to_float32(values_1Z, name, number - 1)
        count += 1


class _Header(NamedTuple):
    dtype: np.dtype[np.floating]
    fortran_order: bool
    shape: tuple[int, ...]


def _read_header(first: bytes, source: BinaryIO, name: str) -> _Header:
    """The header of versions 1.0 to 3.0, with a dtype that is f2, f4 or f8, of which the first byte has been read."""
    head = first + _read(source, 7)
    if not is_npy(head):
        found = f"it starts with {head!r}" if head else "it is empty"
        hint = "make one with gptvae encode or numpy.save"
        if head.startswith(b"PK"):
            hint = "a .npz holds several arrays, save one: numpy.save('z.npy', numpy.load(FILE)[NAME])"
        if head == bytes(8):  # what `LatentWriter` leaves in the header's place until it knows what to say there
            hint = "gptvae encode did not come to its end there, run it again"
        raise DataError(f"{name} is not a .npy file: {found}", hint=hint)
    version = ".".join(map(str, head[6:]))
    if version not in ("1.0", "2.0", "3.0"):
        raise DataError(f"{name} is of .npy version {version or 'unknown'}, expected 1.0, 2.0 or 3.0")
    length = int.from_bytes(_read(source, 2 if version == "1.0" else 4), "little")
    if length > _LONGEST_HEADER:
        raise DataError(f"{name} has a header of {length} bytes, an array of floats has about 118")
    text = _read(source, length)
    if len(text) < length:
        raise DataError(f"{name} is cut within its header")
    try:
        # An odd literal makes the parser warn on stderr.
        with warnings.catch_warnings(action="ignore"):
            header = ast.literal_eval(text.decode("utf-8" if version == "3.0" else "latin1").strip())
        descr, fortran_order, shape = (header.pop(key) for key in ("descr", "fortran_order", "shape"))
        sizes = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**63 for size in shape)
        if header or type(fortran_order) is not bool or not sizes:
            raise ValueError("expected descr, fortran_order and shape")
    except (ValueError, SyntaxError, TypeError, AttributeError, KeyError, MemoryError, RecursionError) as error:
        raise DataError(f"{name} has a malformed .npy header") from error
    _check_floats(descr, name)
    return _Header(np.dtype(descr), fortran_order, shape)


def _check_floats(descr: object, name: str) -> None:
    """Takes the description of a dtype, as a `.npy` header has it."""
    if not isinstance(descr, str) or not _FLOATS.fullmatch(descr):
        kind = _KINDS.get(descr.lstrip("<>=|")[:1]) if isinstance(descr, str) else "records"
        raise DataError(
            f"{name} holds {kind or 'an unknown type'} ({str(descr)[:40]!r}), latents are floats of 2, 4 or 8 bytes",
            hint="convert it with numpy: array.astype('float32')" if kind in _NUMBERS else None,
        )


def _check_shape(shape: tuple[int, ...], name: str, width: int) -> int:
    """N, of an array (N, Z) or (Z,)."""
    if len(shape) not in (1, 2):
        raise DataError(f"{name} has the shape {_shape(shape)}, expected (N, {width}) or ({width},)")
    if shape[-1] != width:
        raise DataError(
            f"{name} has the shape {_shape(shape)}, the latents of this model have {width} dimensions",
            hint="is it transposed? array.T"
            if shape[0] == width
            else "encode again with this model, or name the model that made it",
        )
    return shape[0] if len(shape) == 2 else 1


def _shape(shape: tuple[int, ...]) -> str:
    return str(shape) if len(str(shape)) < 60 else f"{str(shape)[:57]}..."


def _to_float32(values_nZ: npt.NDArray[np.floating], name: str, start: int) -> Floats:
    with np.errstate(over="ignore"):
        rows_nZ = np.ascontiguousarray(values_nZ, dtype=np.float32)
    usable_nZ = np.abs(rows_nZ) <= _LARGEST
    if not usable_nZ.all():
        row, dimension = np.argwhere(~usable_nZ)[0]
        value = values_nZ[row, dimension]
        problem = "too large for a latent" if np.isfinite(value) else "not a finite number"
        raise DataError(
            f"{name}, row {start + row}, dimension {dimension} (both from 0): {value} is {problem}",
            hint="remove the row, or encode its text again",
        )
    return rows_nZ


def _read(source: BinaryIO, count: int) -> bytes:
    """Up to `count` bytes, fewer only at the end. Memory follows what is there, not what is asked for."""
    data = bytearray()
    while len(data) < count and (piece := source.read(min(count - len(data), 2**20))):
        data += piece
    return bytes(data)


# Writing ----------------------------------------------------------------------------------------------------


class LatentWriter:
    """Writes float32 latents as `.npy` in constant memory, though their number comes first in the file.

    On a stream that can seek, the header's place is filled at the end; until then it holds zeros, so that what an
    interrupted command leaves does not pass for a whole file. On a pipe or a file opened for appending, rows wait
    in an unnamed temporary file. The stream is flushed and left open; its own errors pass through as they are
    (BrokenPipeError for a closed pipe).

        with LatentWriter(sys.stdout.buffer, width) as writer:
            writer.write(mean_nZ)

    Args:
        stream: where the file goes, from its present position on.

    Raises:
        GPTVAEError: for a full temporary folder.
    """

    def __init__(self, stream: BinaryIO, width: int) -> None:
        self._stream, self._width = stream, width
        self._rows = 0
        self._spool: IO[bytes] | None = None
        if _can_patch(stream):
            self._start = stream.tell()
            _write_all(stream, bytes(len(self._header())))
        else:
            # In memory up to 1 MB: a few latents need no temporary folder.
            self._spool = tempfile.SpooledTemporaryFile(2**20)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def write(self, rows_nZ: npt.NDArray[np.floating]) -> None:
        """Appends latents [n Z]."""
        assert rows_nZ.ndim == 2 and rows_nZ.shape[1] == self._width
        data = rows_nZ.astype("<f4").tobytes()
        if self._spool is None:
            _write_all(self._stream, data)
        else:
            with _spool_errors():
                self._spool.write(data)
        self._rows += len(rows_nZ)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self._spool is not None:
                with suppress(OSError):  # closing flushes once more, to the folder that is full
                    self._spool.close()

    def _finish(self) -> None:
        stream = self._stream
        if self._spool is None:
            end = stream.tell()
            stream.seek(self._start)
            _write_all(stream, self._header())
            stream.seek(end)  # what the shell writes next to the same file comes behind
        else:
            with _spool_errors():
                self._spool.seek(0)
            _write_all(stream, self._header())
            while piece := self._read_spool():
                _write_all(stream, piece)
        stream.flush()

    def _read_spool(self) -> bytes:
        assert self._spool is not None
        with _spool_errors():
            return self._spool.read(2**20)

    def _header(self) -> bytes:
        """Version 1.0, 128 bytes for every N below 10^20: what numpy writes for the same array."""
        shape = (self._rows, self._width)
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
        return _MAGIC + b"\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode("ascii") + b"\n"


def _can_patch(stream: BinaryIO) -> bool:
    if not stream.seekable():
        return False
    try:
        flags = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL)
    except io.UnsupportedOperation:  # in memory
        return True
    # After `>> FILE` seeking succeeds, but every write goes to the end all the same.
    return not flags & os.O_APPEND


def _write_all(stream: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        # Under `python -u` stdout is a raw file, which may take a part.
        view = view[stream.write(view) :]


@contextmanager
def _spool_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GPTVAEError(
            f"cannot keep latents in the temporary folder: {error.strerror or error}",
            hint="point TMPDIR to a larger disk, or write to a file",
        ) from error
