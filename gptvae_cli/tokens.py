"""Tokens in bulk: texts to flat arrays, flat arrays to files, and any rows back from them.

Files are read at the places that are asked for and never mapped: touching rows at random would make the whole file
resident, and a corpus may be larger than memory.

Shapes: N rows, W words.
"""

from __future__ import annotations

import os
import re
import signal
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from gptvae_cli.tokenizer import PIECE_CHARS, Tokenizer, TokenizerKind

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.unsignedinteger[Any]]

_MOST_WORDS, _MOST_TOKENS = 2**18, 2**22
"""Words that are remembered, and tokens of them: about 50 MB. Where there are no spaces, a word is a whole text."""
_OFFSETS_AT_ONCE, _TOKENS_AT_ONCE = 2**18, 2**20

# A space, and what may stand before the next one. The byte-level BPE never joins a space to what is before it unless
# that is white too, so the tokens of a text are those of these pieces, one after another.
_WORD = re.compile(r"\s*\S+(?:[^\S ]\s*\S*)*|\s+")


def token_type(num_tokens: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The type that tokens are kept in: two bytes where that is enough."""
    return np.dtype("<u2" if num_tokens <= 2**16 else "<u4")


# Texts to tokens ------------------------------------------------------------------------------------------------------


class BulkTokenizer:
    """Tokenises many texts, to flat arrays.

    The library takes the same time for a word however often it comes, and texts are mostly words that have come
    before. Remembering them makes English five times faster, and bytes need no library at all. Words that are new go
    to the library together, which uses all cores.

    Args:
        tokenizer: that was made here or read from a user's file, not from a model file: its kind is trusted.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.dtype = token_type(tokenizer.num_tokens)
        self.known = _Words()
        self.starts_W = self.lengths_W = np.zeros(0, dtype=np.int64)
        self.tokens: Tokens = np.zeros(0, dtype=self.dtype)

    def __call__(self, texts: Sequence[str], *, longest: int | None = None) -> tuple[Tokens, Ints]:
        """The tokens of all texts, one after another, and how many each has [N].

        Args:
            longest: tokens of a text that are wanted at most, see `Tokenizer.encode_batch`.

        Raises:
            DataError: as `Tokenizer.encode_batch` does.
        """
        if self.tokenizer.kind == "bytes":
            encoded = [text[:longest].encode("utf-8")[:longest] for text in texts]
            return np.frombuffer(b"".join(encoded), np.uint8).astype(self.dtype), _lengths(encoded)
        # Of a text without end the words would be, too.
        if self.tokenizer.kind == "bpe" and all(len(text) <= PIECE_CHARS for text in texts):
            return self._by_words(texts)
        return self._by_library(texts, longest)

    def _by_library(self, texts: Sequence[str], longest: int | None = None) -> tuple[Tokens, Ints]:
        ids = self.tokenizer.encode_batch(texts, longest=longest)
        lengths_N = _lengths(ids)
        return np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths_N.sum())), lengths_N

    def _by_words(self, texts: Sequence[str]) -> tuple[Tokens, Ints]:
        if len(self.known) > _MOST_WORDS or len(self.tokens) > _MOST_TOKENS:
            self.known = _Words()
            self.starts_W, self.lengths_W, self.tokens = self.starts_W[:0], self.lengths_W[:0], self.tokens[:0]
        words = [_WORD.findall(text) for text in texts]
        words_N = _lengths(words)
        index_W = np.fromiter(map(self.known.__getitem__, chain.from_iterable(words)), np.int64, int(words_N.sum()))
        if self.known.new:
            tokens, lengths_W = self._by_library(self.known.new)
            self.known.new.clear()
            self.starts_W = np.append(self.starts_W, len(self.tokens) + np.cumsum(lengths_W) - lengths_W)
            self.lengths_W = np.append(self.lengths_W, lengths_W)
            self.tokens = np.append(self.tokens, tokens)
        lengths_W = self.lengths_W[index_W]
        stops_W = np.concatenate([[0], np.cumsum(lengths_W)])
        stops_N = stops_W[np.concatenate([[0], np.cumsum(words_N)])]
        return self.tokens[_ranges(self.starts_W[index_W], lengths_W)], np.diff(stops_N)


def tokenizer_pool(tokenizer: Tokenizer, processes: int) -> ProcessPoolExecutor:
    """Processes for `tokenized`, each with a `BulkTokenizer`: remembering words is Python's work, which threads would
    not share. Sets `$PYTHONSAFEPATH` of this process."""
    # Not forked: this process may have threads, which a fork would tear apart. And a new Python would look for its
    # modules in the working directory first, which may be a stranger's corpus.
    os.environ["PYTHONSAFEPATH"] = "1"
    return ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer.to_json(), tokenizer.kind)
    )


_worker: BulkTokenizer | None = None


def _start_worker(text: str, kind: TokenizerKind) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = Tokenizer.from_json(text)
    tokenizer.kind = kind  # which the text does not tell
    _worker = BulkTokenizer(tokenizer)


def _end_with_parent() -> None:
    """One that is killed cannot end the others, which would wait for texts for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def tokenized(texts: Sequence[str], longest: int | None = None) -> tuple[Tokens, Ints]:
    """As `BulkTokenizer`, in a process of `tokenizer_pool`."""
    assert _worker is not None
    return _worker(texts, longest=longest)


class _Words(dict[str, int]):
    """Numbers words in the order in which they first come, and lists those that are new."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self.new.append(word)
        number = self[word] = len(self)
        return number


