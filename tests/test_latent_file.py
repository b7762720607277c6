"""Latents in `.npy` files, against numpy's own reading and writing."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pytest

from gptvae_cli.errors import DataError, GPTVAEError
from gptvae_cli.latent_file import LatentWriter, is_npy, iter_latents, read_latents

Array = npt.NDArray[Any]
Z = 3


def rows(count: int, width: int = Z) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)


def saved(array: Array, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def with_header(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1")
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text + data


def described(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def read(data: bytes, width: int = Z) -> npt.NDArray[np.float32]:
    return read_latents(io.BytesIO(data), "z.npy", width=width)


def refusal(data: bytes, width: int = Z) -> str:
    with pytest.raises(DataError) as caught:
        read(data, width)
    message = caught.value.message
    assert "z.npy" in message
    assert len(message.splitlines()) == 1 and len(message) < 250
    return message


# Reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 5000, 20_000])
@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_every_size_byte_order_and_layout(count: int, dtype: str, order: Any) -> None:
    array = np.asarray(rows(count), dtype=dtype, order=order)
    found = read(saved(array))
    assert found.dtype == np.dtype(np.float32) and found.shape == (count, Z)
    assert found.dtype.isnative and found.flags.c_contiguous
    np.testing.assert_array_equal(found, array.astype(np.float32))


def test_one_dimension_is_one_latent() -> None:
    np.testing.assert_array_equal(read(saved(rows(1)[0])), rows(1))


def test_one_row_at_a_time_is_the_same() -> None:
    array = rows(10_000)
    named = list(iter_latents(io.BytesIO(saved(array)), "z.npy", width=Z))
    assert [row for row, _ in named] == list(range(len(array)))
    found = [latent_Z for _, latent_Z in named]
    assert len(found) == 10_000 and found[0].shape == (Z,)
    np.testing.assert_array_equal(np.stack(found), array)


FOREIGN_ROWS = [b"-1", b'"a"', b"null", b"true", b"1.0", b"9223372036854775808"]


@pytest.mark.parametrize("form", ["objects", "lists"])
def test_lines_of_json_are_the_same_numbers(form: str) -> None:
    array = rows(2000)
    lines = [list(map(float, row)) for row in array]
    data = "\n".join(json.dumps({"latent": line, "row": 1} if form == "objects" else line) for line in lines).encode()
    np.testing.assert_array_equal(read(data), array)
    found = [latent_Z for _, latent_Z in iter_latents(io.BytesIO(data), "z.npy", width=Z)]
    np.testing.assert_array_equal(np.stack(found), array)
    np.testing.assert_array_equal(read(b"[0]\n[1e0]\n", width=1), [[0], [1]])


def test_lines_of_json_say_which_row_they_are() -> None:
    """So that those that are left of many go by their names; what is no row is none of ours."""
    lines = [b'{"row": 7, "latent": [1]}', b"", b"[2]", *(b'{"row": %s, "latent": [3]}' % row for row in FOREIGN_ROWS)]
    found = list(iter_latents(io.BytesIO(b"\n".join(lines)), "z.jsonl", width=1))
    assert [row for row, _ in found] == [7, *range(1, 2 + len(FOREIGN_ROWS))]
    assert [float(latent_Z[0]) for _, latent_Z in found] == [1, 2, *[3] * len(FOREIGN_ROWS)]


def test_blank_lines_are_no_latents() -> None:
    np.testing.assert_array_equal(read(b"[0]\n\n[1]\n \r\n\n", width=1), [[0], [1]])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1, 2, 3", "z.npy, line 2 is no latent"),
        ('{"text": "a"}', "z.npy, line 2 is no latent"),
        ('[1, 2, "3"]', "z.npy, line 2 is no latent"),
        ("[[1, 2, 3]]", "z.npy, line 2 is no latent"),
        ("[" * 100_000, "z.npy, line 2 is no latent"),
        ("[1, 2, true]", "z.npy, line 2 is no latent"),
        ("[1, 2]", "z.npy, line 2 has the shape (2,), the latents of this model have 3"),
        ("[1, 2, NaN]", "row 1, dimension 2 (both from 0): nan is not a finite number"),
        ("[1, 2, 1e99]", "row 1, dimension 2 (both from 0): 1e+99 is too large"),
    ],
)
def test_a_line_that_is_no_latent_is_named(line: str, words: str) -> None:
    assert words in refusal(f"[1, 2, 3]\n{line}\n[1, 2, 3]\n".encode())


def hint(array: Array | bytes) -> str | None:
    with pytest.raises(DataError) as caught:
        read(array if isinstance(array, bytes) else saved(array, allow_pickle=True))
    return caught.value.hint


def test_a_slip_gets_a_hint_that_helps() -> None:
    assert "array.T" in str(hint(rows(5).T))
    assert "array.T" not in str(hint(rows(5, 4)))
    assert "astype" in str(hint(rows(2).astype(int)))
    for lossy in (rows(2).astype(complex), rows(2).astype(object), rows(2).astype("S")):
        assert hint(lossy) is None
    packed = io.BytesIO()
    np.savez(packed, z=rows(2))
    assert "numpy.load(FILE)[NAME]" in str(hint(packed.getvalue()))


def test_headers_of_other_versions_and_writers() -> None:
    data = rows(2).tobytes()
    for version in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        np.testing.assert_array_equal(read(with_header(described() + "\n", data, version)), rows(2))
    loose = '{ "shape":(2,3), "descr":"<f4",\n"fortran_order":False }'
    np.testing.assert_array_equal(read(with_header(loose, data)), rows(2))


def test_a_pipe_is_read_and_its_first_latents_come_before_its_end() -> None:
    """`numpy.load` cannot read a pipe at all."""
    array = rows(100_000)
    data = saved(array)
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb") as pipe:
        # The reader takes 64 kB at least; what is left of the head fits into the pipe.
        head, rest = data[:100_000], data[100_000:]

        def feed_head() -> None:
            pipe.write(head)
            pipe.flush()

        def feed_rest() -> None:
            pipe.write(rest)
            pipe.close()

        feeding = threading.Thread(target=feed_head)
        feeding.start()
        latents = (latent_Z for _, latent_Z in iter_latents(source, "stdin", width=Z))
        np.testing.assert_array_equal(next(latents), array[0])
        feeding.join()  # the rest is not written yet
        feeding = threading.Thread(target=feed_rest)
        feeding.start()
        np.testing.assert_array_equal(np.stack(list(latents)), array[1:])
        feeding.join()


class Dribble(io.RawIOBase):
    """A stream that gives one byte at a time."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        first, self.rest = self.rest[:1], self.rest[1:]
        into[: len(first)] = first
        return len(first)


