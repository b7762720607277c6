"""How much more of a text comes back from a latent that is fitted to it, and what that costs.

    python -m tests.benchmarks.latent.study --corpora clinc150 --minutes 20 --seeds 1 --arms small --keep models
    python -m tests.benchmarks.latent.refinement 'models/clinc150, small, 1.safetensors' clinc150_test.txt

The first texts of a test split are written from their latents; columns are those of `guidance.py`, but for "norm", the
mean norm of the latents, and "texts/s", how many are encoded in a second of processor time. "Under" is the
guidance under which a latent is fitted, 1.5 by default. "Near" are sums of a fitted latent and a random one, as long as
either, in which the fitted one has this share of the squared norm.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from gptvae_cli import Model, load, refinement
from tests.benchmarks.latent.guidance import kept

Floats = npt.NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus", help="a file of $GPTVAE_TEST_DATA")
    parser.add_argument("--texts", type=int, default=1000)
    asked = parser.parse_args()
    model = load(asked.model, device="cpu")
    lines = (Path(os.environ["GPTVAE_TEST_DATA"]) / asked.corpus).read_text("utf-8").splitlines()
    texts = lines[: asked.texts]
    print(
        f"# {Path(asked.model).name}, {model.header.training['steps']:,} steps; {len(texts):,} texts of {asked.corpus}",
        flush=True,
    )
    ways: dict[str, Callable[[], Floats]] = {
        "the mean": lambda: model.encode(texts),
        "refined": lambda: model.encode(texts, refine=True),
        "refined under 1": lambda: under(model, texts, GUIDANCE=1.0),
        "refined under 2": lambda: under(model, texts, GUIDANCE=2.0),
        "refined, 30 steps": lambda: under(model, texts, STEPS=30, RATE=0.1),
        "refined, 5 steps": lambda: under(model, texts, STEPS=5, RATE=0.5),
    }
    for name, encode in ways.items():
        began = time.process_time()
        z_NZ = encode()
        speed = len(texts) / (time.process_time() - began)
        norm = np.linalg.norm(z_NZ, axis=1).mean()
        for scale in (1.0, 2.0):
            report(f"{name:<17} greedily", model, texts, z_NZ, scale, f"  norm {norm:.1f}  texts/s {speed:,.0f}")
            if name in ("the mean", "refined"):
                report(f"{name:<17} at T 1", model, texts, z_NZ, scale, greedy=False)
    z_NZ = model.encode(texts, refine=True)
    noise_NZ = np.random.default_rng(0).standard_normal(z_NZ.shape, np.float32)
    for name, share in (("near, 0.9", 0.9), ("near, half", 0.5)):
        near_NZ = share**0.5 * z_NZ + (1 - share) ** 0.5 * noise_NZ
        report(f"{name:<17} greedily", model, texts, near_NZ, 2.0)
    print()


def under(model: Model, texts: Sequence[str], **values: Any) -> Floats:
    """Refined latents, by other constants of `refinement`."""
    with patch.multiple(refinement, **values):
        return model.encode(texts, refine=True)


def report(
    name: str, model: Model, texts: Sequence[str], z_NZ: Floats, scale: float, more: str = "", *, greedy: bool = True
) -> None:
    found = model.generate(z_NZ, guidance=scale, greedy=greedy, seed=0)
    print(f"{name} guidance {scale:g}  {kept(model, texts, found, z_NZ)}{more}", flush=True)


if __name__ == "__main__":
    main()
