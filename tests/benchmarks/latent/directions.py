"""Whether adding a direction to latents changes what it stands for, and keeps the rest.

    python -m tests.benchmarks.latent.study --corpora tatoeba_5langs --minutes 20 --arms small --keep models
    python -m tests.benchmarks.latent.directions 'models/tatoeba_5langs, small, 0.safetensors' tatoeba_5langs

A direction is the mean latent of the training texts with one label, less that of another's. It is added, so many times,
to the latents of 100 test texts with the other, which are means of posteriors or refined. "Label" is the share of what
is then written greedily that a classifier (TF-IDF of characters, a linear support vector machine) calls by the first
label, the mean over pairs of labels. "Near" is over how many of nine other such texts the mean latent of what is
written, less the direction, prefers that of its own, by the cosine; 4.5 is chance.
"""

from __future__ import annotations

import argparse
from itertools import permutations, product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from gptvae_cli import load
from tests.benchmarks.latent.uses import split

PAIRS, TEXTS, TRAIN = 20, 100, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("corpus", help="a corpus of $GPTVAE_TEST_DATA with labels")
    asked = parser.parse_args()
    model = load(asked.model, device="cpu")
    texts, labels_N = split(asked.corpus, "train")
    texts, labels_N = texts[:TRAIN], labels_N[:TRAIN]
    test, truth_N = split(asked.corpus, "test")
    judge = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True), LinearSVC())
    judge.fit(texts, labels_N)
    print(f"# {Path(asked.model).name}; the judge is right of {judge.score(test, truth_N):.1%} of the test texts")
    z_NZ = model.encode(texts)
    means = {label: z_NZ[labels_N == label].mean(axis=0) for label in np.unique(labels_N)}
    pairs = list(permutations(means, 2))
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))[:PAIRS]]
    some = {
        label: [text for text, own in zip(test, truth_N, strict=True) if own == label][:TEXTS]
        for label in {source for source, _ in pairs}
    }
    for way in ("means", "refined"):
        z = {label: model.encode(own, refine=way == "refined") for label, own in some.items()}
        for guidance, weight in product((1.0, 2.0), (0.0, 0.5, 1.0, 1.5, 2.0)):
            hits, nearer = [], []
            for source, goal in pairs:
                direction_Z = weight * (means[goal] - means[source])
                written = model.generate(z[source] + direction_Z, greedy=True, guidance=guidance)
                hits.append(float((judge.predict(written) == goal).mean()))
                nearer.append(near(model.encode(some[source]), model.encode(written) - direction_Z))
            print(
                f"{way:<8}guidance {guidance:<4} direction {weight:<4} label {np.mean(hits):6.1%}"
                f"  near {np.mean(nearer):.1f}",
                flush=True,
            )


def near(z_NZ: npt.NDArray[np.float32], other_NZ: npt.NDArray[np.float32]) -> float:
    unit_NZ, other_NZ = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (z_NZ, other_NZ))
    cosine_NN = other_NZ @ unit_NZ.T
    further = [
        [cosine_NN[i, i] > cosine_NN[i, (i + j) % len(cosine_NN)] for j in range(1, 10)] for i in range(len(z_NZ))
    ]
    return float(np.mean(np.sum(further, axis=1)))


if __name__ == "__main__":
    main()
