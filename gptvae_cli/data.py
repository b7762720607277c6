"""Corpora as tokens: a memory-mapped cache, rows of it, and batches of rows.

Texts are read once, tokenised in pieces and appended to flat files, so that neither the corpus nor its tokens have
to fit in memory. Which rows make up which batch is a pure function of seed and epoch.

Shapes: B batch, T tokens, N rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from gptvae_cli.config import LONGEST_SEQUENCE, DataConfig, ModelConfig
from gptvae_cli.errors import CheckpointError, ConfigError, DataError
from gptvae_cli.noise import Purpose, stream
from gptvae_cli.objective import Batch
from gptvae_cli.text import Repairs, read_texts
from gptvae_cli.tokenizer import Tokenizer, automatic_tokenizer, pieces

Ints = npt.NDArray[np.int64]

_SAMPLE_CHARS = 32 * 2**20
"""How much text a tokenizer is chosen by and trained on."""
_PIECE_CHARS = 2**20
"""How much text is tokenised at a time."""
_POOL_BATCHES = 64
"""Batches whose rows are sorted by length together: more means less padding, and batches more alike in length."""


# The cache -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CorpusFacts:
    """What was found while a corpus was read.

    Args:
        texts: that are kept, held-out ones included.
        empty: texts that were dropped because they are empty.
        characters: of the kept texts.
        digest: of all texts in order, to recognise the corpus by.
        tokenizer_reason: why this tokenizer.
        replaced: places that were not UTF-8 and became U+FFFD.
    """

    texts: int
    empty: int
    characters: int
    digest: str
    tokenizer_reason: str
    replaced: int = 0


class TokenStore:
    """Rows of tokens in two flat files: `NAME.tokens` (uint16 or uint32) and `NAME.offsets` (int64, N + 1)."""

    def __init__(self, folder: Path, name: str) -> None:
        try:
            self.offsets: Ints = np.fromfile(folder / f"{name}.offsets", dtype="<i8")
            path = folder / f"{name}.tokens"
            size, count = path.stat().st_size, int(self.offsets[-1])
            if size not in (2 * count, 4 * count):
                raise ValueError(f"{count} tokens in {size} bytes")
            dtype = np.dtype("<u2" if size == 2 * count else "<u4")
            self.tokens = np.memmap(path, dtype, "r") if count else np.zeros(0, dtype)
        except (OSError, IndexError, ValueError) as error:
            raise _broken_cache(folder) from error

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens of every row, BOS and EOS not counted [N]."""
        return np.diff(self.offsets)


def _broken_cache(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"the token cache {folder} is missing or damaged", hint="give the corpus again, with --force"
    )