def _lengths(things: Sequence[Sequence[object]]) -> Ints:
    return np.fromiter(map(len, things), np.int64, len(things))


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """The numbers `start, start + 1, ...` of each range, one range after another."""
    stops = np.cumsum(lengths)
    return np.arange(stops[-1] if len(stops) else 0) + np.repeat(starts - stops + lengths, lengths)


# Tokens in files ------------------------------------------------------------------------------------------------------


class TokenWriter:
    """Writes rows of tokens to two flat files: `NAME.tokens` (uint16 or uint32) and `NAME.offsets` (int64, N + 1)."""

    def __init__(self, folder: Path, name: str, num_tokens: int) -> None:
        self.dtype = token_type(num_tokens)
        self.rows = self.count = 0
        self.tokens = (folder / f"{name}.tokens").open("w+b")
        self.offsets = (folder / f"{name}.offsets").open("w+b")
        self.offsets.write(bytes(8))

    def append(self, tokens: Tokens, lengths_N: Ints) -> None:
        """Rows, one after another in `tokens`."""
        self.offsets.write((self.count + np.cumsum(lengths_N)).astype("<i8").tobytes())
        self.rows += len(lengths_N)
        self.extend(tokens)

    def extend(self, tokens: Tokens) -> None:
        """Some tokens of a row that `end_row` ends."""
        self.tokens.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.count += len(tokens)

    def end_row(self) -> None:
        """Ends what `extend` began."""
        self.append(np.zeros(0, self.dtype), np.zeros(1, np.int64))

    def move_tail(self, count: int, other: TokenWriter) -> None:
        """Moves the last tokens of a row that is not ended to one of another writer, of as many kinds of tokens."""
        size = self.dtype.itemsize
        stop, self.count = self.count, self.count - count
        for start in range(self.count, stop, _TOKENS_AT_ONCE):
            self.tokens.seek(size * start)
            other.extend(np.frombuffer(self.tokens.read(size * min(_TOKENS_AT_ONCE, stop - start)), self.dtype))
        self.tokens.truncate(self.tokens.seek(size * self.count))

    def pop(self) -> Tokens:
        """Takes the last row back."""
        self.offsets.seek(-16, os.SEEK_END)
        start = int(np.frombuffer(self.offsets.read(8), "<i8")[0])
        self.offsets.truncate(self.offsets.seek(-8, os.SEEK_END))
        self.tokens.seek(start * self.dtype.itemsize)
        tokens: Tokens = np.frombuffer(self.tokens.read(), self.dtype)
        self.tokens.truncate(self.tokens.seek(start * self.dtype.itemsize))
        self.rows, self.count = self.rows - 1, start
        return tokens

    def close(self) -> None:
        self.tokens.close()
        self.offsets.close()


class TokenStore:
    """Rows of tokens as `TokenWriter` wrote them, read where they are asked for.

    Raises:
        OSError, ValueError: for files that are missing, or whose sizes do not fit each other.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._offsets, size = _opened(self, folder / f"{name}.offsets")
        if size < 8 or size % 8:
            raise ValueError(f"{size} bytes of offsets")
        self._rows = size // 8 - 1
        self.count = int(self._offsets_at(self._rows, 1)[0])
        """Tokens of all rows."""
        self._tokens, size = _opened(self, folder / f"{name}.tokens")
        if self.count < 0 or size not in (2 * self.count, 4 * self.count):
            raise ValueError(f"{self.count} tokens in {size} bytes")
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype("<u2" if size == 2 * self.count else "<u4")

    def __len__(self) -> int:
        return self._rows

    def spans(self, index_N: Ints) -> tuple[Ints, Ints]:
        """Where rows start, and how many tokens they have, BOS and EOS not counted [N], [N]."""
        read = os.pread
        pairs = b"".join([read(self._offsets, 16, 8 * i) for i in index_N.tolist()])
        starts_stops = np.frombuffer(pairs, "<i8").astype(np.int64).reshape(-1, 2)
        return starts_stops[:, 0], starts_stops[:, 1] - starts_stops[:, 0]

    def lengths(self) -> Iterator[Ints]:
        """Tokens of every row, BOS and EOS not counted, in order and in pieces."""
        for first in range(0, self._rows, _OFFSETS_AT_ONCE):
            yield np.diff(self._offsets_at(first, min(_OFFSETS_AT_ONCE, self._rows - first) + 1))

    def read(self, starts_N: Ints, lengths_N: Ints) -> Tokens:
        """The tokens of these ranges, one range after another."""
        read, size = os.pread, self.dtype.itemsize
        places = zip((size * starts_N).tolist(), (size * lengths_N).tolist(), strict=True)
        tokens: Tokens = np.frombuffer(b"".join([read(self._tokens, n, start) for start, n in places]), self.dtype)
        return tokens

    def _offsets_at(self, first: int, count: int) -> Ints:
        return np.frombuffer(os.pread(self._offsets, 8 * count, 8 * first), "<i8").astype(np.int64)


def _opened(owner: object, path: Path) -> tuple[int, int]:
    """A file to read for as long as its owner lives, and its size."""
    file = os.open(path, os.O_RDONLY)
    weakref.finalize(owner, os.close, file)
    return file, os.fstat(file).st_size
