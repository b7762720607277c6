"""What `evaluate` measures of texts, of which there may be any number: they come in pieces.

Of each text a few numbers are kept, and its posterior's mean; of a random sample of them the whole posterior and the
text itself. Memory does not grow beyond that.

Shapes: N texts, all or those of the sample, Z latent width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat, tee, zip_longest
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptvae_cli import bleu
from gptvae_cli.checkpoint import Checkpoint
from gptvae_cli.config import Unit
from gptvae_cli.data import batches_of
from gptvae_cli.device import tokens_together
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
from gptvae_cli.model import Posterior
from gptvae_cli.objective import Batch
from gptvae_cli.refinement import refined
from gptvae_cli.sampling import Encoder

Columns = dict[str, npt.NDArray[np.float64]]
Row = Sequence[int]
Item = tuple[tuple[int, Row], Row | None]
"""The place of a text, the text, and what the encoder reads in its stead."""

SAMPLE_TEXTS = 10_000
"""Texts, at random, over which mutual information is estimated (the estimate takes their number squared) and probes
are trained, where there are more."""
NGRAMS = [f"bleu_{i}" for i in range(bleu.COUNTS)]
"""Columns of the counts that BLEU is made of."""
_GOLDEN = 0x4F1BBCDCBFA53E0B
"""2^63 over the golden ratio: multiples of it, modulo 2^63, are spread as evenly as can be."""
_PIECE_TEXTS, _PIECE_TOKENS = 4096, 2**21
_NATS = ("nll", "cross_entropy", "cross_entropy_shuffled", "cross_entropy_without", "kl")
"""Columns of nats."""


class Posteriors(NamedTuple):
    """Texts and their posteriors.

    Args:
        places_N: in the corpus.
        texts_N: strings.
        written_N: their reconstructions, strings.
        read_N: numbers of what the encoder read, see `read_keys_of`.
        mean_NZ, log_var_NZ: float32.
        sample_NZ: the latent that was drawn from each, float32.
    """

    places_N: npt.NDArray[Any]
    texts_N: npt.NDArray[Any]
    written_N: npt.NDArray[Any]
    read_N: npt.NDArray[Any]
    mean_NZ: npt.NDArray[Any]
    log_var_NZ: npt.NDArray[Any]
    sample_NZ: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Piece:
    """What was measured of some consecutive texts: columns and hashes of the texts [N], and for a model with a latent
    their posteriors. Their `places` count the texts that have nothing to measure, too."""

    places: list[int]
    columns: Columns
    keys_N: Keys
    hashes_N: Keys
    posteriors: Posteriors | None


def measured_together(
    models: Sequence[Checkpoint],
    texts: Iterable[str],
    sources: Iterable[str] | None,
    *,
    unit: Unit,
    most: int | None,
    samples: int,
    guidance: float,
    refine: bool,
    seed: int,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> tuple[list[Gathered], int, list[str]]:
    """What every model makes of the same texts, which are read once; and of the first one how many it cuts, and what
    people should know about them.

    Args:
        models: side by side, so that no model's share of the texts has to wait in memory for another's.
        texts: as `read_texts` gives them.
        sources: what the encoder of a model reads that was trained so, one for each text.
        unit, samples, guidance, refine, seed: as in `measured`.
        most: texts, or windows of them; None is all.
        on_progress: called with the texts that the first model has measured so far.
    """
    encoders, readers = ([Encoder(each, unit) for each in models] for _ in range(2))
    gathered = [Gathered() for _ in models]
    streams: list[Iterator[Piece]] = []
    # What is read of a running text is not its windows, which are counted below.
    some = texts if unit == "window" else islice(texts, most)
    copies = zip(tee(some, len(models)), tee(sources or (), len(models)), strict=True)
    for model, encoder, reader, (text, source) in zip(models, encoders, readers, copies, strict=True):
        read = islice(reader.rows(source), most) if model.header.reads_other_texts else None
        # An empty text of windows has no token to predict, and no likelihood.
        rows = ((place, row) for place, row in enumerate(encoder.rows(text)) if len(row) > 1)
        told = on_progress if encoder is encoders[0] else lambda texts: None
        streams.append(
            measured(
                model,
                islice(rows, most),
                read,
                unit=unit,
                samples=samples,
                guidance=guidance,
                refine=refine,
                seed=seed,
                on_progress=told,
            )
        )
    for pieces in zip_longest(*streams):
        for each, piece in zip(gathered, pieces, strict=True):
            if piece is not None:
                each.add(piece)
    notes = [encoder.note for encoder in encoders]
    notes += [reader.note and f"to encode: {reader.note}" for reader in readers]
    return gathered, encoders[0].cut, list(dict.fromkeys(note for note in notes if note is not None))


def measured(
    checkpoint: Checkpoint,
    rows: Iterable[tuple[int, Row]],
    sources: Iterable[Row] | None = None,
    *,
    unit: Unit,
    samples: int,
    guidance: float = 1.0,
    refine: bool = False,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda texts: None,
) -> Iterator[Piece]:
    """Measures texts, a piece at a time, in their order.

    Args:
        checkpoint: the model; one that was trained without a latent is measured without.
        rows: places and texts, as tokens with their specials, what the decoder writes.
        sources: what the encoder reads, if not the same.
        unit: of `window` the texts are windows of running ones.
        samples: K of the importance-weighted likelihood.
        guidance: of the reconstruction, see `SampleConfig`.
        refine: reconstruct from latents that are fitted to the texts, not from the means.
        on_progress: called with the texts measured so far.
    """
    model, tokenizer, dtype = checkpoint.model, checkpoint.tokenizer, checkpoint.dtype
    config = checkpoint.header.model
    tally, constraint = _Tally(checkpoint, running=unit == "window"), tokenizer.constraint(unit)
    done, most = 0, tokens_together(model.device)
    for piece in _pieces(zip(rows, repeat(None) if sources is None else sources, strict=False)):
        places = [place for (place, _), _ in piece]
        targets = [row for (_, row), _ in piece]
        read = None if sources is None else [source for _, source in piece if source is not None]
        batches, back = batches_of(targets, read, config.pad_id, most)
        keys_N = np.concatenate([keys_of(batch, config.pad_id) for batch in batches])[back]
        plain = [[token for token in row if token not in (config.bos_id, config.eos_id)] for row in targets]
        texts = [tokenizer.decode(ids) for ids in plain]
        ends_N = np.array([row[-1] == config.eos_id for row in targets])
        columns = tally(plain, texts, ends_N)
        hashes_N = np.array([hash(each) for each in zip(texts, columns["bytes"].tolist(), strict=True)])
        if not checkpoint.header.has_latent:
            columns["nll"] = measure_without_latent(model, batches, dtype=dtype).numpy()[back]
            done += len(targets)
            on_progress(done)
            yield Piece(places, columns, keys_N, hashes_N, None)
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
        latents_NZ = _refined(checkpoint, batches, found.posterior)[back] if refine else mean_NZ.to(model.device)
        written = write_greedily(model, latents_NZ, constraint=constraint, guidance=guidance, dtype=dtype)
        written_texts = [tokenizer.decode(ids) for ids in written]
        ngrams = [bleu.counts(*pair) for pair in zip(texts, written_texts, strict=True)]
        columns |= {
            "nll": nll_N.numpy()[back],
            "cross_entropy": found.cross_entropy_N.numpy()[back],
            "cross_entropy_shuffled": found.cross_entropy_shuffled_N.numpy()[back],
            "cross_entropy_without": found.cross_entropy_without_N.numpy()[back],
            "kl": found.kl_N.numpy()[back],
            "correct": np.array([correct_tokens(*each) for each in zip(plain, written, ends_N, strict=True)], float),
            "exact": np.array([a == b for a, b in zip(plain, written, strict=True)], float),
            **dict(zip(NGRAMS, np.array(ngrams, float).T, strict=True)),
        }
        posteriors = Posteriors(
            places_N=np.array(places),
            texts_N=np.array(texts, dtype=object),
            written_N=np.array(written_texts, dtype=object),
            read_N=read_keys_of(batches, config.pad_id)[back],
            mean_NZ=mean_NZ.numpy(),
            log_var_NZ=found.posterior.log_var_BZ[back].numpy(),
            sample_NZ=found.sample_NZ[back].numpy(),
        )
        done += len(targets)
        yield Piece(places, columns, keys_N, hashes_N, posteriors)


def _refined(checkpoint: Checkpoint, batches: Sequence[Batch], posterior: Posterior) -> Tensor:
    """Latents of all texts, in the order of the batches, that are fitted to them [N Z]."""
    model, guided = checkpoint.model, checkpoint.header.takes_guidance
    means = torch.split(posterior.mean_BZ.to(model.device), [len(batch.tokens_BT) for batch in batches])
    pairs = zip(batches, means, strict=True)
    return torch.cat([refined(model, b.to(model.device).tokens_BT, mean_BZ, guided=guided) for b, mean_BZ in pairs])


class _Tally:
    """Counts the tokens, words and bytes of texts, which come in pieces.

    Args:
        running: texts are windows, and one that is as long as the model reads goes on in the next: a word may be in
            two of them, and counts once. (So does one too few where a file ends as a window does, once in T files.)
    """

    def __init__(self, checkpoint: Checkpoint, *, running: bool) -> None:
        tokenizer = checkpoint.tokenizer
        self.sizes = [*map(len, tokenizer.spelled())] if tokenizer.is_exact else None
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


def _pieces(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Cuts texts into lists that fit in memory. Two wait for the next list, for a lone text has no other beside it."""
    piece: list[Item] = []
    tokens = 0
    for item in items:
        piece.append(item)
        tokens += len(item[0][1])
        if len(piece) >= 4 and (len(piece) >= _PIECE_TEXTS + 2 or tokens >= _PIECE_TOKENS):
            yield piece[:-2]
            piece = piece[-2:]
            tokens = sum(len(row) for (_, row), _ in piece)
    if piece:
        yield piece


