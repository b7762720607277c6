"""Corpora as tokens: read once, and kept in a cache on disk.

Texts are tokenised in pieces and appended to flat files, so that neither the corpus nor its tokens have to fit in
memory. The same files with the same settings are not read again.

Shapes: N rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from gptvae_cli.config import LONGEST_SEQUENCE, DataConfig, to_dict
from gptvae_cli.errors import CheckpointError, ConfigError, DataError, GPTVAEError
from gptvae_cli.sources import STDIN, excerpt, expand, is_plain
from gptvae_cli.text import Repairs, read_texts
from gptvae_cli.tokenizer import Tokenizer, automatic_tokenizer, pieces
from gptvae_cli.tokens import BulkTokenizer, Ints, Tokens, TokenStore, TokenWriter, tokenized, tokenizer_pool

Bools = npt.NDArray[np.bool_]

_SAMPLE_CHARS = 32 * 2**20
"""How much text a tokenizer is chosen by and trained on: from all of a corpus in files, of a pipe the first."""
_PIECE_CHARS = 2**20
"""How much text is tokenised at a time."""
_POOL_CHARS = 32 * 2**20
"""How much text is worth the second that processes take to start."""
_TEXT_CHARS = 16
"""What a text counts besides its characters: as an object it takes some 100 bytes, however short it is."""
_EDGE_BYTES = 2**20
"""How much of the beginning and of the end of a file is looked at to recognise it."""
_FACTS_NAME, _TOKENIZER_NAME = "corpus.json", "tokenizer.json"
_CACHE_FORMAT = 3
_SALTS, _SALT_TEXTS = 64, 10_000
"""How many ways to hold texts out are tried, and on how many texts."""


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


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: what to train on, what is held out, and what the encoder reads where that differs.

    `fingerprint` is that of the files it was made of, as `fingerprint` gives it.
    """

    tokenizer: Tokenizer
    facts: CorpusFacts
    fingerprint: str | None
    train: TokenStore
    valid: TokenStore
    train_source: TokenStore | None
    valid_source: TokenStore | None

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer) -> Corpus:
        """The corpus that `build` left in a folder.

        Raises:
            CheckpointError: for a folder that holds none, or not all of it.
        """
        try:
            content = json.loads((folder / _FACTS_NAME).read_text("utf-8"))
            facts, sizes = CorpusFacts(**content["facts"]), content["sizes"]
            if sizes != _sizes(folder):
                raise ValueError("a file is missing, or has changed its size")
            stores = {Path(name).stem: None for name in sizes if name.endswith(".tokens")}
            opened = {name: TokenStore(folder, name) for name in stores}
            return cls(
                tokenizer,
                facts,
                content["fingerprint"],
                opened["train"],
                opened["valid"],
                opened.get("train.source"),
                opened.get("valid.source"),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"the token cache {folder} is missing or damaged", hint="give the corpus again, with --force"
            ) from error

    @classmethod
    def recall(cls, folder: Path, sources: Sequence[str], config: DataConfig) -> Corpus | None:
        """The corpus that `build` left in a folder, if it was made of these sources as they are now.

        Sources are recognised by their `fingerprint`. None for a cache of other sources or settings, a damaged one,
        one of standard input, or none.
        """
        try:
            content = json.loads((folder / _FACTS_NAME).read_text("utf-8"))
            if content["fingerprint"] is None or content["fingerprint"] != fingerprint(sources, config):
                return None
            return cls.open(folder, Tokenizer.from_json((folder / _TOKENIZER_NAME).read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError, CheckpointError):
            return None

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

        The file that says what the cache holds is written last: without it there is no cache, only leftovers of one.

        Args:
            sources: files, folders or `-`; none is stdin.
            config: what a text is and which tokenizer.
            folder: where the cache goes; made if need be.
            stdin: stands for standard input.
            on_progress: called with the characters read so far.

        Raises:
            DataError: for a corpus that cannot be read, or that has fewer than two texts to train on.
            ConfigError: for a validation file where the encoder reads other texts: it has none of those.
            GPTVAEError: where a process that tokenises was killed.
        """
        if config.latents_from is not None and config.valid_share is None:
            raise ConfigError(
                f"valid is {config.valid!r}, it must be a share of the corpus where latents-from names a file",
                hint="leave --valid out, or say for example --valid 0.05",
            )
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [_FACTS_NAME, *_sizes(folder)]:
            (folder / stale).unlink(missing_ok=True)
        # Before they are read: what changes meanwhile will not be recognised.
        mark = fingerprint(sources, config)
        repairs = Repairs()
        pairs = _NotEmpty(_pairs(sources, config, stdin, repairs))
        beginning = _take(pairs, _SAMPLE_CHARS)
        rest = _take(pairs, 1)
        # A corpus may be sorted; but what comes through a pipe is gone.
        again = _excerpt(sources, config) if rest and mark is not None else iter(beginning)
        tokenizer, reason = _make_tokenizer(config, again)
        by_text = config.valid_share is not None and config.unit != "window"
        salt = _even_salt([text for text, _ in beginning], config.valid_share or 0.0) if by_text else 0
        pairs_of_all = chain(beginning, rest, pairs)
        del beginning, again  # or they would stay in memory until all is read
        read = _Reader(folder, tokenizer, config, repairs, salt)
        try:
            read.all(pairs_of_all, on_progress)
        except BrokenProcessPool as error:
            raise GPTVAEError("a process that tokenises was killed", hint="there may be too little memory") from error
        finally:
            read.close()
        (folder / _TOKENIZER_NAME).write_text(tokenizer.to_json(), "utf-8")
        facts = CorpusFacts(read.texts, pairs.empty, read.characters, read.digest.hexdigest(), reason, repairs.count)
        content = {"fingerprint": mark, "facts": asdict(facts), "sizes": _sizes(folder)}
        part = folder / f"{_FACTS_NAME}.part"
        part.write_text(json.dumps(content, indent=1), "utf-8")
        part.replace(folder / _FACTS_NAME)
        corpus = cls.open(folder, tokenizer)
        if len(corpus.train) < 2 and config.unit != "window":
            place = ", ".join(sources) or "standard input"
            if facts.texts > 2:
                raise DataError(
                    f"{facts.texts - len(corpus.train):,} of the {facts.texts:,} texts of {place} are held out, need at"
                    " least two to train on",
                    hint="a smaller --valid; equal texts are held out together",
                )
            raise DataError(
                f"found {facts.texts} non-empty text(s) in {place}, need at least two to train on and one to hold out",
                hint=f"a text is a {config.unit} here; --unit line|paragraph|file|window says otherwise",
            )
        if corpus.train.count < 2:
            raise DataError(f"found no text to train on in {', '.join(sources) or 'standard input'}")
        return corpus

    def is_of(self, sources: Sequence[str], config: DataConfig, *, stdin: BinaryIO | None = None) -> bool:
        """Whether these sources hold this corpus: by their fingerprint, else by reading all of them.

        Raises:
            DataError: for sources that cannot be read.
        """
        if self.fingerprint is not None and self.fingerprint == fingerprint(sources, config):
            return True
        return corpus_digest(sources, config, stdin=stdin) == self.facts.digest


def is_cache_file(name: str) -> bool:
    """Whether `build` writes a file of this name."""
    return name in (_FACTS_NAME, _TOKENIZER_NAME, f"{_FACTS_NAME}.part") or Path(name).suffix in (".tokens", ".offsets")


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file of the cache but the one that lists them."""
    files = [path for path in folder.iterdir() if is_cache_file(path.name) and not path.name.startswith(_FACTS_NAME)]
    return {path.name: path.stat().st_size for path in sorted(files)}


def fingerprint(sources: Sequence[str], config: DataConfig) -> str | None:
    """What files and settings are recognised by without reading all of them.

    It holds the settings, and of every file (those of the corpus, and those that the settings name) its name, size,
    time of change, and first and last MiB. A file that is changed in its middle and then given its old time back
    is not noticed.

    Returns:
        None where standard input is read, which must be read to be known, or where a file cannot be.

    Raises:
        DataError: for a source that is missing.
    """
    files = expand(sources or [STDIN])
    if STDIN in files:
        return None
    named = [config.valid if config.valid_share is None else None, config.latents_from]
    if config.tokenizer not in ("auto", "bytes", "bpe"):
        named.append(config.tokenizer)
    digest = hashlib.blake2b(digest_size=16)
    try:
        marks = [_file_mark(Path(file)) for file in [*files, *filter(None, named)]]
    except OSError:
        return None
    digest.update(json.dumps([_CACHE_FORMAT, to_dict(config), marks]).encode("utf-8"))
    return digest.hexdigest()


def _file_mark(path: Path) -> list[str | int]:
    if not path.is_file():  # what is read of a pipe is gone
        raise OSError(f"{path} is no regular file")
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        digest.update(file.read(_EDGE_BYTES))
        file.seek(max(0, found.st_size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return [path.name, found.st_size, found.st_mtime_ns, digest.hexdigest()]


class _Reader:
    """Routes texts to the files, and counts."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, config: DataConfig, repairs: Repairs, salt: int) -> None:
        names = ["train", "valid"] + (["train.source", "valid.source"] if config.latents_from else [])
        self.files = {name: TokenWriter(folder, name, tokenizer.num_tokens) for name in names}
        self.tokenize, self.config, self.repairs = BulkTokenizer(tokenizer), config, repairs
        self.salt = salt
        self.pool: ProcessPoolExecutor | None = None
        self.waiting: deque[tuple[str, Bools, Future[tuple[Tokens, Ints]]]] = deque()
        self.processes = 1 if tokenizer.kind == "bytes" else _processors()  # bytes are made as fast as they are sent
        self.texts = self.characters = 0
        self.digest = hashlib.blake2b(digest_size=16)

    def all(self, pairs: Iterator[tuple[str, str]], on_progress: Callable[[int], None] | None) -> None:
        share = self.config.valid_share
        while piece := _take(pairs, _PIECE_CHARS):
            self.texts += len(piece)
            self.characters += sum(len(text) for text, _ in piece)
            encoded = [text.encode("utf-8") for text, _ in piece]
            _update(self.digest, encoded)
            if self.config.unit == "window":
                for text, _ in piece:
                    self._window(text, share)
            else:
                held_out = np.array(
                    [share is not None and _share(_hash(text), self.salt) < share for text in encoded], dtype=bool
                )
                self._rows("", [text for text, _ in piece], held_out)
                if self.config.latents_from:
                    self._rows(".source", [source for _, source in piece], held_out)
            if on_progress is not None:
                on_progress(self.characters)
            if self.pool is None and self.characters >= _POOL_CHARS and self.processes > 1:
                self.pool = tokenizer_pool(self.tokenize.tokenizer, self.processes)
        while self.waiting:
            self._take_rows()
        if share is None:
            self._valid_file()
        elif self.files["valid"].rows == 0 < self.files["train"].rows:
            # Too few texts for the share to hit one: the last one is held out.
            for name in [name for name in self.files if name.startswith("train")]:
                last = self.files[name].pop()
                self.files[name.replace("train", "valid")].append(last, np.array([len(last)]))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        for file in self.files.values():
            file.close()

    def _rows(self, ending: str, texts: Sequence[str], held_out: Bools) -> None:
        """Texts that are held out or not, which a pool returns later."""
        longest = LONGEST_SEQUENCE  # more of a text no model can read
        if self.pool is None:
            self._write(ending, held_out, *self.tokenize(texts, longest=longest))
            return
        while len(self.waiting) >= 2 * self.processes:
            self._take_rows()
        self.waiting.append((ending, held_out, self.pool.submit(tokenized, texts, longest)))

    def _take_rows(self) -> None:
        ending, held_out, result = self.waiting.popleft()
        self._write(ending, held_out, *result.result())

    def _write(self, ending: str, held_out: Bools, tokens: Tokens, lengths_N: Ints) -> None:
        held_out_tokens = np.repeat(held_out, lengths_N)
        self.files[f"train{ending}"].append(tokens[~held_out_tokens], lengths_N[~held_out])
        self.files[f"valid{ending}"].append(tokens[held_out_tokens], lengths_N[held_out])

    def _window(self, text: str, share: float | None) -> None:
        """A running text, whose tail is held out."""
        tokens = self._running(text)
        held_out = 0 if share is None else max(1, round(len(tokens) * share))
        kept = len(tokens) - held_out
        self._go_on("train", tokens[:kept])
        if held_out:
            self._go_on("valid", tokens[kept:])

    def _go_on(self, name: str, tokens: Tokens) -> None:
        """Appends to a running text, behind a blank line: what another file begins with continues nothing."""
        if self.files[name].rows > 0 and len(tokens) > 0:
            tokens = np.concatenate([self.tokenize(["\n\n"])[0], tokens])
        self.files[name].append(tokens, np.array([len(tokens)]))

    def _running(self, text: str) -> Tokens:
        """The tokens of a long text, made in pieces."""
        tokens: Tokens = np.concatenate([self.tokenize([piece])[0] for piece in pieces(text)])
        return tokens

    def _valid_file(self) -> None:
        pairs = ((text, "") for text in _read([self.config.valid], self.config, repairs=self.repairs) if text)
        while piece := _take(pairs, _PIECE_CHARS):
            if self.config.unit == "window":
                for text, _ in piece:
                    self._go_on("valid", self._running(text))
            else:
                self.files["valid"].append(*self.tokenize([text for text, _ in piece], longest=LONGEST_SEQUENCE))
        if self.files["valid"].rows == 0:
            raise DataError(f"found no text in the validation file {self.config.valid}")


def _processors() -> int:
    """Those that this process may use, and that reading a file keeps busy."""
    return min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def corpus_digest(sources: Sequence[str], config: DataConfig, *, stdin: BinaryIO | None = None) -> str:
    """The digest that `CorpusFacts` holds, of a corpus as it is now; what the encoder reads is not in it."""
    digest = hashlib.blake2b(digest_size=16)
    pairs = _NotEmpty((text, "") for text in _read(sources, config, repairs=Repairs(), stdin=stdin))
    while piece := _take(pairs, _PIECE_CHARS):
        _update(digest, [text.encode("utf-8") for text, _ in piece])
    return digest.hexdigest()


def _update(digest: hashlib.blake2b, texts: Sequence[bytes]) -> None:
    for text in texts:
        digest.update(text)
        digest.update(b"\xff")  # a byte that UTF-8 never holds ends a text


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


def _excerpt(sources: Sequence[str], config: DataConfig) -> Iterator[tuple[str, str]]:
    """Texts from all of a corpus, of plain files without reading all of it."""
    files = expand([*sources, *filter(None, [config.latents_from])])
    if not all(map(is_plain, files)):
        return _pairs(sources, config, None, Repairs())
    stream = io.BytesIO(excerpt(files, _SAMPLE_CHARS))
    return ((text, "") for text in read_texts([STDIN], unit=config.unit, errors="replace", stdin=stream))


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
    """The next texts, until they hold about this many characters; none at the end."""
    taken: list[tuple[str, str]] = []
    for pair in pairs:
        taken.append(pair)
        characters -= len(pair[0]) + len(pair[1]) + _TEXT_CHARS
        if characters <= 0:
            break
    return taken


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


def _make_tokenizer(config: DataConfig, pairs: Iterator[tuple[str, str]]) -> tuple[Tokenizer, str]:
    if config.tokenizer not in ("auto", "bytes", "bpe"):
        return Tokenizer.from_file(Path(config.tokenizer)), f"read from {config.tokenizer}"
    kind, reason = config.tokenizer, "asked for"
    if kind == "bytes":
        return Tokenizer.bytes(), reason
    texts = _spread((piece for pair in pairs for text in pair for piece in pieces(text)), _SAMPLE_CHARS)
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


def _hash(data: bytes, salt: int = 0) -> bytes:
    return hashlib.blake2b(data, digest_size=8, salt=bytes([salt])).digest()


def _share(text_hash: bytes, salt: int) -> float:
    """A number in [0, 1) that depends on the text and the salt alone: equal texts are held out together."""
    return int.from_bytes(_hash(text_hash, salt) if salt else text_hash, "big") / 2**64


def _even_salt(texts: Sequence[str], share: float) -> int:
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