def test_short_reads_are_not_the_end() -> None:
    source: Any = Dribble(saved(rows(20)))
    np.testing.assert_array_equal(read_latents(source, "z", width=Z), rows(20))


def test_a_file_is_known_by_its_magic() -> None:
    assert is_npy(saved(rows(1))[:6])
    assert not is_npy(b"hello!") and not is_npy(b"") and not is_npy(b"PK\x03\x04")


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, Z), np.int64), "integers ('<i8')"),
        (np.zeros((2, Z), np.uint8), "integers ('|u1')"),
        (np.zeros((2, Z), bool), "booleans"),
        (np.zeros((2, Z), np.complex64), "complex numbers"),
        (np.zeros((2, Z), "U3"), "text"),
        (np.zeros((2, Z), "S3"), "bytes"),
        (np.zeros((2, Z), "M8[s]"), "dates"),
        (np.zeros((2, Z), np.longdouble), "floats of another size"),
        (np.zeros((2, Z), [("a", "<f4")]), "records"),
        (np.zeros((2, Z), object), "Python objects"),
    ],
)
def test_other_types_are_named_and_refused(array: Array, found: str) -> None:
    message = refusal(saved(array, allow_pickle=True))
    assert f"holds {found}" in message and "floats of 2, 4 or 8 bytes" in message


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "pwned"

    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(target),)

    refusal(saved(np.array([[Trap()] * Z], object), allow_pickle=True))
    assert not target.exists()


@pytest.mark.parametrize("shape", [(), (4,), (0,), (2, 4), (2, 2), (0, 4), (3, 2), (2, 3, 1), (1, 1, 3)])
def test_other_shapes_are_named_and_refused(shape: tuple[int, ...]) -> None:
    message = refusal(saved(np.zeros(shape, np.float32)))
    assert str(shape) in message and str(Z) in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_number_that_is_not_finite_is_named_with_its_place(value: float, dtype: str, order: Any) -> None:
    array = np.asarray(rows(30_000), dtype=dtype, order=order)
    array[29_998, 1] = value
    message = refusal(saved(array))
    assert f"row 29998, dimension 1 (both from 0): {value} is not a finite number" in message


def test_a_double_too_large_for_float32_is_refused() -> None:
    array = np.zeros((2, Z))
    array[1, 2] = -1e39
    assert "row 1, dimension 2 (both from 0): -1e+39 is too large for a latent" in refusal(saved(array))
    array[1, 2] = 1e-60
    assert read(saved(array))[1, 2] == 0


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_cut_file_is_refused_at_every_length(order: Any) -> None:
    data = saved(np.asarray(rows(4), order=order))
    for length in range(len(data)):
        refusal(data[:length])
    assert "claims 4 latents and holds 3" in refusal(data[:-1])