class _StoreWriter:
    def __init__(self, folder: Path, name: str, num_tokens: int) -> None:
        self.path = folder / name
        self.dtype = np.dtype("<u2" if num_tokens <= 2**16 else "<u4")
        self.file = (folder / f"{name}.tokens").open("wb")
        self.offsets = [0]

    def append(self, *pieces: Sequence[int]) -> None:
        """One row, in one or several pieces."""
        for piece in pieces:
            self.file.write(np.asarray(piece, dtype=self.dtype).tobytes())
        self.offsets.append(self.offsets[-1] + sum(map(len, pieces)))

    def pop(self) -> npt.NDArray[Any]:
        """Takes the last row back."""
        stop = self.offsets.pop()
        self.file.flush()
        tokens = np.fromfile(f"{self.path}.tokens", self.dtype)[self.offsets[-1] : stop]
        self.file.truncate(self.offsets[-1] * self.dtype.itemsize)
        self.file.seek(0, 2)
        return tokens

    def close(self) -> None:
        self.file.close()
        np.asarray(self.offsets, dtype="<i8").tofile(f"{self.path}.offsets")


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: what to train on, what is held out, and what the encoder reads where that differs."""

    tokenizer: Tokenizer
    facts: CorpusFacts
    train: TokenStore
    valid: TokenStore
    train_source: TokenStore | None
    valid_source: TokenStore | None

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer) -> Corpus:
        """The corpus that `build` left in a folder."""
        try:
            facts = CorpusFacts(**json.loads((folder / "corpus.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise _broken_cache(folder) from error
        paired = (folder / "train.source.offsets").exists()
        return cls(
            tokenizer,
            facts,
            TokenStore(folder, "train"),
            TokenStore(folder, "valid"),
            TokenStore(folder, "train.source") if paired else None,
            TokenStore(folder, "valid.source") if paired else None,
        )

    @classmethod
    def build(
        cls,
        sources: Sequence[str],
        config: DataConfig,
        folder: Path,
        *,
        stdin: BinaryIO | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Corpus:
        """Reads texts, makes or loads the tokenizer, and writes the cache.

        Args:
            sources: files, folders or `-`; none is stdin.
            config: what a text is and which tokenizer.
            folder: where the cache goes; made if need be.
            stdin: stands for standard input.
            on_progress: called with the characters read so far.

        Raises:
            DataError: for a corpus that cannot be read, or that has fewer than two texts to train on.
            ConfigError: for a validation file where the encoder reads other texts: it has none of those.
        """
        if config.latents_from is not None and config.valid_share is None:
            raise ConfigError(
                f"valid is {config.valid!r}, it must be a share of the corpus where latents-from names a file",
                hint="leave --valid out, or say for example --valid 0.05",
            )
        folder.mkdir(parents=True, exist_ok=True)
        repairs = Repairs()
        pairs = _NotEmpty(_pairs(sources, config, stdin, repairs))
        sample = _take(pairs, _SAMPLE_CHARS)
        tokenizer, reason = _make_tokenizer(config, sample)
        read = _Reader(folder, tokenizer, config, repairs)
        try:
            read.all(chain(sample, pairs), on_progress)
        finally:
            read.close()
        facts = CorpusFacts(read.texts, pairs.empty, read.characters, read.digest.hexdigest(), reason, repairs.count)
        (folder / "corpus.json").write_text(json.dumps(asdict(facts), indent=1), "utf-8")
        corpus = cls.open(folder, tokenizer)
        if len(corpus.train) < 2 and config.unit != "window":
            found = f"{len(corpus.train) + len(corpus.valid)} non-empty text(s)"
            raise DataError(
                f"found {found} in {', '.join(sources) or 'standard input'}, need at least two to train on"
                " and one to hold out",
                hint=f"a text is a {config.unit} here; --unit line|paragraph|file|window says otherwise",
            )
        if len(corpus.train.tokens) < 2:
            raise DataError(f"found no text to train on in {', '.join(sources) or 'standard input'}")
        return corpus


class _Reader:
    """Routes texts to the stores, and counts."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: DataConfig, repairs: Repairs) -> None:
        names = ["train", "valid"] + (["train.source", "valid.source"] if config.latents_from else [])
        for stale in folder.glob("*.offsets"):
            stale.unlink()
        self.stores = {name: _StoreWriter(folder, name, tokenizer.num_tokens) for name in names}
        self.tokenizer, self.config, self.repairs = tokenizer, config, repairs
        self.texts = self.characters = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def all(self, pairs: Iterator[tuple[str, str]], on_progress: Callable[[int], None] | None) -> None:
        share = self.config.valid_share
        while piece := _take(pairs, _PIECE_CHARS):
            self.texts += len(piece)
            self.characters += sum(len(text) for text, _ in piece)
            for text, _ in piece:
                _add_text(self.digest, text)
            if self.config.unit == "window":
                for text, _ in piece:
                    self._window(text, share)
            else:
                self._rows(piece, share)
            if on_progress is not None:
                on_progress(self.characters)
        if share is None:
            self._valid_file()
        elif self.stores["valid"].offsets == [0] and len(self.stores["train"].offsets) > 1:
            # Too few texts for the share to hit one: the last one is held out.
            for store in self.stores.values():
                if store.path.name.startswith("train"):
                    self.stores[store.path.name.replace("train", "valid")].append(store.pop().tolist())

    def close(self) -> None:
        for store in self.stores.values():
            store.close()

    def _rows(self, pairs: Sequence[tuple[str, str]], share: float | None) -> None:
        ids = self._tokens([text for text, _ in pairs])
        sources = self._tokens([source for _, source in pairs]) if self.config.latents_from else []
        for i, (text, _) in enumerate(pairs):
            name = "valid" if share is not None and _hash_share(text) < share else "train"
            self.stores[name].append(ids[i])
            if sources:
                self.stores[f"{name}.source"].append(sources[i])

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """No model can read more of a text than this."""
        return self.tokenizer.encode_batch(texts, longest=LONGEST_SEQUENCE)

    def _window(self, text: str, share: float | None) -> None:
        """A running text is tokenised in pieces that end at a line break, and its tail is held out."""
        ids = np.array([i for piece in self.tokenizer.encode_batch(list(pieces(text))) for i in piece], dtype=np.int64)
        held_out = 0 if share is None else max(1, round(len(ids) * share))
        self.stores["train"].append(ids[: len(ids) - held_out].tolist())
        if held_out:
            self.stores["valid"].append(ids[len(ids) - held_out :].tolist())

    def _valid_file(self) -> None:
        pairs = ((text, "") for text in _read([self.config.valid], self.config, repairs=self.repairs) if text)
        while piece := _take(pairs, _PIECE_CHARS):
            for text, _ in piece if self.config.unit == "window" else []:
                self.stores["valid"].append(*self.tokenizer.encode_batch(list(pieces(text))))
            if self.config.unit != "window":
                for ids in self._tokens([text for text, _ in piece]):
                    self.stores["valid"].append(ids)
        if self.stores["valid"].offsets == [0]:
            raise DataError(f"found no text in the validation file {self.config.valid}")


