"""BLEU, against sacrebleu."""

from __future__ import annotations

import random

import pytest
from sacrebleu.metrics.bleu import BLEU

from gptvae_cli.bleu import COUNTS, SIGNATURE, counts, score

WORDS = ["a", "b", "the", "The", "naïve", "日本", "x.y", "z"]


def corpus(seed: int, texts: int, longest: int, agree: float) -> tuple[list[str], list[str]]:
    """References, and texts that agree with them word by word with this probability."""
    draw = random.Random(seed)
    references = [[draw.choice(WORDS) for _ in range(draw.randint(0, longest))] for _ in range(texts)]
    written = [
        [word if draw.random() < agree else draw.choice(WORDS) for word in words if draw.random() < 0.9]
        for words in references
    ]
    return [" ".join(words) for words in references], ["  ".join(words) for words in written]


def ours(references: list[str], written: list[str]) -> float:
    return score([sum(column) for column in zip(*map(counts, references, written), strict=True)])


@pytest.mark.parametrize(
    ("seed", "texts", "longest", "agree"),
    [(0, 50, 12, 0.9), (1, 50, 12, 0.5), (2, 5, 6, 0.3), (3, 30, 5, 0.0), (4, 1, 9, 1.0), (5, 20, 3, 1.0)],
    ids=["alike", "half", "few", "by chance", "one text", "shorter than four words"],
)
def test_corpus_bleu_is_that_of_sacrebleu(seed: int, texts: int, longest: int, agree: float) -> None:
    references, written = corpus(seed, texts, longest, agree)
    expected = BLEU(tokenize="none").corpus_score(written, [references]).score
    assert ours(references, written) == pytest.approx(expected, rel=1e-9)


def test_missing_orders_are_smoothed_as_in_sacrebleu() -> None:
    """No three words in a row agree: two orders without a match, the second counting half as much as the first."""
    references, written = ["a b c d e f g"], ["a b x d e y g"]
    expected = BLEU(tokenize="none").corpus_score(written, [references]).score
    assert 0 < expected < 100
    assert ours(references, written) == pytest.approx(expected, rel=1e-9)


def test_the_same_texts_have_100_and_nothing_has_0() -> None:
    references = ["one two three four", "five six seven eight nine"]
    assert ours(references, references) == pytest.approx(100)
    assert ours(references, ["", ""]) == 0
    assert counts("", "") == [0] * COUNTS


def test_the_signature_is_that_of_sacrebleu_for_these_options() -> None:
    metric = BLEU(tokenize="none")
    metric.corpus_score(["a"], [["a"]])
    full = str(metric.get_signature())
    assert full.rpartition("|version:")[0] == SIGNATURE
