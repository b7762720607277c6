"""Texts to files of tokens: what a tokenizer learns from, what is held out, and the reading of all.

Texts are tokenised in pieces and appended to flat files, so that neither the corpus nor its tokens have to fit in
memory.

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptvae_cli import machine
from gptvae_cli.config import LONGEST_SEQUENCE, DataConfig, TextConfig
from gptvae_cli.errors import DataError
from gptvae_cli.sources import STDIN, excerpt, expand
from gptvae_cli.text import Part, Repairs, is_plain, read_texts
from gptvae_cli.tokenizer import Tokenizer, automatic_tokenizer, pieces
from gptvae_cli.tokens import BulkTokenizer, Ints, Tokens, TokenWriter, tokenized, tokenizer_pool

Bools = npt.NDArray[np.bool_]
_Write = Callable[[Tokens, Ints], None]
"""What becomes of the tokens of some texts, and of how many each has [N]."""
Pair = tuple[str, str]
"""A text, and what the encoder reads in its place; nothing where that is the text itself."""

SAMPLE_CHARS = 32 * 2**20
"""How much text a tokenizer is chosen by and trained on: from all of a corpus in files, of a pipe the first."""
_PIECE_CHARS = 2**20
"""How much text is tokenised at a time."""
_POOL_CHARS = 32 * 2**20
"""How much text is worth the second that processes take to start."""
_TEXT_CHARS = 16
"""What a text counts besides its characters: as an object it takes some 100 bytes, however short it is."""
_SALTS, _SALT_TEXTS = 64, 10_000
"""How many ways to hold texts out are tried, and on how many texts."""


# Reading --------------------------------------------------------------------------------------------------------------


def read_pairs(sources: Sequence[str], config: DataConfig, repairs: Repairs) -> Iterator[Pair]:
    """The texts of a corpus; running texts come in parts.

    Raises:
        DataError: as `read_texts` does, and where there is not one text for the encoder for each.
    """
    texts = read_texts(sources, config, repairs=repairs)
    if config.latents_from is None:
        yield from ((text, "") for text in texts)
        return
    others = read_texts([config.latents_from], config, repairs=repairs)
    for count, (text, source) in enumerate(zip_longest(texts, others)):
        if text is None or source is None:
            problem = f"the corpus has more than {count} texts, {config.latents_from} has {count}"
            if text is None:
                problem = f"{config.latents_from} has more texts than the corpus"
            hint = "--latents-from needs one text for every text of the corpus, in the same order"
            raise DataError(problem, hint=hint)
        yield text, source


class NotEmpty(Iterator[Pair]):
    """The pairs whose text is not empty. The others are only counted: a file may hold millions of them."""

    def __init__(self, pairs: Iterator[Pair]) -> None:
        self.pairs, self.empty = pairs, 0

    def __next__(self) -> Pair:
        for pair in self.pairs:
            if pair[0]:
                return pair
            self.empty += 1
        raise StopIteration


def take(pairs: Iterator[Pair], characters: int) -> list[Pair]:
    """The next texts, until they hold about this many characters; none at the end."""
    taken: list[Pair] = []
    for pair in pairs:
        taken.append(pair)
        characters -= len(pair[0]) + len(pair[1]) + _TEXT_CHARS
        if characters <= 0:
            break
    return taken


# The tokenizer --------------------------------------------------------------------------------------------------------


def make_tokenizer(config: DataConfig, pairs: Iterator[Pair]) -> tuple[Tokenizer, str]:
    """The tokenizer that is asked for or that suits these texts, and why it is this one."""
    if config.tokenizer not in ("auto", "bytes", "bpe"):
        return Tokenizer.from_file(Path(config.tokenizer)), f"read from {config.tokenizer}"
    kind, reason = config.tokenizer, "asked for"
    if kind == "bytes":
        return Tokenizer.bytes(), reason
    texts = _spread((piece for pair in pairs for text in pair for piece in pieces(text)), SAMPLE_CHARS)
    if kind == "auto" and config.vocab_size is not None:
        kind, reason = "bpe", "a size of the vocabulary was asked for"
    elif kind == "auto":
        kind, reason = automatic_tokenizer(texts)
    if kind == "bytes":
        return Tokenizer.bytes(), reason
    tokenizer = Tokenizer.train_bpe(texts, config.vocab_size)
    if config.vocab_size is not None and (found := tokenizer.pad_id) < config.vocab_size:
        reason += f"; of {config.vocab_size} it has only {found}"
    return tokenizer, reason


def pairs_from_all(sources: Sequence[str], config: DataConfig) -> Iterator[Pair]:
    """Texts from all of a corpus in files, for a tokenizer; of large plain files without reading all of them."""
    files = expand([*sources, *filter(None, [config.latents_from])])
    if not all(map(is_plain, files)) or sum(Path(file).stat().st_size for file in files) <= SAMPLE_CHARS:
        return read_pairs(sources, config, Repairs())
    stream = io.BytesIO(excerpt(files, SAMPLE_CHARS))
    texts = read_texts([STDIN], TextConfig(unit=config.unit, errors="replace"), stdin=stream)
    return ((text, "") for text in texts)


def _spread(texts: Iterator[str], characters: int) -> list[str]:
    """Texts that hold at most this many characters, from all of an iterator: every n-th one, n a power of two."""
    taken: list[str] = []
    held, every = 0, 1
    for number, text in enumerate(texts):
        if number % every == 0:
            taken.append(text)
            held += len(text) + _TEXT_CHARS
            if held > characters:
                taken, every = taken[::2], 2 * every
                held = sum(map(len, taken)) + len(taken) * _TEXT_CHARS
    return taken


# What is held out -----------------------------------------------------------------------------------------------------


def even_salt(texts: Sequence[str], share: float) -> int:
    """The first salt by which about this share of the texts is held out; 0 where none does.

    Nearly always it is 0. But where one text makes up half of a corpus, half of it should not be held out, and of a
    few texts it should not be none.
    """
    # Each is read once, however many salts are tried: a text may be a book.
    hashes = [_hash(text.encode("utf-8")) for text in texts[:: len(texts) // _SALT_TEXTS + 1]]
    wanted = share * len(hashes)
    for salt in range(_SALTS):
        held_out = sum(_share(text_hash, salt) < share for text_hash in hashes)
        if max(1.0, wanted / 2) <= held_out <= max(1.0, 2 * wanted):
            return salt
    return 0


def is_held_out(text: bytes, share: float, salt: int) -> bool:
    """Whether a text, in UTF-8, belongs to this share. Equal texts do together, in whatever corpus they are."""
    return _share(_hash(text), salt) < share


def _share(text_hash: bytes, salt: int) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(_hash(text_hash, salt) if salt else text_hash, "big") / 2**64


def _hash(data: bytes, salt: int = 0) -> bytes:
    return hashlib.blake2b(data, digest_size=8, salt=bytes([salt])).digest()


# To files -------------------------------------------------------------------------------------------------------------


class Ingest:
    """Tokenises texts, routes them to files of their own for training and validation, and counts.

    Args:
        folder: where `train` and `valid` go, and `train.source` and `valid.source` where the encoder reads other texts.
        repairs: counts those of the validation file, where there is one.
        salt: which texts are held out, as `even_salt` gives it.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: DataConfig, repairs: Repairs, salt: int) -> None:
        self.tokenize, self.config, self.repairs, self.salt = BulkTokenizer(tokenizer), config, repairs, salt
        self.blank_line, _ = self.tokenize(["\n\n"])
        names = ["train", "valid"] + (["train.source", "valid.source"] if config.latents_from else [])
        self.files = {name: TokenWriter(folder, name, tokenizer.num_tokens) for name in names}
        self.pool: ProcessPoolExecutor | None = None
        self.waiting: deque[tuple[_Write, Future[tuple[Tokens, Ints]]]] = deque()
        busy = min(8, machine.processors())  # as many as reading a file keeps busy
        self.processes = 1 if tokenizer.kind == "bytes" else busy  # bytes are made as fast as they are sent
        self.texts = self.characters = 0
        self.digest = hashlib.blake2b(digest_size=16)
        self.is_running = config.unit == "window"
        self.count = 0
        """Tokens of a running text so far."""

    def all(self, pairs: Iterator[Pair], on_progress: Callable[[int], None] | None) -> None:
        """All texts of a corpus, and those of the validation file.

        Raises:
            DataError: for texts that cannot be read, or a validation file without any.
            BrokenProcessPool: where a process that tokenises was killed.
        """
        share = self.config.valid_share
        while piece := take(pairs, _PIECE_CHARS):
            texts = [text for text, _ in piece]
            encoded, is_last = _encoded(texts)
            _update(self.digest, encoded, is_last)
            self.texts += sum(is_last)
            self.characters += sum(map(len, texts))
            if self.is_running:
                self._tokenize(texts, partial(self._write_running, "train", is_last))
            else:
                held_out = [share is not None and is_held_out(text, share, self.salt) for text in encoded]
                self._tokenize(texts, partial(self._write, "", np.array(held_out)))
                if self.config.latents_from:
                    self._tokenize([source for _, source in piece], partial(self._write, ".source", np.array(held_out)))
            if on_progress is not None:
                on_progress(self.characters)
            if self.pool is None and self.characters >= _POOL_CHARS and self.processes > 1:
                self.pool = tokenizer_pool(self.tokenize.tokenizer, self.processes)
        if self.config.valid_file is not None:
            self._valid_file(self.config.valid_file)
        while self.waiting:
            self._write_next()
        if self.is_running:
            for file in self.files.values():
                file.end_row()
        elif self.files["valid"].rows == 0 < self.files["train"].rows:
            # Too few texts for the share to hit one: the last one is held out.
            for name in [name for name in self.files if name.startswith("train")]:
                last = self.files[name].pop()
                self.files[name.replace("train", "valid")].append(last, np.array([len(last)]))

    def close(self) -> None:
        """Ends processes and closes files."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        for file in self.files.values():
            file.close()

    def _valid_file(self, name: str) -> None:
        pairs = NotEmpty((text, "") for text in read_texts([name], self.config, repairs=self.repairs))
        piece = take(pairs, _PIECE_CHARS)
        if not piece:
            raise DataError(f"found no text in the validation file {name}")
        while piece:
            texts = [text for text, _ in piece]
            if self.is_running:
                self._tokenize(texts, partial(self._write_running, "valid", _encoded(texts)[1]))
            else:
                self._tokenize(texts, self.files["valid"].append)
            piece = take(pairs, _PIECE_CHARS)

    def _tokenize(self, texts: Sequence[str], write: _Write) -> None:
        """Has these texts tokenised, and written in their turn."""
        longest = None if self.is_running else LONGEST_SEQUENCE  # more of a text no model can read
        if self.pool is None:
            write(*self.tokenize(texts, longest=longest))
            return
        while len(self.waiting) >= 2 * self.processes:
            self._write_next()
        self.waiting.append((write, self.pool.submit(tokenized, texts, longest)))

    def _write_next(self) -> None:
        write, result = self.waiting.popleft()
        write(*result.result())

    def _write(self, ending: str, held_out_N: Bools, tokens: Tokens, lengths_N: Ints) -> None:
        held_out = np.repeat(held_out_N, lengths_N)
        self.files[f"train{ending}"].append(tokens[~held_out], lengths_N[~held_out_N])
        self.files[f"valid{ending}"].append(tokens[held_out], lengths_N[held_out_N])

    def _write_running(self, name: str, is_last: Sequence[bool], tokens: Tokens, lengths_N: Ints) -> None:
        """Parts of running texts. Of each text of the corpus that ends, a share is held out: its tail."""
        file, share = self.files[name], self.config.valid_share
        for part, ends in zip(np.split(tokens, np.cumsum(lengths_N)[:-1]), is_last, strict=True):
            if self.count == 0:
                self._separate(file)
            file.extend(part)
            self.count += len(part)
            if ends:
                if share is not None:
                    self._separate(self.files["valid"])
                    held_out = min(self.count, max(1, round(self.count * share)))  # a text may have no tokens
                    file.move_tail(held_out, self.files["valid"])
                self.count = 0

    def _separate(self, file: TokenWriter) -> None:
        """A blank line between running texts: what another file begins with continues nothing."""
        if file.count > 0:
            file.extend(self.blank_line)


# The digest -----------------------------------------------------------------------------------------------------------


def corpus_digest(sources: Sequence[str], config: DataConfig) -> str:
    """The digest that `Ingest` makes, of a corpus as it is now; what the encoder reads is not in it."""
    digest = hashlib.blake2b(digest_size=16)
    pairs = NotEmpty((text, "") for text in read_texts(sources, config))
    while piece := take(pairs, _PIECE_CHARS):
        _update(digest, *_encoded([text for text, _ in piece]))
    return digest.hexdigest()


def _encoded(texts: Sequence[str]) -> tuple[list[bytes], list[bool]]:
    """Texts in UTF-8, and whether each is whole or the last part of one."""
    return [text.encode("utf-8") for text in texts], [not isinstance(text, Part) for text in texts]


def _update(digest: hashlib.blake2b, encoded: Sequence[bytes], is_last: Sequence[bool]) -> None:
    for text, ends in zip(encoded, is_last, strict=True):
        digest.update(text)
        if ends:
            digest.update(b"\xff")  # a byte that UTF-8 never holds ends a text
