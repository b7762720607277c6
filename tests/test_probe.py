"""Linear probes, against scikit-learn used by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split

from gptvae_cli.errors import ConfigError, DataError
from gptvae_cli.probe import FEWEST, STRENGTHS, probe

TOPICS = {"food": "bread soup salt apple rice", "sport": "goal ball team race match", "sky": "sun moon star cloud rain"}


def data(count: int = 150, width: int = 6, spread: float = 1.5) -> tuple[Any, list[str], list[str]]:
    """Latents around a centre for each label, and texts with words of its topic among others."""
    random = np.random.default_rng(1)
    names = list(TOPICS)
    labels = [names[i] for i in random.integers(0, 3, count)]
    centres = {name: random.normal(0, 1, width) for name in names}
    latents = np.stack([centres[label] + spread * random.normal(0, 1, width) for label in labels]).astype("float32")
    texts = []
    for label in labels:
        topic = TOPICS[label if random.random() < 0.7 else names[random.integers(3)]].split()
        texts.append(" ".join(random.choice([*topic, "a", "the", "is"], 6)))
    return latents * np.arange(1, width + 1), texts, labels


def by_hand(latents: Any, labels: list[str], seed: int) -> np.ndarray[Any, Any]:
    """What the protocol says, step by step."""
    wanted = np.array(labels)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=wanted, random_state=seed)

    def accuracy(fit: Any, judge: Any, strength: float) -> Any:
        mean, deviation = latents[fit].mean(0), latents[fit].std(0)
        model = LogisticRegression(C=strength, max_iter=1000).fit((latents[fit] - mean) / deviation, wanted[fit])
        return model.predict((latents[judge] - mean) / deviation) == wanted[judge]

    folds = list(StratifiedKFold(3, shuffle=True, random_state=seed).split(train, wanted[train]))
    means = [np.mean([accuracy(train[a], train[b], c).mean() for a, b in folds]) for c in STRENGTHS]
    right: np.ndarray[Any, Any] = accuracy(train, test, STRENGTHS[int(np.argmax(means))])
    return right


@pytest.mark.parametrize("seed", [0, 5])
def test_accuracy_is_what_the_protocol_gives_by_hand(seed: int) -> None:
    latents, texts, labels = data()
    found = probe(latents, texts, labels, seed=seed)
    assert found.latent.tolist() == by_hand(latents, labels, seed).tolist()
    assert (found.texts, found.labels, len(found.latent)) == (150, 3, 30)
    assert 0.4 < found.latent.mean() < 1
    assert 0.4 < found.words.mean() < 1
    assert 0.3 < found.commonest.mean() < 0.5


def test_other_texts_are_labelled_by_what_was_learnt_from_these() -> None:
    """Each by itself: what is written of food has the label of food, whichever its text had."""
    latents, texts, labels = data()
    _, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=np.array(labels), random_state=0)
    assert probe(latents, texts, labels, seed=0).written is None
    same = probe(latents, texts, labels, seed=0, written=texts)
    assert same.written is not None
    assert same.written.tolist() == same.words.tolist()
    topics = [["sky", "food"][i % 2] for i in range(len(texts))]
    found = probe(latents, texts, labels, seed=0, written=[TOPICS[topic] for topic in topics])
    assert found.written is not None
    assert found.written.tolist() == [topics[i] == labels[i] for i in test]
    assert found.words.tolist() == same.words.tolist()


def test_labels_that_say_nothing_cannot_be_read(one_thread: None) -> None:
    latents, texts, labels = data(300)
    shuffled = list(np.random.default_rng(0).permutation(labels))
    found = probe(latents, texts, shuffled, seed=0)
    assert found.latent.mean() < 0.5
    assert found.words.mean() < 0.5


def test_unlabelled_texts_and_rare_labels_are_left_out() -> None:
    latents, texts, labels = data()
    known = probe(latents, texts, labels, seed=0)
    blank = np.zeros((FEWEST + 4, latents.shape[1]), "float32")
    more = np.concatenate([latents, blank])
    found = probe(more, [*texts, *["x"] * (FEWEST + 4)], [*labels, *[""] * FEWEST, *["rare"] * 4], seed=0)
    assert (found.texts, found.labels) == (known.texts, known.labels)
    assert found.latent.tolist() == known.latent.tolist()


def test_texts_without_words_are_as_good_as_the_commonest_label() -> None:
    latents, _, labels = data()
    found = probe(latents, [" " * i for i in range(len(labels))], labels, seed=0)
    assert found.words.tolist() == found.commonest.tolist()


def test_characters_are_counted_where_words_say_nothing() -> None:
    """Names, each one word that occurs once."""
    random = np.random.default_rng(2)
    labels = ["vowels", "consonants"] * 40
    letters = {"vowels": list("aeiou"), "consonants": list("bdgkt")}
    texts = ["".join(random.choice(letters[label], 12)) for label in labels]
    found = probe(random.normal(size=(80, 8)).astype("float32"), texts, labels, seed=0)
    assert found.unit == "characters"
    assert found.words.mean() == 1


def test_words_are_counted_where_characters_say_less() -> None:
    """The same letters make the words of both labels."""
    random = np.random.default_rng(2)
    labels = ["one", "other"] * 60
    words = {"one": ["abab cdcd", "dede fgfg"], "other": ["abcd abcd", "defg defg"]}
    filler = ["".join(random.choice(list("abcdefg"), 4)) for _ in range(30)]
    texts = [" ".join([*random.choice(filler, 12), random.choice(words[label])]) for label in labels]
    found = probe(random.normal(size=(120, 8)).astype("float32"), texts, labels, seed=0)
    assert found.unit == "words"


def test_nothing_is_fitted_to_the_texts_that_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, texts, labels = data()
    fitted: list[list[str]] = []
    fit = TfidfVectorizer.fit_transform

    def record(self: Any, raw_documents: list[str], y: Any = None) -> Any:
        fitted.append(list(raw_documents))
        return fit(self, raw_documents, y)

    monkeypatch.setattr(TfidfVectorizer, "fit_transform", record)
    probe(latents, texts, labels, seed=3)
    train, _ = train_test_split(np.arange(150), test_size=0.2, stratify=np.array(labels), random_state=3)
    assert fitted == [[texts[i] for i in train]] * 2


def test_equal_texts_are_not_learnt_by_heart() -> None:
    """Labels at random, each text four times: a copy in the part that is trained on would give its label away."""
    random = np.random.default_rng(4)
    latents = random.normal(size=(120, 60)).astype("float32")
    texts = [f"text {i}" for i in range(120)]
    labels = [str(label) for label in random.integers(0, 2, 120)]
    once = probe(latents, texts, labels, seed=0)
    often = probe(np.concatenate([latents] * 4), texts * 4, labels * 4, seed=0)
    assert (often.texts, often.latent.tolist(), often.words.tolist()) == (
        120,
        once.latent.tolist(),
        once.words.tolist(),
    )


def test_latents_that_were_made_of_one_text_are_not_learnt_by_heart() -> None:
    """Where the encoder reads other texts, several may have one source: labels at random, one for each source."""
    random = np.random.default_rng(5)
    latents = random.normal(size=(120, 60)).astype("float32")
    labels = [str(label) for label in random.integers(0, 2, 120)]
    texts = [f"text {i}" for i in range(480)]
    once = probe(latents, texts[:120], labels, seed=0)
    often = probe(np.concatenate([latents] * 4), texts, labels * 4, seed=0, read=[*range(120)] * 4)
    assert (often.texts, often.latent.tolist()) == (120, once.latent.tolist())


def test_a_seed_of_any_size_is_taken() -> None:
    latents, texts, labels = data()
    assert probe(latents, texts, labels, seed=2**63 - 1).texts == 150


def test_of_equal_texts_the_first_one_is_labelled() -> None:
    latents, texts, labels = data()
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    once = probe(latents, texts, labels, seed=0)
    wrong = [*labels[1:], labels[0]]
    twice = probe(np.concatenate([latents, latents]), texts * 2, labels + wrong, seed=0)
    assert (twice.texts, twice.latent.tolist(), twice.words.tolist()) == (
        150,
        once.latent.tolist(),
        once.words.tolist(),
    )


def test_one_label_is_not_enough() -> None:
    latents, texts, _ = data()
    with pytest.raises(DataError, match="found 1 label") as caught:
        probe(latents, texts, ["same"] * 148 + ["other"] * 2, seed=0)
    assert "--texts 0" in str(caught.value.hint)
    assert "a class that many texts share" in str(caught.value.hint), "all the texts may have been taken already"


def test_without_scikit_learn_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, texts, labels = data()
    monkeypatch.setattr("gptvae_cli.probe.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="scikit-learn") as caught:
        probe(latents, texts, labels, seed=0)
    assert caught.value.hint == "pip install 'gptvae[probe]'"