def corpus_digest(sources: Sequence[str], config: DataConfig, *, stdin: BinaryIO | None = None) -> str:
    """The digest that `CorpusFacts` holds, of a corpus as it is now."""
    digest = hashlib.blake2b(digest_size=16)
    for text, _ in _pairs(sources, config, stdin, Repairs()):
        if text:
            _add_text(digest, text)
    return digest.hexdigest()


def _add_text(digest: hashlib.blake2b, text: str) -> None:
    digest.update(text.encode("utf-8"))
    digest.update(b"\xff")


def _read(
    sources: Sequence[str], config: DataConfig, *, repairs: Repairs, stdin: BinaryIO | None = None
) -> Iterator[str]:
    return read_texts(sources, unit=config.unit, field=config.field, errors=config.errors, repairs=repairs, stdin=stdin)


def _pairs(
    sources: Sequence[str], config: DataConfig, stdin: BinaryIO | None, repairs: Repairs
) -> Iterator[tuple[str, str]]:
    """Texts, each with what the encoder reads (an empty string where that is the text itself)."""
    texts = _read(sources, config, repairs=repairs, stdin=stdin)
    if config.latents_from is None:
        yield from ((text, "") for text in texts)
        return
    others = _read([config.latents_from], config, repairs=repairs)
    nothing = object()
    for count, text in enumerate(texts):
        source = next(others, nothing)
        if source is nothing:
            raise DataError(
                f"the corpus has more than {count} texts, {config.latents_from} has {count}",
                hint="--latents-from needs one text for every text of the corpus, in the same order",
            )
        yield text, str(source)
    if next(others, nothing) is not nothing:
        raise DataError(
            f"{config.latents_from} has more texts than the corpus",
            hint="--latents-from needs one text for every text of the corpus, in the same order",
        )


class _NotEmpty(Iterator[tuple[str, str]]):
    """The pairs whose text is not empty. The others are only counted: a file may hold millions of them."""

    def __init__(self, pairs: Iterator[tuple[str, str]]) -> None:
        self.pairs, self.empty = pairs, 0

    def __next__(self) -> tuple[str, str]:
        for pair in self.pairs:
            if pair[0]:
                return pair
            self.empty += 1
        raise StopIteration


