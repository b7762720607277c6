"""What a model of molecules writes, as chemists judge it: is it a molecule, is it a new one, how like is it to the one
that it was made from, and what of a molecule's properties a latent holds.

    python -m tests.benchmarks.latent.study --corpora zinc_smiles --minutes 40 --arms 'small;none, small' --keep models
    python -m tests.benchmarks.latent.molecules TRAIN.txt TEST.txt models/* >> tests/benchmarks/latent/molecules.txt

Needs `pip install rdkit`. A text is valid if RDKit reads it; of what is valid, the share of different molecules is
unique, and of these what is not in the training texts is novel, by canonical SMILES (MOSES, arXiv 1811.12823). How like
two molecules are is the Tanimoto similarity of their Morgan fingerprints of radius 2 and 2,048 bits; something that is
not valid is like nothing, 0. Properties are read off the latents of test molecules by ridge regression, in five folds,
beside TF-IDF of characters with SVD to as many columns.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import Crippen, Descriptors, rdFingerprintGenerator, rdMolDescriptors
from rdkit.DataStructs import TanimotoSimilarity
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gptvae_cli import load
from gptvae_cli.api import Model
from gptvae_cli.sampling import walk

FINGERPRINTS = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
PROPERTIES = {
    "logP": Crippen.MolLogP,
    "molecular weight": Descriptors.MolWt,
    "polar surface": rdMolDescriptors.CalcTPSA,
    "rings": rdMolDescriptors.CalcNumRings,
}


def molecule(text: str) -> Any:
    """What RDKit reads in a text; None for what is no molecule, and for an empty text."""
    return Chem.MolFromSmiles(text) if text else None


def canonical(texts: Sequence[str]) -> list[str | None]:
    """The one SMILES by which a molecule is known, and None for what is none."""
    return [None if (found := molecule(text)) is None else Chem.MolToSmiles(found) for text in texts]


def likeness(texts: Sequence[str], others: Sequence[str]) -> float:
    """Mean similarity of pairs."""
    pairs = [(molecule(text), molecule(other)) for text, other in zip(texts, others, strict=True)]
    prints = [[found and FINGERPRINTS.GetFingerprint(found) for found in pair] for pair in pairs]
    return float(np.mean([TanimotoSimilarity(one, other) if one and other else 0.0 for one, other in prints]))


def drawn(model: Model, count: int, known: set[str | None], **sample: Any) -> str:
    """Molecules from the prior."""
    found = canonical(model.generate(prior=count, seed=0, **sample))
    valid = [smiles for smiles in found if smiles is not None]
    unique = set(valid)
    novel = len(unique - known) / max(1, len(unique))
    return f"valid {len(valid) / count:6.1%}  unique {len(unique) / max(1, len(valid)):6.1%}  novel {novel:6.1%}"


def made_from(texts: Sequence[str], written: Sequence[str]) -> str:
    """Molecules from those of others."""
    pairs = list(zip(canonical(texts), canonical(written), strict=True))
    valid = sum(other is not None for _, other in pairs) / len(pairs)
    same = sum(one == other for one, other in pairs) / len(pairs)
    return f"valid {valid:6.1%}  the same {same:6.1%}  likeness {likeness(texts, written):.3f}"


def readable(model: Model, texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The share of each property's variance that is read off latents, and off as many columns of characters (R2)."""
    reader = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    characters = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 4), lowercase=False, min_df=2),
        TruncatedSVD(model.dim_latent, random_state=0),
    ).fit_transform(texts)
    found = {}
    for name, measure in PROPERTIES.items():
        values = np.array([measure(molecule(text)) for text in texts])
        parts = [cross_val_predict(reader, features, values, cv=5) for features in (model.encode(texts), characters)]
        latent, words = (1 - ((values - part) ** 2).sum() / ((values - values.mean()) ** 2).sum() for part in parts)
        found[name] = (float(latent), float(words))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="texts that are not novel")
    parser.add_argument("test", type=Path)
    parser.add_argument("models", nargs="+", type=Path, help="with and without a latent")
    parser.add_argument("--prior", type=int, default=2000, help="molecules from the prior")
    parser.add_argument("--texts", type=int, default=1000, help="of the test split, to start from")
    asked = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    with asked.test.open(encoding="utf-8") as file:
        texts = [line.rstrip("\n") for line in islice(file, asked.texts)]
    known = set(canonical(asked.train.read_text("utf-8").splitlines()))
    for path in asked.models:
        model = load(path)
        print(f"# {path.name}, {model.header.training['steps']:,} steps; {asked.prior:,} from the prior")
        for temperature in (1.0, 0.7):
            print(f"at temperature {temperature:<9}", drawn(model, asked.prior, known, temperature=temperature))
        if not model.header.has_latent:
            print()
            continue
        print("the same, guidance 2    ", drawn(model, asked.prior, known, temperature=0.7, guidance=2))
        print("greedily                ", drawn(model, asked.prior, known, greedy=True))
        mean, std = model.posterior(texts)
        shuffled = random.Random(0).sample(texts, len(texts))
        near = mean + std * np.random.default_rng(0).standard_normal(mean.shape)
        middle = walk(mean, 3, "slerp")[1::2]
        print(f"{len(texts):,} test molecules, greedily")
        print("from their means        ", made_from(texts, model.generate(mean, greedy=True)))
        print("the same, guidance 2    ", made_from(texts, model.generate(mean, greedy=True, guidance=2)))
        refined = model.encode(texts, refine=True)
        print("refined                 ", made_from(texts, model.generate(refined, greedy=True)))
        print("the same, guidance 2    ", made_from(texts, model.generate(refined, greedy=True, guidance=2)))
        print("from their posteriors   ", made_from(texts, model.generate(near, greedy=True)))
        print("half-way to the next    ", made_from(texts[:-1], model.generate(middle, greedy=True)))
        print("the same, guidance 2    ", made_from(texts[:-1], model.generate(middle, greedy=True, guidance=2)))
        middle = walk(refined, 3, "slerp")[1::2]
        print("the same, refined       ", made_from(texts[:-1], model.generate(middle, greedy=True, guidance=2)))
        print(f"another test molecule     likeness {likeness(texts, shuffled):.3f}")
        for name, (latent, words) in readable(model, texts).items():
            print(f"R2 of {name:<18} {latent:5.2f}  characters {words:5.2f}")
        print()


if __name__ == "__main__":
    main()
