"""Everything `evaluate` says of a model, over any number of texts.

Texts come in pieces. Of each text a few numbers are kept, and its posterior's mean; of a random sample of them the
whole posterior and the text itself. Memory does not grow beyond that.

Shapes: N texts, all or those of the sample, Z latent width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gptvae_cli import bleu, bootstrap
from gptvae_cli.checkpoint import Checkpoint
from gptvae_cli.data import batches_of, plan_batches
from gptvae_cli.device import tokens_together
from gptvae_cli.errors import CheckpointError, ConfigError
from gptvae_cli.evaluation import (
    Keys,
    correct_tokens,
    importance_weighted,
    keys_of,
    measure_texts,
    measure_without_latent,
    read_keys_of,
    write_greedily,
)
from gptvae_cli.latent import LEAST_NATS, active_dimensions, entropy, has_collapsed, pointwise_information
from gptvae_cli.probe import PROTOCOL, probe

Floats = npt.NDArray[np.float64]
Columns = dict[str, Floats]
Arrays = dict[str, npt.NDArray[Any]]
Row = Sequence[int]

SAMPLE_TEXTS = 10_000
"""Texts, at random, over which mutual information is estimated (the estimate takes their number squared) and probes
are trained, where there are more."""
_GOLDEN = 0x4F1BBCDCBFA53E0B
"""2^63 over the golden ratio: multiples of it, modulo 2^63, are spread as evenly as can be."""
_PIECE_TEXTS, _PIECE_TOKENS = 4096, 2**21
_COUNTS = ("texts", "empty", "tokens", "words", "bytes")
_PER_TEXT = {
    "nll": "nll_nats",
    "right": "cross_entropy_nats",
    "shuffled": "cross_entropy_shuffled_nats",
    "without": "cross_entropy_without_nats",
    "kl": "kl_nats",
}
"""Columns of nats, and what they are called of one text."""
_NGRAMS = [f"bleu_{i}" for i in range(bleu.COUNTS)]


@dataclass(frozen=True, eq=False)
class Piece:
    """What was measured of some consecutive texts: columns and hashes of the texts [N], and for a model with a latent
    their `posteriors`: places in the corpus, texts, and numbers of what the encoder read [N], means, log-variances and
    a sample of each [N Z]."""

    columns: Columns
    keys_N: Keys
    texts_N: Keys
    posteriors: Arrays | None


def measured(
    checkpoint: Checkpoint,
    rows: Iterable[Row],
    sources: Iterable[Row] | None = None,
    *,
    samples: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    banned: Sequence[int] = (),
    running: bool = False,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Iterator[Piece]:
    """Measures texts, a piece at a time, in their order.

    Args:
        checkpoint: the model; one that was trained without a latent is measured without.
        rows: texts as tokens with their specials, what the decoder writes.
        sources: what the encoder reads, if not the same.
        samples: K of the importance-weighted likelihood.
        seed: of the latents that are drawn.
        dtype: bfloat16 computes under autocast.
        banned: tokens that a reconstruction never holds.
        running: texts are windows of running ones.
        on_progress: called with the texts measured so far.
    """
    model, config, tokenizer = checkpoint.model, checkpoint.header.model, checkpoint.tokenizer
    tally = _Tally(checkpoint, running=running)
    done, most = 0, tokens_together(model.device)
    for piece in _pieces(zip(rows, repeat(None) if sources is None else sources, strict=False)):
        targets = [row for row, _ in piece]
        read = None if sources is None else [source for _, source in piece if source is not None]
        batches = batches_of(targets, read, config.pad_id, most)
        # Batches are in order of length; back[i] is where in them text i is.
        back = np.argsort(np.concatenate(plan_batches(np.array([*map(len, targets)]), most)))
        keys_N = np.concatenate([keys_of(batch, config.pad_id) for batch in batches])[back]
        plain = [[token for token in row if token not in (config.bos_id, config.eos_id)] for row in targets]
        texts = [tokenizer.decode(ids) for ids in plain]
        ends_N = np.array([row[-1] == config.eos_id for row in targets])
        columns = tally(plain, texts, ends_N)
        texts_N = np.array([hash(each) for each in zip(texts, columns["bytes"].tolist(), strict=True)])
        if not checkpoint.header.has_latent:
            columns["nll"] = measure_without_latent(model, batches, dtype=dtype).numpy()[back]
            done += len(targets)
            on_progress(done)
            yield Piece(columns, keys_N, texts_N, None)
            continue
        found = measure_texts(model, batches, seed=seed, dtype=dtype)
        nll_N = importance_weighted(
            model,
            batches,
            samples,
            seed=seed,
            dtype=dtype,
            on_progress=lambda texts, before=done: on_progress(before + texts),  # type: ignore[misc]
        )
        mean_NZ = found.posterior.mean_BZ[back]
        written = write_greedily(model, mean_NZ.to(model.device), banned=banned, dtype=dtype)
        ngrams = [bleu.counts(a, tokenizer.decode(ids)) for a, ids in zip(texts, written, strict=True)]
        columns |= {
            "nll": nll_N.numpy()[back],
            "right": found.cross_entropy_N.numpy()[back],
            "shuffled": found.cross_entropy_shuffled_N.numpy()[back],
            "without": found.cross_entropy_without_N.numpy()[back],
            "kl": found.kl_N.numpy()[back],
            "correct": np.array([correct_tokens(*each) for each in zip(plain, written, ends_N, strict=True)], float),
            "exact": np.array([a == b for a, b in zip(plain, written, strict=True)], float),
            **dict(zip(_NGRAMS, np.array(ngrams, float).T, strict=True)),
        }
        posteriors = {
            "place": np.arange(done, done + len(targets)),
            "text": np.array(texts, dtype=object),
            "read": read_keys_of(batches, config.pad_id)[back],
            "mean": mean_NZ.numpy(),
            "log_var": found.posterior.log_var_BZ[back].numpy(),
            "sample": found.sample_NZ[back].numpy(),
        }
        done += len(targets)
        yield Piece(columns, keys_N, texts_N, posteriors)


class _Tally:
    """Counts the tokens, words and bytes of texts, which come in pieces.

    Args:
        checkpoint: whose tokens they are.
        running: texts are windows, and one that is as long as the model reads goes on in the next: a word may be in
            two of them, and counts once. (So does one too few where a file ends as a window does, once in T files.)
    """

    def __init__(self, checkpoint: Checkpoint, *, running: bool) -> None:
        tokenizer = checkpoint.tokenizer
        self.sizes = tokenizer.sizes() if tokenizer.is_exact else None
        self.longest = checkpoint.header.model.max_seq_len - 1
        self.running, self.within_a_word = running, False

    def __call__(self, plain: Sequence[Row], texts: Sequence[str], ends_N: npt.NDArray[np.bool_]) -> Columns:
        """The counts of the next texts: as tokens without specials, as they are, and whether each has its end, which
        counts as a token, a word and a byte."""
        tokens_N = np.array([*map(len, plain)])
        words_N = np.array([len(text.split()) for text in texts])
        if self.running:
            begins_N = np.array([text[:1].strip() != "" for text in texts])
            ends_within_N = (tokens_N == self.longest) & np.array([text[-1:].strip() != "" for text in texts])
            goes_on_N = np.append(self.within_a_word, ends_within_N)
            words_N -= begins_N & goes_on_N[:-1]
            self.within_a_word = bool(goes_on_N[-1])
        if self.sizes is None:
            bytes_N = np.array([len(text.encode()) for text in texts])
        else:  # a text that was cut may end within a character, which the decoded one shows as U+FFFD
            bytes_N = np.array([sum(map(self.sizes.__getitem__, ids)) for ids in plain])
        counts = {"tokens": tokens_N + ends_N, "words": words_N + ends_N, "bytes": bytes_N + ends_N}
        counts |= {"texts": np.ones(len(texts)), "empty": bytes_N == 0}
        return {name: count_N.astype(float) for name, count_N in counts.items()}


def _pieces(items: Iterable[tuple[Row, Row | None]]) -> Iterator[list[tuple[Row, Row | None]]]:
    """Cuts texts into lists that fit in memory. Two wait for the next list, for a lone text has no other beside it."""
    piece: list[tuple[Row, Row | None]] = []
    tokens = 0
    for item in items:
        piece.append(item)
        tokens += len(item[0])
        if len(piece) >= 4 and (len(piece) >= _PIECE_TEXTS + 2 or tokens >= _PIECE_TOKENS):
            yield piece[:-2]
            piece = piece[-2:]
            tokens = sum(len(row) for row, _ in piece)
    if piece:
        yield piece


@dataclass
class Gathered:
    """The pieces of one model together."""

    columns: list[Columns] = field(default_factory=list)
    keys: list[Keys] = field(default_factory=list)
    hashes: list[Keys] = field(default_factory=list)
    means: list[npt.NDArray[np.float32]] = field(default_factory=list)
    sample: Arrays | None = None
    """Posteriors of the texts whose rank is among the lowest, in order of rank. Ranks are as good as random, so these
    are a random sample of the texts, the same one in whatever order the texts come."""
    seen: Counter[int] = field(default_factory=Counter)

    def add(self, piece: Piece) -> None:
        """Adds the next piece."""
        self.columns.append(piece.columns)
        self.keys.append(piece.keys_N)
        self.hashes.append(piece.texts_N)
        if piece.posteriors is not None:
            self.means.append(piece.posteriors["mean"])
            ranked = {"rank": self._ranks(piece.keys_N), **piece.posteriors}
            if self.sample is not None:
                ranked = {name: np.concatenate([self.sample[name], ranked[name]]) for name in ranked}
            lowest = np.argsort(ranked["rank"], kind="stable")[:SAMPLE_TEXTS]
            self.sample = {name: values[lowest] for name, values in ranked.items()}

    def _ranks(self, keys_N: Keys) -> Keys:
        """Of texts with these keys, which are hashes: equal texts have one key, and each time another rank."""
        ranks = []
        for key in keys_N.tolist():
            ranks.append((key + self.seen[key] * _GOLDEN) % 2**63)
            self.seen[key] += 1
        return np.array(ranks, dtype=np.int64)

    @property
    def texts(self) -> int:
        return sum(map(len, self.keys))

    def order(self) -> npt.NDArray[np.int64]:
        """That of the keys. What is drawn from texts in this order does not depend on the order that they came in."""
        return np.argsort(np.concatenate(self.keys), kind="stable")

    def per_text(self) -> Iterator[dict[str, int | float | bool]]:
        """The figures of every text, in the order that the texts came in: nats, and what `Report` is of in all."""
        for columns in self.columns:
            for row in range(len(columns["nll"])):
                counts = {name: round(columns[name][row]) for name in ("tokens", "bytes")}
                nats = {name: float(columns[key][row]) for key, name in _PER_TEXT.items() if key in columns}
                whole = {"exact_match": bool(columns["exact"][row])} if "exact" in columns else {}
                yield counts | nats | whole

    def table(self, order: npt.NDArray[np.int64]) -> Columns:
        """The columns of all texts."""
        return {name: np.concatenate([each[name] for each in self.columns])[order] for name in self.columns[0]}


@dataclass(frozen=True)
class Report:
    """Figures by name, which says their unit, and the intervals of those that have one."""

    values: dict[str, Any]
    intervals: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.values,
            "intervals_95": {name: list(ends) for name, ends in self.intervals.items()},
            "intervals_resamples": bootstrap.RESAMPLES,
            "intervals_seed": bootstrap.SEED,
        }


def report(
    model: Gathered,
    baseline: Gathered | None = None,
    *,
    labels: Sequence[str] | None = None,
    samples: int,
    seed: int,
) -> Report:
    """All figures of a model.

    Args:
        model: what was measured of it.
        baseline: the same texts by a model to compare with.
        labels: of the texts, in their order.
        samples, seed: as in `measured`.

    Raises:
        CheckpointError: for figures that are not finite.
        ConfigError: where the baseline did not read the same texts: it cuts long ones elsewhere, or changes them.
        DataError, ConfigError: as `probe.probe`.
    """
    order = model.order()
    table = model.table(order)
    if baseline is not None:
        table["baseline"] = _baseline_column(model, baseline, order)
    if not all(np.isfinite(column_N).all() for column_N in table.values()):
        raise CheckpointError("a figure is not a finite number: the weights of the model are too large")
    error = float(table["nll"].std(ddof=1) / math.sqrt(model.texts))
    values: dict[str, Any] = {name: round(table[name].sum()) for name in _COUNTS}
    values |= {"seed": seed, **figures(bootstrap.totals(table)), "nll_standard_error_nats_per_text": error}
    intervals = bootstrap.intervals(table, figures)
    if "exact" in table:
        intervals["exact_match"] = bootstrap.of_share(round(table["exact"].sum()), model.texts)
    if baseline is not None and baseline.sample is not None:
        # Which has a latent of its own: that of the model saves it nothing that would be known.
        values.pop("efficiency_nats_per_nat", None)
        intervals.pop("efficiency_nats_per_nat", None)
    sample = model.sample
    if sample is None:
        return Report(values | {"nll_samples": None}, intervals)
    if not table[_NGRAMS[bleu.ORDER * 2 - 1]].any():
        # Nothing as long as four words was written: BLEU is 0 by convention, and says nothing.
        values["bleu"] = None
        del intervals["bleu"]
    values |= {"nll_samples": samples, "bleu_signature": bleu.SIGNATURE}
    information_N = pointwise_information(*(torch.from_numpy(sample[name]) for name in ("mean", "log_var", "sample")))
    values |= _information(model, sample, float(information_N.mean()), values["kl_nats_per_text"])
    lost = values["cross_entropy_shuffled_nats_per_text"] - values["cross_entropy_nats_per_text"]
    values["latent_used"] = not values["collapsed"] and lost >= LEAST_NATS
    # Of the texts' own terms alone, beside the same posteriors: a text that is drawn twice cannot be told from itself.
    intervals |= bootstrap.intervals(
        {"texts": np.ones(len(information_N)), "nats": information_N.numpy()},
        lambda sums: {"mutual_information_nats": sums["nats"] / sums["texts"]},
    )
    if labels is not None:
        values["probe"], intervals["probe.z_accuracy"], intervals["probe.words_accuracy"] = _probe(sample, labels, seed)
    return Report(values, intervals)


def _baseline_column(model: Gathered, baseline: Gathered, order: npt.NDArray[np.int64]) -> Floats:
    """The NLL of every text by the baseline."""
    different = model.texts
    if baseline.texts == model.texts:
        different = int((np.concatenate(baseline.hashes) != np.concatenate(model.hashes)).sum())
    if different:
        raise ConfigError(
            f"model and baseline read {different:,} texts differently: they cut or tokenise them in other ways",
            hint="compare models of the same tokenizer and --max-seq-len, or leave long texts out",
        )
    return baseline.table(order)["nll"]


def figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Every figure that is a function of sums over the texts: of all of them, or of a resample."""
    texts, nll = sums["texts"], sums["nll"]
    found = {
        "nll_nats_per_text": nll / texts,
        "perplexity_per_token": math.exp(min(700.0, nll / sums["tokens"])),
        "perplexity_per_word": math.exp(min(700.0, nll / max(1.0, sums["words"]))),
        "bits_per_byte": nll / sums["bytes"] / math.log(2),
    }
    if "baseline" in sums:
        found["baseline_nll_nats_per_text"] = sums["baseline"] / texts
        found["nll_above_baseline_nats_per_text"] = (nll - sums["baseline"]) / texts
    if "kl" not in sums:
        return found
    if "baseline" in sums:
        found["efficiency_nats_per_nat"] = (sums["baseline"] - sums["right"]) / max(1e-9, sums["kl"])
    return found | {
        "nll_bound_nats_per_text": (sums["right"] + sums["kl"]) / texts,
        "cross_entropy_nats_per_text": sums["right"] / texts,
        "cross_entropy_shuffled_nats_per_text": sums["shuffled"] / texts,
        "cross_entropy_without_nats_per_text": sums["without"] / texts,
        "kl_nats_per_text": sums["kl"] / texts,
        "token_accuracy": sums["correct"] / sums["tokens"],
        "exact_match": sums["exact"] / texts,
        "bleu": bleu.score([sums[name] for name in _NGRAMS]),
    }