def test_what_follows_the_latents_is_refused() -> None:
    assert "goes on after its 4 latents" in refusal(saved(rows(4)) * 2)
    assert "goes on after its 0 latents" in refusal(saved(rows(0)) + b"\0")


@pytest.mark.parametrize("data", [b"", b"hello\n", b"PK\x03\x04....", b"\x93NUMP", b"\0" * 200])
def test_other_files_are_not_npy(data: bytes) -> None:
    assert "is not a .npy file" in refusal(data)


@pytest.mark.parametrize("order", ["False", "True"])
@pytest.mark.parametrize("count", [10**12, 10**30, 2**62])
def test_a_claim_of_terabytes_takes_no_memory(order: str, count: int) -> None:
    """`numpy.load` allocates what the header claims."""
    data = with_header(described(order=order, shape=f"({count}, 3)"), bytes(1000))
    tracemalloc.start()
    try:
        refusal(data)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        with_header("("),
        with_header("(" * 9000),
        with_header("-" * 9000 + "1"),
        with_header("[" * 90 + "]" * 90),
        with_header("{"),
        with_header("{}"),
        with_header("'\\d'"),
        with_header("0x1for x in (1,)"),
        with_header("{[]: 1}"),
        with_header("\0"),
        with_header("  \n  {"),
        with_header("__import__('os').abort()"),
        with_header(described(shape="(True, 3)")),
        with_header(described(shape="(-2, 3)")),
        with_header(described(shape="(2.0, 3)")),
        with_header(described(shape=f"({'9' * 4000}, 3)")),
        with_header(described(shape=f"({'9' * 5000}, 3)")),
        with_header(described(shape="[2, 3]")),
        with_header(described(shape="6")),
        with_header(described(order="0")),
        with_header(described(descr="None")),
        with_header(described(descr="'f4,f4'")),
        with_header(described(descr="'<f4\\n'")),
        with_header(described(descr="'<f8' * 10**9")),
        with_header(described(descr="['<f4'] ")),
        with_header(described(descr="''")),
        with_header(described()[:-3] + ", 'more': 1}"),
        with_header(described(), version=b"\x04\x00"),
        with_header(described(), version=b"\x00\x00"),
        with_header("\xe9", version=b"\x03\x00"),
        with_header(described() + " " * 60_000),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + described().encode(),
    ],
)
def test_a_malformed_header_is_refused(data: bytes, recwarn: pytest.WarningsRecorder) -> None:
    refusal(data + rows(2).tobytes())
    assert not recwarn.list


def test_mutated_files_are_read_or_refused() -> None:
    draw = random.Random(0)
    original = saved(rows(5))
    for _ in range(3000):
        data = bytearray(original)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data)) if draw.random() < 0.3 else draw.randrange(128)
            data[place] = draw.choice(b"\0\xff()[]{}'\"-<>|fFiO0123456789, \n\\") if draw.random() < 0.7 else 0x80
        try:
            found = read(bytes(data))
        except DataError:
            continue
        assert found.shape[1] == Z and np.isfinite(found).all()


def test_a_stream_that_fails_is_bad_input() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    source: Any = Broken()
    with pytest.raises(DataError, match="cannot read z: Input/output error"):
        read_latents(source, "z", width=Z)


# Writing ----------------------------------------------------------------------------------------------------


def test_a_whole_number_of_any_length_is_no_reason_to_stop_working() -> None:
    line = json.dumps([10**400] + [0] * (Z - 1)).encode()
    assert "is no latent" in refusal(line)


def write(stream: BinaryIO, *pieces: Array, width: int = Z) -> None:
    with LatentWriter(stream, width) as writer:
        for piece in pieces:
            writer.write(piece)


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 4], [100_000]])
def test_a_file_is_byte_for_byte_what_numpy_writes(sizes: list[int], tmp_path: Path) -> None:
    pieces = [rows(size) for size in sizes]
    expected = saved(np.concatenate([np.empty((0, Z), np.float32), *pieces]))
    path = tmp_path / "z.npy"
    with path.open("wb") as stream:
        write(stream, *pieces)
    assert path.read_bytes() == expected
    with io.BytesIO() as memory:
        write(memory, *pieces)
        assert memory.getvalue() == expected
    assert np.load(path).shape == (sum(sizes), Z)
    assert read(expected).shape == (sum(sizes), Z)


