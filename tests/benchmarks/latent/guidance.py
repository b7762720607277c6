"""How closely texts keep to their latent under guidance, and what it costs.

    python -m tests.benchmarks.latent.study --corpora clinc150 --minutes 20 --arms small --keep models
    python -m tests.benchmarks.latent.guidance 'models/clinc150, small, 0.safetensors' clinc150_test.txt

Texts are written from the latents (means) of the first texts of a test split. "In place" and "whole" are the share of
their tokens and of the texts that come back, "latent" is the cosine between the latent that a text was written from and
that of what was written, "nats" is the NLL of what was written in nats a token, importance-weighted over 20 latents,
and "repeats" the share of texts in which a token comes three times in a row.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sacrebleu

from gptvae_cli import Model, load
from gptvae_cli.tokenizer import Tokenizer

WAYS: dict[str, dict[str, Any]] = {
    "greedily": {"greedy": True},
    "temperature 1": {},
    "the same, min-p 0.1": {"min_p": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus", help="a file of $GPTVAE_TEST_DATA")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--scales", default="1,1.5,2,3", help="1 is no guidance")
    asked = parser.parse_args()
    model = load(asked.model, device="cpu")
    lines = (Path(os.environ["GPTVAE_TEST_DATA"]) / asked.corpus).read_text("utf-8").splitlines()
    texts = lines[: asked.texts]
    z_NZ = model.encode(texts)
    print(
        f"# {Path(asked.model).name}, {model.header.training['steps']:,} steps; {len(texts):,} texts of {asked.corpus}"
    )
    print(f"{'the texts themselves':<35}{'':>51}nats {nats(model, texts):.2f}  repeats {repeats(model, texts):.1%}")
    for way, options in WAYS.items():
        for scale in map(float, asked.scales.split(",")):
            found = model.generate(z_NZ, guidance=scale, seed=0, **options)
            print(f"{way:<21} guidance {scale:<4} {kept(model, texts, found, z_NZ)}", flush=True)
    print()


def kept(model: Model, texts: Sequence[str], found: Sequence[str], z_NZ: npt.NDArray[np.float32]) -> str:
    said, meant = tokens(model, found), tokens(model, texts)
    in_place = sum(a == b for one, other in zip(said, meant, strict=True) for a, b in zip(one, other, strict=False))
    whole = np.mean([one == other for one, other in zip(found, texts, strict=True)])
    bleu = sacrebleu.corpus_bleu(list(found), [list(texts)], tokenize="none", force=True).score
    other_NZ = model.encode(found)
    norms_N = np.linalg.norm(z_NZ, axis=1) * np.linalg.norm(other_NZ, axis=1)
    cosine = float(((z_NZ * other_NZ).sum(1) / norms_N).mean())
    return (
        f"in place {in_place / sum(map(len, meant)):5.1%}  whole {whole:5.1%}  BLEU {bleu:4.1f}  latent {cosine:.2f}"
        f"  nats {nats(model, found):.2f}  repeats {repeats(model, found):.1%}"
    )


def nats(model: Model, texts: Sequence[str]) -> float:
    return float(model.nll(texts, samples=20, seed=0).sum()) / sum(map(len, tokens(model, texts)))


def repeats(model: Model, texts: Sequence[str]) -> float:
    rows = tokens(model, texts)
    return float(np.mean([any(a == b == c for a, b, c in zip(row, row[1:], row[2:], strict=False)) for row in rows]))


def tokens(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """With an end, up to the model's length."""
    end, most = model.header.model.eos_id, model.max_seq_len - 1
    return [[*row, end][:most] for row in Tokenizer.from_json(model.header.tokenizer).encode_batch(list(texts))]


if __name__ == "__main__":
    main()
