"""Memory and time with much data: a corpus of two gigabytes, a million lines to encode, 100,000 latents to write from.

    python -m tests.benchmarks.robust.sizes > tests/benchmarks/robust/sizes.txt
    python -m tests.benchmarks.robust.sizes encode generate --scale 0.01

Each row is one command in a process of its own. The corpus repeats `$GPTVAE_TEST_DATA/tatoeba_eng_train.txt`, each
time with other words in some places. Peak RSS is what the operating system counted for the whole process, mapped
pages of files included. Training is timed to the end of step 5, where the log has its first line.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

CORPUS_BYTES, TEXTS, LATENTS = 2 * 10**9, 10**6, 10**5
LEARN = ("--preset", "nano", "--device", "cpu")


class Measured(NamedTuple):
    """Seconds until the log has a line, where there is a log, and of the whole process; peak RSS in MB."""

    first_line: float | None
    seconds: float
    peak: float


Row = tuple[str, str, Measured]
"""What was done, on how much, and what it took."""


def gptvae(*arguments: object, output: Path) -> Measured:
    """Runs a command with its output to a file; the run folder is `run` beside it."""
    return python("-m", "gptvae_cli", *arguments, output=output)


def python(*arguments: object, output: Path) -> Measured:
    command = [sys.executable, *map(str, arguments)]
    began = time.monotonic()
    first_line = None
    with output.open("wb") as stdout, subprocess.Popen(command, stdout=stdout) as process:
        log = output.parent / "run" / "metrics.jsonl"
        done = threading.Event()

        def watch() -> None:
            nonlocal first_line
            while not done.wait(0.1):
                if first_line is None and log.exists():
                    first_line = time.monotonic() - began

        watcher = threading.Thread(target=watch)
        if "train" in arguments:
            log.unlink(missing_ok=True)
            watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        done.set()
        if watcher.ident is not None:
            watcher.join()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    scale = 2**10 if sys.platform == "linux" else 1
    return Measured(first_line, seconds, usage.ru_maxrss * scale / 10**6)


def write_corpus(path: Path, size: int) -> None:
    """Repeats sentences; in each copy, 20 of the words that come most often are other words."""
    lines = (Path(os.environ["GPTVAE_TEST_DATA"]) / "tatoeba_eng_train.txt").read_text("utf-8")
    counts = Counter(lines.split())
    words, frequent = sorted(counts), [word for word, _ in counts.most_common(500)]
    chance = random.Random(0)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            text = lines
            for word in chance.sample(frequent, 20):
                text = text.replace(f" {word} ", f" {chance.choice(words)} ")
            written += file.write(text[: size - written])


def train(folder: Path, scale: float) -> Iterator[Row]:
    corpus = folder / "corpus.txt"
    write_corpus(corpus, int(CORPUS_BYTES * scale))
    size = f"{corpus.stat().st_size / 1e6:,.0f} MB"
    run = ("--out", folder / "run")
    yield "train", size, gptvae("train", corpus, *LEARN, "--steps", 50, *run, output=folder / "path")
    yield "train --force", size, gptvae("train", corpus, *LEARN, "--steps", 50, "--force", *run, output=folder / "path")
    yield "train --resume", size, gptvae("train", "--resume", "--steps", 55, *LEARN[2:], *run, output=folder / "path")


TOKENISE = """
import sys
from pathlib import Path
from gptvae_cli import corpus, machine
from gptvae_cli.config import DataConfig

source, cache, processes = sys.argv[1:]
machine.processors = lambda: int(processes)
corpus.Corpus.build([source], DataConfig(tokenizer="bpe"), Path(cache))
"""


def tokenise(folder: Path, scale: float) -> Iterator[Row]:
    """What processes gain, in turn."""
    corpus = folder / "corpus.txt"
    write_corpus(corpus, int(150 * 10**6 * scale))
    size = f"{corpus.stat().st_size / 1e6:,.0f} MB"
    for processes in (1, 2, 1, 2):
        arguments = ("-c", TOKENISE, corpus, folder / "cache", processes)
        yield f"tokenise, {processes} process(es)", size, python(*arguments, output=folder / "path")


def encode(folder: Path, scale: float) -> Iterator[Row]:
    corpus, texts = folder / "corpus.txt", folder / "texts.txt"
    write_corpus(corpus, 40 * int(TEXTS * scale))
    gptvae("train", corpus, *LEARN, "--steps", 50, "--out", folder / "run", output=folder / "path")
    for share in (0.1, 1.0):
        count = int(TEXTS * scale * share)
        with corpus.open("rb") as source, texts.open("wb") as file:
            file.writelines(islice(source, count))
        size = f"{count:,} texts"
        yield "encode", size, gptvae("encode", texts, "--model", folder / "run", output=folder / "z.npy")


def generate(folder: Path, scale: float) -> Iterator[Row]:
    corpus = folder / "corpus.txt"
    write_corpus(corpus, 4 * 10**6)
    gptvae("train", corpus, *LEARN, "--steps", 50, "--out", folder / "run", output=folder / "path")
    for share in (0.1, 1.0):
        count = int(LATENTS * scale * share)
        options = ("--prior", count, "--seed", 0, "--model", folder / "run")
        yield "generate", f"{count:,} latents", gptvae("generate", *options, output=folder / "written.txt")


ROWS = {"tokenise": tokenise, "train": train, "encode": encode, "generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="of tokenise, train, encode and generate; all by default")
    parser.add_argument("--scale", type=float, default=1.0, help="share of all sizes")
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"# {time.strftime('%Y-%m-%d')}, {platform.machine()}, {cores} core(s), Python {platform.python_version()},"
        f" torch {torch.__version__}, preset nano"
    )
    print(f"{'what':<28}{'size':>18}{'to step 5, s':>16}{'all, s':>10}{'peak RSS, MB':>14}", flush=True)
    for name in asked.rows or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            for what, size, (first_line, seconds, peak) in ROWS[name](Path(folder), asked.scale):
                first = "" if first_line is None else f"{first_line:,.0f}"
                print(f"{what:<28}{size:>18}{first:>16}{seconds:>10,.0f}{peak:>14,.0f}", flush=True)


if __name__ == "__main__":
    main()