@pytest.mark.parametrize("count", [0, 7, 300_000])
def test_a_pipe_gets_the_same_bytes(count: int) -> None:
    array = rows(count)
    reader, writer = os.pipe()
    received: list[bytes] = []
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb") as pipe:
        receiving = threading.Thread(target=lambda: received.append(source.read()))
        receiving.start()
        write(pipe, *np.array_split(array, 5))
        pipe.close()
        receiving.join()
    assert received == [saved(array)]


def test_rows_of_any_dtype_and_layout_become_float32() -> None:
    array = np.asfortranarray(rows(6).astype(">f8"))
    stream = io.BytesIO()
    write(stream, array, array[::2])
    assert stream.getvalue() == saved(np.concatenate([rows(6), rows(6)[::2]]))


def test_the_header_is_aligned_whatever_the_sizes() -> None:
    stream = io.BytesIO()
    write(stream, np.zeros((1, 65536), np.float32), width=65536)
    assert len(stream.getvalue()) == 128 + 4 * 65536
    np.testing.assert_array_equal(np.load(io.BytesIO(stream.getvalue())), np.zeros((1, 65536)))


def test_a_file_opened_for_appending_is_not_patched(tmp_path: Path) -> None:
    """After `>>` a seek succeeds, but the header would be written at the end."""
    path = tmp_path / "z.npy"
    path.write_bytes(b"before")
    with path.open("ab") as stream:
        write(stream, rows(4))
    assert path.read_bytes() == b"before" + saved(rows(4))


def test_a_file_may_start_and_go_on_elsewhere(tmp_path: Path) -> None:
    """`{ echo before; gptvae encode a.txt; echo after; } > file` shares one position."""
    path = tmp_path / "z.npy"
    with path.open("wb") as stream:
        stream.write(b"before")
        write(stream, rows(4))
        stream.write(b"after")
    assert path.read_bytes() == b"before" + saved(rows(4)) + b"after"


WRITE_TO_STDOUT = """
import sys, numpy as np
from gptvae_cli.latent_file import LatentWriter
with LatentWriter(sys.stdout.buffer, 3) as writer:
    for _ in range(50):
        writer.write(np.ones((2000, 3), np.float32))
"""


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
@pytest.mark.parametrize("redirect", ["> z.npy", ">> z.npy", "| cat > z.npy"])
def test_the_shell_redirects_stdout(unbuffered: list[str], redirect: str, tmp_path: Path) -> None:
    """Under `python -u` stdout is a raw file, whose write may be partial."""
    (tmp_path / "program.py").write_text(WRITE_TO_STDOUT)
    command = f"{sys.executable} {' '.join(unbuffered)} program.py {redirect}"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), np.ones((100_000, 3)))


def test_a_closed_pipe_is_a_broken_pipe() -> None:
    """`numpy.save` raises an OSError without EPIPE there, which is not taken for the end of a pipeline."""
    reader, writer = os.pipe()
    os.close(reader)
    pipe = os.fdopen(writer, "wb")
    with pytest.raises(BrokenPipeError):
        write(pipe, rows(10))
    with pytest.raises(BrokenPipeError):
        pipe.close()  # what is left in its buffer


def test_partial_writes_are_completed() -> None:
    class Narrow(io.RawIOBase):
        def __init__(self) -> None:
            self.data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += bytes(data[:7])
            return len(data[:7])

    stream: Any = Narrow()
    write(stream, rows(4))
    assert stream.data == saved(rows(4))


@pytest.mark.parametrize("mode", ["wb", "ab"])
def test_what_an_interrupted_command_leaves_is_no_latent_file(mode: Any, tmp_path: Path) -> None:
    """With a header of N = 0 it would pass for a whole and empty one."""
    path = tmp_path / "z.npy"
    with path.open(mode) as stream, pytest.raises(KeyboardInterrupt), LatentWriter(stream, Z) as writer:
        writer.write(rows(4))
        raise KeyboardInterrupt
    with pytest.raises((ValueError, EOFError)):
        np.load(path)
    with path.open("rb") as source, pytest.raises(DataError, match=r"not a \.npy file"):
        read_latents(source, "z", width=Z)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    piece = rows(1000, 64)
    with (tmp_path / "a.npy").open("ab") as spooled, (tmp_path / "b.npy").open("wb") as patched:
        for stream in (spooled, patched):
            tracemalloc.start()
            with LatentWriter(stream, 64) as writer:
                for _ in range(60):
                    writer.write(piece)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8 * 2**20 < 60 * piece.nbytes
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_a_missing_temporary_folder_is_told_with_a_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with (tmp_path / "z.npy").open("ab") as stream, pytest.raises(GPTVAEError, match="temporary folder") as caught:
        write(stream, rows(200_000))
    assert caught.value.hint and "TMPDIR" in caught.value.hint