def _take(pairs: Iterator[tuple[str, str]], characters: int) -> list[tuple[str, str]]:
    """The next texts, until they hold this many characters; none at the end."""
    taken: list[tuple[str, str]] = []
    for pair in pairs:
        taken.append(pair)
        characters -= len(pair[0]) + len(pair[1]) + 1
        if characters <= 0:
            break
    return taken


def _make_tokenizer(config: DataConfig, sample: Sequence[tuple[str, str]]) -> tuple[Tokenizer, str]:
    # The last text of the sample may hold far more than the others.
    texts = [text[:_SAMPLE_CHARS] for pair in sample for text in pair if text]
    if config.tokenizer not in ("auto", "bytes", "bpe"):
        return Tokenizer.from_file(Path(config.tokenizer)), f"read from {config.tokenizer}"
    choice = automatic_tokenizer(texts, None)
    kind, reason = (choice.kind, choice.reason) if config.tokenizer == "auto" else (config.tokenizer, "asked for")
    if kind == "bytes":
        return Tokenizer.bytes(), reason
    return Tokenizer.train_bpe(texts, config.vocab_size or choice.vocab_size), reason


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: equal texts are held out together."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") / 2**64


# Rows and batches ----------------------------------------------------------------------------------------------------


class Rows:
    """Sequences `BOS text EOS` over a store: its rows, or, with `window`, crops of all of it as one running text.

    A text longer than the model is cut and has no EOS, as has a crop.
    """

    def __init__(
        self, store: TokenStore, config: ModelConfig, *, window: bool, source: TokenStore | None = None
    ) -> None:
        self.store, self.source, self.config, self.window = store, source, config, window
        self.longest = config.max_seq_len - 1
        if window:
            self.crop = min(self.longest, len(store.tokens))

    @property
    def cut(self) -> int:
        """Texts that are longer than the model, or whose source is."""
        if self.window:
            return 0
        longest = self.store.lengths
        if self.source is not None:
            longest = np.maximum(longest, self.source.lengths)
        return int((longest + 2 > self.config.max_seq_len).sum())

    def spans(self, seed: int | None = None, epoch: int = 0) -> tuple[Ints, Ints]:
        """Where the rows of an epoch start and stop in the store, specials not counted.

        Args:
            seed: for crops: random places, anew in every epoch; None is consecutive places.
        """
        offsets = self.store.offsets
        if not self.window:
            starts, stops = offsets[:-1], offsets[1:]
            whole = stops - starts + 2 <= self.config.max_seq_len
            return starts, np.where(whole, stops, starts + self.longest)
        total = len(self.store.tokens)
        if seed is None:
            starts = np.arange(0, total, self.crop)
            return starts, np.minimum(starts + self.crop, total)
        starts = stream(seed, Purpose.ORDER, epoch, 1).integers(0, total - self.crop + 1, max(1, total // self.crop))
        return starts, starts + self.crop

    def batch(self, starts: Ints, stops: Ints, index: Ints) -> Batch:
        """The rows at these indices, padded to the longest."""
        rows = [self._row(self.store, int(starts[i]), int(stops[i])) for i in index]
        tokens_BT = _pad(rows, self.config.pad_id)
        source_BT = None
        if self.source is not None:
            source_BT = _pad([self._source_row(int(i)) for i in index], self.config.pad_id)
        return Batch(tokens_BT, source_BT, sum(len(row) - 1 for row in rows))

    def _source_row(self, i: int) -> Ints:
        assert self.source is not None
        start, stop = int(self.source.offsets[i]), int(self.source.offsets[i + 1])
        return self._row(self.source, start, stop if self._fits(start, stop) else start + self.longest)

    def _row(self, store: TokenStore, start: int, stop: int) -> Ints:
        whole = not self.window and self._fits(start, stop)
        row = np.empty(stop - start + 1 + whole, dtype=np.int64)
        row[0] = self.config.bos_id
        row[1 : 1 + stop - start] = store.tokens[start:stop]
        if whole:
            row[-1] = self.config.eos_id
        return row

    def _fits(self, start: int, stop: int) -> bool:
        """Whether the text has room for BOS and EOS; a text that is cut to `longest` has not."""
        return stop - start + 2 <= self.config.max_seq_len


def plan_batches(lengths: Ints, batch_tokens: int, order: np.random.Generator | None) -> list[Ints]:
    """Cuts rows into batches of about `batch_tokens` tokens, padding counted, of rows about equally long.

    Rows are shuffled, sorted by length within pools of many batches, cut, and the batches shuffled. Without
    `order` all rows form one pool in their own order, sorted by length: for evaluation.

    Args:
        lengths: tokens of every row [N].
        batch_tokens: the most a batch may hold; a longer row is a batch of its own.
        order: draws the shuffle.

    Returns:
        Indices of rows, one array a batch; every row is in exactly one.
    """
    count = len(lengths)
    shuffled = np.arange(count) if order is None else order.permutation(count)
    pool = count
    if order is not None:
        mean = max(1.0, float(lengths.mean()))
        pool = max(1, int(_POOL_BATCHES * batch_tokens / mean))
    batches: list[Ints] = []
    for begin in range(0, count, max(1, pool)):
        rows = shuffled[begin : begin + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        start = 0
        while start < len(rows):
            # Rows are in order of length, so the last one of a batch sets its width.
            stop = start + 1
            while stop < len(rows) and (stop + 1 - start) * lengths[rows[stop]] <= batch_tokens:
                stop += 1
            batches.append(rows[start:stop])
            start = stop
    if order is not None:
        batches = [batches[i] for i in order.permutation(len(batches))]
    return batches


def padding_share(lengths: Ints, batches: Iterable[Ints]) -> float:
    """Share of the tokens of these batches that is padding."""
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    return 1 - int(lengths.sum()) / max(1, padded)


class Epoch:
    """The batches of one pass over the rows, a pure function of seed and epoch; its length is their number."""

    def __init__(self, rows: Rows, batch_tokens: int, seed: int, epoch: int) -> None:
        self.rows = rows
        self.starts, self.stops = rows.spans(seed, epoch)
        self.plan = plan_batches(self.stops - self.starts + 2, batch_tokens, stream(seed, Purpose.ORDER, epoch))

    def __len__(self) -> int:
        return len(self.plan)

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """The batches behind the first `skip`, in order."""
        return (self.rows.batch(self.starts, self.stops, index) for index in self.plan[skip:])


def fixed_batches(rows: Rows, batch_tokens: int, most: int) -> list[Batch]:
    """The first `most` rows, in batches, for evaluation: the same ones every time."""
    starts, stops = rows.spans()
    starts, stops = starts[:most], stops[:most]
    return [rows.batch(starts, stops, index) for index in plan_batches(stops - starts + 2, batch_tokens, None)]


def batches_of(
    rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None, pad_id: int, batch_tokens: int
) -> list[Batch]:
    """Rows of tokens with their specials, in batches in order of length, for evaluation.

    Args:
        rows: what the decoder writes.
        sources: what the encoder reads, if not the same.
        pad_id: fills a batch.
        batch_tokens: of a batch, about.
    """
    batches = []
    for index in plan_batches(np.array([len(row) for row in rows]), batch_tokens, None):
        chosen = [np.array(rows[i], dtype=np.int64) for i in index]
        source_BT = None
        if sources is not None:
            source_BT = _pad([np.array(sources[i], dtype=np.int64) for i in index], pad_id)
        batches.append(Batch(_pad(chosen, pad_id), source_BT, sum(len(row) - 1 for row in chosen)))
    return batches


def _pad(rows: Sequence[Ints], pad_id: int) -> torch.Tensor:
    tokens_BT = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)] = row
    return torch.from_numpy(tokens_BT)
