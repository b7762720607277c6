"""Corpora of every form and size: what the tool does with each, how long that takes, and in how much memory.

    python -m tests.benchmarks.robust.forms              every row
    python -m tests.benchmarks.robust.forms line empty   the rows whose name holds one of these words

The inputs, about 1 GB, are made in a temporary folder. A row is one process of `gptvae` with one thread: its exit code
and what it read, its processor time and the time on the clock, in seconds, and its peak memory. The package's list of
32,033 names is the corpus whose forms are compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import zstandard
from pyarrow import parquet

from gptvae_cli.header import read_header

NAMES = files("gptvae_cli").joinpath("corpora/names_us.txt").read_bytes()
MEGABYTES = 100
EMPTY = 10_000_000


class Ran(NamedTuple):
    """A process that ended: exit code, last line on stderr, processor and clock time in seconds, peak memory in MB."""

    code: int
    told: str
    processor: float
    clock: float
    megabytes: float


def run(*arguments: str) -> Ran:
    """Runs `gptvae` in the working folder; what it says goes to a file, so that nothing has to be read meanwhile."""
    began = time.monotonic()
    with Path("told").open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "gptvae_cli", *arguments, "--threads", "1"], stdout=subprocess.DEVNULL, stderr=told
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or it would be waited for once more
    lines = Path("told").read_text("utf-8").splitlines()
    error = next((line for line in lines if line.startswith("gptvae: error: ")), "")
    return Ran(
        process.returncode,
        error.removeprefix("gptvae: error: ") or next((line for line in lines if "U+FFFD" in line), ""),
        usage.ru_utime + usage.ru_stime,
        time.monotonic() - began,
        usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1024),
    )


# Inputs ---------------------------------------------------------------------------------------------------------------


def words(megabytes: int) -> bytes:
    """Words on one line."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(1000)]
    page = " ".join(draw.choices(vocabulary, k=160_000)).encode()[: 10**6 - 1] + b" "
    return page * megabytes


def letters(megabytes: int) -> bytes:
    """One word of four letters, as of DNA; a million of them, repeated."""
    return "".join(random.Random(0).choices("ACGT", k=10**6)).encode() * megabytes


def records(texts: bytes) -> bytes:
    """Lines as lines of JSON."""
    return b"".join(json.dumps({"text": text.decode()}).encode() + b"\n" for text in texts.splitlines())


def mixed(texts: bytes) -> bytes:
    """Lines that end in LF, CRLF and CR in turn, after a byte order mark, the last one in nothing."""
    lines = texts.splitlines()
    ends = (b"\n", b"\r\n", b"\r")
    return b"\xef\xbb\xbf" + b"".join(line + ends[i % 3] for i, line in enumerate(lines[:-1])) + lines[-1]


def write_parquet(name: str, texts: list[bytes]) -> None:
    table = pyarrow.table({"text": pyarrow.array([text.decode() for text in texts])})
    parquet.write_table(table, name, row_group_size=len(texts))


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


# Rows -----------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the table: its name, what makes its input, and the command that reads it."""

    name: str
    make: Callable[[], object]
    arguments: tuple[str, ...]


def write(name: str, data: Callable[[], bytes]) -> Callable[[], object]:
    return lambda: Path(name).write_bytes(data())


def encode(name: str, make: Callable[[], object], *names: str) -> Row:
    return Row(f"encode, {name}", make, ("encode", *names, "--out", "z.npy", "--model", "model"))


def train(name: str, make: Callable[[], object], *names: str) -> Row:
    options = ("--steps", "5", "--preset", "nano", "--out", "run", "--force")
    return Row(f"train, {name}", make, ("train", *names, *options))


