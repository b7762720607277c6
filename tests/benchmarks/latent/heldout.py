"""How much of few texts to hold out: what another share costs in texts to learn from, and gains in what is kept.

    python -m tests.benchmarks.latent.heldout --corpora tatoeba_eng,clinc150 --texts 60,300,1000 --shares 0.05,0.2

For every corpus and number of texts, its first ones that are not empty, the shares are trained in turn on one thread,
seed by seed, by defaults but for the time. The test split tells how likely each model's texts are; its held-out texts
tell what `gptvae train` believes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="tatoeba_eng,clinc150")
    parser.add_argument("--texts", default="60,300,1000")
    parser.add_argument("--shares", default="0.05,0.2")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=int, default=60)
    asked = parser.parse_args()
    columns = "IW of 500 test texts, nats, by seed; mean; bound of the held-out ones"
    print(f"{'corpus':<14}{'texts':>6}{'share':>7}  {columns}")
    for corpus in asked.corpora.split(","):
        for texts in map(int, asked.texts.split(",")):
            runs_of: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
            for seed in asked.seeds.split(","):
                for share in asked.shares.split(","):
                    runs_of[share].append(measured(corpus, texts, share, seed, asked.seconds))
            for share, runs in runs_of.items():
                likely = [test for test, _ in runs]
                believed = "  ".join(f"{held_out:.2f}" for _, held_out in runs)
                row = "  ".join(f"{nll:.2f}" for nll in likely)
                print(f"{corpus:<14}{texts:>6}{share:>7}  {row}; {fmean(likely):.2f}; {believed}", flush=True)


def measured(corpus: str, texts: int, share: str, seed: str, seconds: int) -> tuple[float, float]:
    """Nats a text of the test split, importance-weighted, and of the texts that were held out, their bound."""
    data = Path(os.environ["GPTVAE_TEST_DATA"])
    lines = (line for line in (data / f"{corpus}_train.txt").read_text("utf-8").splitlines() if line)
    with tempfile.TemporaryDirectory(prefix="gptvae-heldout-") as folder:
        few, run = Path(folder, "few.txt"), Path(folder, "run")
        few.write_text("".join(f"{line}\n" for line in islice(lines, texts)), "utf-8")
        settings = ["--max-time", f"{seconds}s", "--valid", share, "--seed", seed, "--out", run]
        gptvae("train", few, *settings)
        found = gptvae("evaluate", data / f"{corpus}_test.txt", "--texts", "500", "--json", "--model", run)
        info = gptvae("info", "--json", run)
    held_out = info["training"]["validation"]
    return found["nll_nats_per_text"], held_out["cross_entropy"] + held_out["kl"]


def gptvae(*arguments: object) -> dict[str, Any]:
    """What a command prints, where that is JSON."""
    threads = [] if "info" in arguments else ["--threads", "1", "--quiet"]
    command = [sys.executable, "-m", "gptvae_cli", *map(str, arguments), *threads]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(printed) if "--json" in arguments else {}
    return found


if __name__ == "__main__":
    main()
