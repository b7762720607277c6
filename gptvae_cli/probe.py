"""How well a linear classifier reads labels off latents, beside one that reads them off the words.

scikit-learn does it, which is the extra `probe`.

Shapes: N texts, F features, Z latent width.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from gptvae_cli.errors import ConfigError, DataError

Floats = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]

HELD_OUT = 0.2
FOLDS = 3
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""C of the logistic regression, the inverse of its L2 penalty."""
FEWEST = 5
"""A label that fewer texts bear is left out: training, three folds and the held-out part each need one."""

PROTOCOL = (
    "multinomial logistic regression on standardised features; accuracy on a stratified 20 % held out;"
    " L2 by stratified 3-fold cross-validation on the rest"
)


@dataclass(frozen=True, eq=False)
class Probe:
    """Which of the held-out texts each classifier labelled rightly.

    Args:
        texts: that were used, those trained on counted.
        labels: different ones.
        latent: by the latents.
        words: by TF-IDF and SVD of the same width.
        written: whose other text was labelled rightly by the same classifier as `words`; None where there are none.
        commonest: by always saying the commonest label.
        unit: what TF-IDF counted, `words` or `characters` (1 to 3 in a row), as cross-validation preferred.
    """

    texts: int
    labels: int
    latent: Flags
    words: Flags
    written: Flags | None
    commonest: Flags
    unit: str


def require_scikit_learn() -> None:
    """Raises a `ConfigError` where scikit-learn is not installed."""
    if find_spec("sklearn") is None:
        raise ConfigError("--labels needs scikit-learn, which is not installed", hint="pip install 'gptvae[probe]'")


def require_classes(labels: Iterable[str]) -> None:
    """Raises a `DataError` where fewer than two labels are borne by enough texts; an empty one is none."""
    times = Counter(filter(None, labels))
    kinds = sum(count >= FEWEST for count in times.values())
    if kinds < 2:
        raise DataError(
            f"found {kinds} labels that {FEWEST} texts or more bear, of {len(times)}; a probe needs two",
            hint="a label is a class that many texts share; of classes, evaluate more texts: --texts 0 takes all",
        )


def probe(
    latents_NZ: Floats,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    seed: int,
    read: Sequence[Hashable] | None = None,
    written: Sequence[str] | None = None,
) -> Probe:
    """Trains and tests both classifiers, on the same split; nothing is fitted to the held-out part.

    Args:
        latents_NZ: of the texts, their posteriors' means.
        texts: as the model writes them.
        labels: of the texts; an empty one is none, and its text is left out. Of equal texts the first counts.
        seed: of the split, the folds and the SVD.
        read: what the latents were made of, or keys of it, where that is not the texts. Of equal ones the first counts.
        written: other texts of which it is asked whether they bear the labels of these, such as their reconstructions.

    Raises:
        ConfigError: where scikit-learn is not installed.
        DataError: where fewer than two labels are borne by enough texts.

    Source: Alain and Bengio 2016 (arXiv 1610.01644) for probes; Deerwester et al. 1990 for TF-IDF and SVD.
    """
    require_scikit_learn()
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.model_selection import train_test_split

    seed %= 2**32  # scikit-learn takes no larger one
    names, number_N = np.unique(np.asarray(labels), return_inverse=True)
    labelled = np.flatnonzero(np.asarray(labels) != "")
    # What is trained on must not be tested on: neither a text, nor a latent, which is equal where what was read is.
    seen: set[tuple[str, Hashable]] = set()
    first = []
    for i in labelled.tolist():
        keys = {("text", texts[i]), ("read", texts[i] if read is None else read[i])}
        if not keys & seen:
            first.append(i)
            seen |= keys
    distinct = np.array(first, dtype=np.int64)
    times = np.bincount(number_N[distinct], minlength=len(names))
    usable = distinct[times[number_N[distinct]] >= FEWEST]
    require_classes([labels[i] for i in distinct])
    train, test = train_test_split(usable, test_size=HELD_OUT, stratify=number_N[usable], random_state=seed)
    wanted_train, wanted_test = number_N[train], number_N[test]
    texts_train, texts_test = ([texts[i] for i in part] for part in (train, test))

    latent = _classifier(latents_NZ[train], wanted_train, seed)
    commonest = wanted_test == np.bincount(wanted_train).argmax()
    words, kept, unit, best = commonest, commonest, "words", -1.0
    vectorizers = {
        # Words are what whitespace separates: the default pattern finds few in code, and no words of one letter.
        "words": TfidfVectorizer(token_pattern=r"\S+", sublinear_tf=True),
        "characters": TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), sublinear_tf=True),
    }
    for name, vectorizer in vectorizers.items() if any(map(str.strip, texts_train)) else ():
        counts = vectorizer.fit_transform(texts_train)
        if counts.shape[1] < 2:  # the one word that there is
            continue
        svd = TruncatedSVD(min(latents_NZ.shape[1], *counts.shape), random_state=seed)
        with np.errstate(all="ignore"):  # texts that are all equal have no variance to explain
            reduced = svd.fit_transform(counts)
        fitted = _classifier(reduced, wanted_train, seed)
        if fitted.best_score_ > best:
            words, kept = (
                fitted.predict(svd.transform(vectorizer.transform(several))) == wanted_test
                for several in (texts_test, texts_test if written is None else [written[i] for i in test])
            )
            unit, best = name, fitted.best_score_
    return Probe(
        texts=len(usable),
        labels=len(np.unique(number_N[usable])),
        latent=latent.predict(latents_NZ[test]) == wanted_test,
        words=words,
        written=None if written is None else kept,
        commonest=commonest,
        unit=unit,
    )


def _classifier(features_NF: Floats, wanted_N: npt.NDArray[np.int64], seed: int) -> Any:
    """A fitted logistic regression, its L2 chosen by cross-validation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    search = GridSearchCV(pipeline, {"logisticregression__C": STRENGTHS}, cv=folds)
    with warnings.catch_warnings():
        # Hardly any penalty on labels that can be told apart has no optimum; cross-validation judges it all the same.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return search.fit(features_NF, wanted_N)
