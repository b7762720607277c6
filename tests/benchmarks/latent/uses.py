"""What latents are worth to those who search, classify and augment: beside words, and with few labels.

    python -m tests.benchmarks.latent.study --corpora clinc150 --minutes 20 --seeds 1 --arms small --keep models
    python -m tests.benchmarks.latent.uses 'models/clinc150, small, 1.safetensors'

The intents of CLINC150's test split are told from its training split, by the nearest five texts (cosine) and by a
classifier that sees ten labelled texts of each intent; from latents, from TF-IDF of words, and from TF-IDF + SVD of as
many dimensions as a latent. "Both" is TF-IDF beside a tenth of the latent, which are about as long then.

Then these ten texts get company: texts that the model makes of them, with their labels. "Label kept" is judged by a
classifier that has seen all labels. "Kept ones" adds only those whose label a classifier of the ten believes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from gptvae_cli import Model, load

FEW, COPIES = 10, 4
WAYS: dict[str, dict[str, Any]] = {
    "the mean, greedy": {"greedy": True},
    "the mean, greedy, guidance 2": {"greedy": True, "guidance": 2},
    "refined, greedy": {"greedy": True},
    "refined, greedy, guidance 2": {"greedy": True, "guidance": 2},
    "refined, temperature 0.7, guidance 2": {"copies": COPIES, "temperature": 0.7, "guidance": 2},
    "the mean, temperature 0.7": {"copies": COPIES, "temperature": 0.7},
    "the mean, temperature 0.7, guidance 2": {"copies": COPIES, "temperature": 0.7, "guidance": 2},
    "samples, greedy": {"greedy": True},
    "samples, greedy, guidance 2": {"greedy": True, "guidance": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="trained on clinc150")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    model = load(asked.model, device="cpu")
    texts, labels_N = split("clinc150", "train")
    test, truth_N = split("clinc150", "test")
    words = vectorizer().fit(texts)
    svd = TruncatedSVD(model.dim_latent, random_state=0).fit(words.transform(texts))
    latents, latents_test = model.encode(texts), model.encode(test)
    refined, refined_test = model.encode(texts, refine=True), model.encode(test, refine=True)
    features: dict[str, tuple[Any, ...]] = {
        "latents": (latents, latents_test),
        "refined latents": (refined, refined_test),
        "TF-IDF + SVD": (svd.transform(words.transform(texts)), svd.transform(words.transform(test))),
        "TF-IDF": (words.transform(texts), words.transform(test)),
    }
    beside = zip(features["TF-IDF"], (latents, latents_test), strict=True)
    features["both"] = tuple(sparse.hstack([sparse_NW, latent_NZ / 10]).tocsr() for sparse_NW, latent_NZ in beside)
    for name, (train, other) in features.items():
        nearest = KNeighborsClassifier(5, metric="cosine").fit(train, labels_N).score(other, truth_N)
        of_few = [
            LinearSVC().fit(train[few], labels_N[few]).score(other, truth_N) for few in fews(labels_N, asked.seeds)
        ]
        print(f"{name:<15} nearest five {nearest:.1%}  ten an intent {spread(of_few)}", flush=True)
    judge = LinearSVC().fit(words.transform(texts), labels_N)
    print(f"the judge {judge.score(words.transform(test), truth_N):.1%}")
    for way, options in WAYS.items():
        kept, plain, all_of_them, some = [], [], [], []
        for seed, few in enumerate(fews(labels_N, asked.seeds)):
            own, their = [texts[i] for i in few], labels_N[few]
            made = company(model, own, way, options, seed)
            of_made = np.repeat(their, len(made) // len(own))
            kept.append(float((judge.predict(words.transform(made)) == of_made).mean()))
            of_own = vectorizer().fit(own)
            believed = LinearSVC().fit(of_own.transform(own), their).predict(of_own.transform(made)) == of_made
            plain.append(score(own, their, test, truth_N))
            all_of_them.append(score(own + made, np.concatenate([their, of_made]), test, truth_N))
            good = [text for text, good in zip(made, believed, strict=True) if good]
            some.append(score(own + good, np.concatenate([their, of_made[believed]]), test, truth_N))
        print(
            f"{way:<38} label kept {spread(kept)}  ten texts {spread(plain)}  with all made of them"
            f" {spread(all_of_them)}  with kept ones {spread(some)}",
            flush=True,
        )


def split(corpus: str, name: str) -> tuple[list[str], npt.NDArray[np.str_]]:
    """Texts of a corpus and their labels."""
    data = Path(os.environ["GPTVAE_TEST_DATA"])
    files = (data / f"{corpus}_{name}{ending}" for ending in (".txt", ".labels.txt"))
    texts, labels = (file.read_text("utf-8").splitlines() for file in files)
    return texts, np.array(labels)


def fews(labels_N: npt.NDArray[np.str_], seeds: int) -> list[npt.NDArray[np.int64]]:
    """Ten places of every label, for each seed."""
    kinds = np.unique(labels_N)
    choices = [np.random.default_rng(seed) for seed in range(seeds)]
    return [
        np.concatenate([rng.permutation(np.flatnonzero(labels_N == kind))[:FEW] for kind in kinds]) for rng in choices
    ]


def company(model: Model, own: Sequence[str], way: str, options: dict[str, Any], seed: int) -> list[str]:
    """Texts that the model makes of others, as many of each."""
    if way.startswith("refined"):
        return model.generate(model.encode(own, refine=True), seed=seed, **options)
    mean_NZ, std_NZ = model.posterior(own)
    if way.startswith("samples"):
        mean_NZ, std_NZ = (np.repeat(each, COPIES, axis=0) for each in (mean_NZ, std_NZ))
        mean_NZ = mean_NZ + std_NZ * np.random.default_rng(seed).standard_normal(std_NZ.shape, np.float32)
    return model.generate(mean_NZ, seed=seed, **options)


def score(texts: Sequence[str], labels_N: npt.NDArray[np.str_], test: Sequence[str], truth_N: Any) -> float:
    words = vectorizer().fit(texts)
    return float(LinearSVC().fit(words.transform(texts), labels_N).score(words.transform(test), truth_N))


def vectorizer() -> TfidfVectorizer:
    return TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


if __name__ == "__main__":
    main()