def rows() -> Iterator[Row]:
    """All rows, those of one corpus in several forms first."""
    forms: dict[str, Callable[[], bytes]] = {
        "names.txt": lambda: NAMES,
        "mixed line ends.txt": lambda: mixed(NAMES),
        "names.txt.gz": lambda: gzip.compress(NAMES),
        "names.txt.zst": lambda: zstd(NAMES),
        "names.jsonl": lambda: records(NAMES),
        "names.jsonl.gz": lambda: gzip.compress(records(NAMES)),
        "names.jsonl.zst": lambda: zstd(records(NAMES)),
    }
    for name, data in forms.items():
        yield encode(f"form {name}", write(name, data), name)
    yield encode("form names.parquet", lambda: write_parquet("names.parquet", NAMES.splitlines()), "names.parquet")
    yield encode("form pattern '*mes.txt'", write("names.txt", lambda: NAMES), "*mes.txt")

    few = NAMES[:2000].rpartition(b"\n")[0] + b"\n"
    for name, line in (("words", words), ("one word", letters)):
        make = write("long.txt", lambda line=line: few + line(MEGABYTES) + b"\n")  # type: ignore[misc]
        yield encode(f"a line of {MEGABYTES} MB, {name}", make, "long.txt")
        yield train(f"a line of {MEGABYTES} MB, {name}", make, "long.txt")
    yield encode(f"a line of {MEGABYTES} MB, .zst", write("long.zst", lambda: zstd(few + words(MEGABYTES))), "long.zst")
    yield encode(
        f"a line of {MEGABYTES} MB, emoji",
        write("wide.txt", lambda: few + "😀".encode() * (MEGABYTES * 250_000)),
        "wide.txt",
    )
    page = words(1)
    yield encode(
        f"a row group of {MEGABYTES} MB, .parquet",
        lambda: write_parquet("long.parquet", [page[i : i + 10**5] for i in range(10 * MEGABYTES)]),
        "long.parquet",
    )
    yield train(f"{EMPTY:,} empty lines", write("empty.txt", lambda: few + b"\n" * EMPTY), "empty.txt")
    yield train(f"{EMPTY:,} empty lines, .zst", write("empty.zst", lambda: zstd(few + b"\n" * EMPTY)), "empty.zst")
    yield encode(f"{EMPTY:,} empty lines", write("empty.txt", lambda: b"\n" * EMPTY), "empty.txt")

    broken = {
        "in the first byte": b"\xff" + few,
        "in the middle of a character": few + b"caf\xc3 au lait\n",
        "across the edge of a buffer": b"a" * 8191 + b"\xe4\xb8\n",
        "in the last byte": few + b"caf\xc3",
        "UTF-16": few.decode().encode("utf-16"),
    }
    for name, spoilt in broken.items():
        yield encode(f"not UTF-8 {name}", write("bad.txt", lambda spoilt=spoilt: spoilt), "bad.txt")  # type: ignore[misc]
        if name != "UTF-16":
            row = encode(f"not UTF-8 {name}, replaced", write("bad.txt", lambda spoilt=spoilt: spoilt), "bad.txt")  # type: ignore[misc]
            yield row._replace(arguments=(*row.arguments, "--errors", "replace"))

    def two_files() -> None:
        Path("good.txt").write_bytes(few)
        Path("bad.txt").write_bytes(b"caf\xe9\n")

    yield encode("not UTF-8 in the second of two files", two_files, "good.txt", "bad.txt")
    yield encode("NUL and every other control", write("c.txt", lambda: bytes(range(32)) + b"\x7f\n" + few), "c.txt")
    yield encode("half a packed file, .zst", write("half.zst", lambda: zstd(NAMES)[:50_000]), "half.zst")
    yield encode("half a packed file, .gz", write("half.gz", lambda: gzip.compress(NAMES)[:50_000]), "half.gz")


def result(row: Row, ran: Ran, expected: np.ndarray | None) -> str:
    """What was read, or what was said instead."""
    if ran.code:
        return ran.told
    if row.arguments[0] == "train":
        corpus = read_header(Path("run", "model.safetensors")).training["corpus"]
        return f"{corpus['texts']:,} texts, {corpus['empty']:,} empty"
    latents = np.load("z.npy", mmap_mode="r")
    found = f"{len(latents):,} texts"
    if ", form " in row.name and expected is not None:
        same = latents.shape == expected.shape and np.allclose(latents, expected, atol=1e-5)
        found += ", the latents of names.txt" if same else ", OTHER LATENTS"
    return f"{found}; {ran.told}" if ran.told else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("words", nargs="*", help="rows whose name holds one of these; all by default")
    chosen: list[str] = parser.parse_args().words
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    print(f"# {platform.machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    print(f"# {'what':<52} exit  processor  clock     MB  result")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("names.txt").write_bytes(NAMES)
        ran = run("train", "names.txt", "--steps", "5", "--preset", "nano", "--out", "model", "--tokenizer", "bpe")
        assert ran.code == 0, ran.told
        expected = None
        for row in rows():
            if chosen and not any(word in row.name for word in chosen):
                continue
            row.make()
            ran = run(*row.arguments)
            if row.name == "encode, form names.txt":
                expected = np.load("z.npy")
            print(
                f"{row.name:<54} {ran.code:4d} {ran.processor:10.1f} {ran.clock:6.0f} {ran.megabytes:6.0f}"
                f"  {result(row, ran, expected)[:150]}",
                flush=True,
            )
            for path in Path().iterdir():  # the next row needs nothing but the model
                if path.is_file():
                    path.unlink()
        os.chdir("/")


if __name__ == "__main__":
    main()