@dataclass
class Gathered:
    """The pieces of one model together."""

    places: list[int] = field(default_factory=list)
    columns: list[Columns] = field(default_factory=list)
    keys: list[Keys] = field(default_factory=list)
    hashes: list[Keys] = field(default_factory=list)
    means: list[npt.NDArray[np.float32]] = field(default_factory=list)
    sample: Posteriors | None = None
    """Of the texts whose rank is among the lowest, in order of rank. Ranks are as good as random, so these are a random
    sample of the texts, the same one in whatever order the texts come."""
    ranks: Keys = field(default_factory=lambda: np.array([], dtype=np.int64))
    """Of the sample."""
    seen: Counter[int] = field(default_factory=Counter)

    def add(self, piece: Piece) -> None:
        """Adds the next piece."""
        self.places += piece.places
        self.columns.append(piece.columns)
        self.keys.append(piece.keys_N)
        self.hashes.append(piece.hashes_N)
        if piece.posteriors is not None:
            self.means.append(piece.posteriors.mean_NZ)
            both, ranks_N = piece.posteriors, np.append(self.ranks, self._ranks(piece.keys_N))
            if self.sample is not None:
                both = Posteriors(*(np.concatenate(pair) for pair in zip(self.sample, both, strict=True)))
            lowest = np.argsort(ranks_N, kind="stable")[:SAMPLE_TEXTS]
            self.ranks, self.sample = ranks_N[lowest], Posteriors(*(values[lowest] for values in both))

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
        """The figures of every text, in the order that the texts came in: nats, and what `report` is of in all."""
        places = iter(self.places)
        for columns in self.columns:
            for i in range(len(columns["nll"])):
                counts = {name: round(columns[name][i]) for name in ("tokens", "bytes")}
                nats = {f"{name}_nats": float(columns[name][i]) for name in _NATS if name in columns}
                whole = {"exact_match": bool(columns["exact"][i])} if "exact" in columns else {}
                yield {"row": next(places), **counts, **nats, **whole}

    def table(self, order: npt.NDArray[np.int64]) -> Columns:
        """The columns of all texts."""
        return {name: np.concatenate([each[name] for each in self.columns])[order] for name in self.columns[0]}