def _information(model: Gathered, sample: Arrays, information: float, kl: float) -> dict[str, Any]:
    """What the latent carries."""
    texts, most = len(sample["text"]), entropy(sample["read"])
    mean_NZ = torch.from_numpy(np.concatenate(model.means))
    return {
        "mutual_information_nats": information,
        "mutual_information_texts": texts,
        "mutual_information_most_nats": most,
        "information_share": information / max(1e-9, min(kl, most)),
        "collapsed": has_collapsed(information, most),
        "dim_latent": mean_NZ.shape[1],
        "active_001": active_dimensions(mean_NZ, 0.01),
        "active_02": active_dimensions(mean_NZ, 0.2),
    }


def _probe(
    sample: Arrays, labels: Sequence[str], seed: int
) -> tuple[dict[str, Any], tuple[float, float], tuple[float, float]]:
    """The probes' figures, and the intervals of both accuracies over the held-out texts."""
    texts, read = sample["text"].tolist(), sample["read"].tolist()
    found = probe(sample["mean"], texts, [labels[place] for place in sample["place"]], seed=seed, read=read)
    held_out = len(found.latent)
    latent, words = (bootstrap.of_share(int(flags.sum()), held_out) for flags in (found.latent, found.words))
    values = {
        "z_accuracy": float(found.latent.mean()),
        "words_accuracy": float(found.words.mean()),
        "words_features": f"TF-IDF of {found.unit}, SVD to the width of z",
        "commonest_label_accuracy": float(found.commonest.mean()),
        "labels": found.labels,
        "texts": found.texts,
        "held_out_texts": held_out,
        "protocol": PROTOCOL,
        "seed": seed,
    }
    return values, latent, words
