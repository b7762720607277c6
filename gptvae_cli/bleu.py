"""Corpus BLEU of words, as sacrebleu computes it with `tokenize="none"`.

Counts are additive, so they are taken a text at a time and scored for any set of texts.

Source: Papineni et al. 2002 (ACL P02-1040); Post 2018 (arXiv 1804.08771), whose signature names the variant.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:none|smooth:exp"
"""The variant in sacrebleu's terms. Words are what whitespace separates: the texts may be of any language or code."""

ORDER = 4
COUNTS = 2 * ORDER + 2


def counts(reference: str, written: str) -> list[int]:
    """What BLEU adds up over texts: matching 1- to 4-grams, n-grams written, words written, words of the reference."""
    wanted, found = reference.split(), written.split()
    matches, written_ngrams = [], []
    for n in range(1, ORDER + 1):
        ours = _ngrams(found, n)
        matches.append((ours & _ngrams(wanted, n)).total())
        written_ngrams.append(ours.total())
    return [*matches, *written_ngrams, len(found), len(wanted)]


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def score(sums: Sequence[float]) -> float:
    """BLEU between 0 and 100, of sums of `counts`; 0 where nothing as long as four words was written."""
    matches, written_ngrams, (length, reference_length) = sums[:ORDER], sums[ORDER : 2 * ORDER], sums[2 * ORDER :]
    if not any(matches) or not all(written_ngrams):
        return 0.0
    log_precision, smoothing = 0.0, 1.0
    for match, count in zip(matches, written_ngrams, strict=True):
        if match == 0:  # an order without a match counts half as much as the order without one before it
            smoothing *= 2
        log_precision += math.log((match or 1 / smoothing) / count) / ORDER
    return 100 * math.exp(log_precision + min(0.0, 1 - reference_length / length))
