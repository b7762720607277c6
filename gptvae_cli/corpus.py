"""Corpora as tokens: read once, and kept in a cache on disk.

The same files with the same settings are not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import get_type_hints

from gptvae_cli.config import DataConfig, fits
from gptvae_cli.errors import CheckpointError, ConfigError, DataError, GPTVAEError
from gptvae_cli.ingest import (
    SAMPLE_CHARS,
    Ingest,
    NotEmpty,
    corpus_digest,
    even_salt,
    make_tokenizer,
    pairs_from_all,
    read_pairs,
    take,
)
from gptvae_cli.sources import STDIN, expand, is_stdin
from gptvae_cli.text import Repairs
from gptvae_cli.tokenizer import Tokenizer
from gptvae_cli.tokens import TokenStore

_BEGINNING_CHARS = 2**22
"""How much of a corpus in files is in memory before the rest is read; of a pipe it is what a tokenizer learns from."""
_EDGE_BYTES = 2**20
"""How much of the beginning and of the end of a file is looked at to recognise it."""
_FACTS_NAME, _TOKENIZER_NAME = "corpus.json", "tokenizer.json"
_CACHE_FORMAT = 5


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
        salt: which texts are held out, see `ingest.is_held_out`.
        records: the file that looks like JSON lines, though it was read as plain text.
    """

    texts: int
    empty: int
    characters: int
    digest: str
    tokenizer_reason: str
    replaced: int
    salt: int
    records: str | None


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
    def open(cls, folder: Path) -> Corpus:
        """The corpus that `build` left in a folder.

        Raises:
            CheckpointError: for a folder that holds none, or not all of it, or one of another format.
        """
        try:
            content = json.loads((folder / _FACTS_NAME).read_text("utf-8"))
            if content["format"] != _CACHE_FORMAT:
                raise ValueError("it is of another format")
            facts, sizes = CorpusFacts(**content["facts"]), content["sizes"]
            if not all(fits(getattr(facts, name), kind) for name, kind in get_type_hints(CorpusFacts).items()):
                raise ValueError("a fact is of another type")
            if sizes != _sizes(folder):
                raise ValueError("a file is missing, or has changed its size")
            stems = [name.removesuffix(".tokens") for name in sizes if name.endswith(".tokens")]
            opened = {stem: TokenStore(folder, stem) for stem in stems}
            return cls(
                Tokenizer.from_json((folder / _TOKENIZER_NAME).read_text("utf-8")),
                facts,
                content["fingerprint"],
                opened["train"],
                opened["valid"],
                opened.get("train.source"),
                opened.get("valid.source"),
            )
        except (OSError, ValueError, TypeError, KeyError, CheckpointError) as error:
            raise CheckpointError(
                f"the token cache {folder} is missing, damaged or of another version of gptvae",
                hint="name the corpus again, with --resume or --force",
            ) from error

    @classmethod
    def recall(cls, folder: Path, sources: Sequence[str], config: DataConfig) -> Corpus | None:
        """The corpus that `build` left in a folder, if it was made of these sources as they are now.

        Sources are recognised by their `fingerprint`. None for a cache of other sources or settings, a damaged one,
        one of standard input, or none.
        """
        try:
            found = cls.open(folder)
        except CheckpointError:
            return None
        return found if found._is_marked_by(sources, config) else None

    @classmethod
    def build(
        cls,
        sources: Sequence[str],
        config: DataConfig,
        folder: Path,
        *,
        tokenizer: Tokenizer | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Corpus:
        """Reads texts, makes or loads the tokenizer, and writes the cache.

        The file that says what the cache holds is written last: without it there is no cache, only leftovers of one.

        Args:
            sources: files, folders or `-`; none is stdin.
            config: what a text is and which tokenizer.
            folder: where the cache goes; made if need be.
            tokenizer: that of a run which goes on, in place of what the settings ask for: of a pipe it was learnt from
                other texts than of a file, and a file that it came from may be gone.
            on_progress: called with the characters read so far.

        Raises:
            DataError: for a corpus that cannot be read, or that has fewer than two texts to train on.
            ConfigError: for a validation file where the encoder reads other texts: it has none of those.
            GPTVAEError: where a process that tokenises was killed.
        """
        _check_files(sources, config)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [_FACTS_NAME, *_sizes(folder)]:
            (folder / stale).unlink(missing_ok=True)
        # Before they are read: what changes meanwhile will not be recognised.
        mark = fingerprint(sources, config)
        repairs = Repairs()
        pairs = NotEmpty(read_pairs(sources, config, repairs))
        beginning = take(pairs, SAMPLE_CHARS if mark is None else _BEGINNING_CHARS)
        rest = take(pairs, 1)
        reason = "that of the run"
        if tokenizer is None:
            # A corpus may be sorted; but what comes through a pipe is gone.
            again = bool(rest) and mark is not None
            tokenizer, reason = make_tokenizer(config, pairs_from_all(sources, config) if again else iter(beginning))
        share = None if config.unit == "window" else config.valid_share
        salt = 0 if share is None else even_salt([text for text, _ in beginning], share)
        try:
            with closing(Ingest(folder, tokenizer, config, repairs, salt)) as ingest:
                ingest.all(chain(beginning, rest, pairs), on_progress)
        except BrokenProcessPool as error:
            raise GPTVAEError("a process that tokenises was killed", hint="there may be too little memory") from error
        (folder / _TOKENIZER_NAME).write_text(tokenizer.to_json(), "utf-8")
        facts = CorpusFacts(
            texts=ingest.texts,
            empty=pairs.empty,
            characters=ingest.characters,
            digest=ingest.digest.hexdigest(),
            tokenizer_reason=reason,
            replaced=repairs.count,
            salt=salt,
            records=repairs.records,
        )
        content = {"format": _CACHE_FORMAT, "fingerprint": mark, "facts": asdict(facts), "sizes": _sizes(folder)}
        part = folder / f"{_FACTS_NAME}.part"
        part.write_text(json.dumps(content, indent=1), "utf-8")
        part.replace(folder / _FACTS_NAME)
        corpus = replace(cls.open(folder), tokenizer=tokenizer)  # which knows whether a user brought it
        corpus._require_texts(sources, config)
        return corpus

    def holds(self, digest: object, tokenizer: Tokenizer) -> bool:
        """Whether it is the corpus of this digest, in the tokens of this tokenizer."""
        return self.facts.digest == digest and self.tokenizer.to_json() == tokenizer.to_json()

    def is_of(self, sources: Sequence[str], config: DataConfig) -> bool:
        """Whether these sources hold this corpus: by their fingerprint, else by reading all of them.

        Raises:
            DataError: for sources that cannot be read.
        """
        return self._is_marked_by(sources, config) or corpus_digest(sources, config) == self.facts.digest

    def _require_texts(self, sources: Sequence[str], config: DataConfig) -> None:
        texts, train = self.facts.texts, self.train
        place = ", ".join("standard input" if is_stdin(source) else source for source in sources or [STDIN])
        if len(train) < 2 and config.unit != "window":
            if texts > 2:
                raise DataError(
                    f"{texts - len(train):,} of the {texts:,} texts of {place} are held out,"
                    " need at least two to train on",
                    hint="a smaller --valid; equal texts are held out together",
                )
            raise DataError(
                f"found {texts} non-empty text(s) in {place}, need at least two to train on and one to hold out",
                hint=f"a text is a {config.unit} here; --unit line|paragraph|file|window says otherwise",
            )
        if train.count < 2:
            raise DataError(f"found no text to train on in {place}")

    def _is_marked_by(self, sources: Sequence[str], config: DataConfig) -> bool:
        """Whether it has the fingerprint of these sources, and so is known to be of them."""
        return self.fingerprint is not None and self.fingerprint == fingerprint(sources, config)


def _check_files(sources: Sequence[str], config: DataConfig) -> None:
    """Raises a `ConfigError` for files that do not go together, a `DataError` for a validation file that is missing."""
    if config.latents_from is not None and config.valid_file is not None:
        raise ConfigError(
            f"valid is {config.valid!r}, it must be a share of the corpus where latents-from names a file",
            hint="leave --valid out, or say for example --valid 0.05",
        )
    if config.latents_from is not None and [config.latents_from] == list(sources):
        raise ConfigError(
            f"latents-from is {config.latents_from}, the corpus itself, which the encoder reads anyway",
            hint="leave it out, or give each side a file of its own",
        )
    if config.valid_file is not None:
        expand([config.valid_file])  # it is read last, and a wrong name need not cost hours


def is_cache_file(name: str) -> bool:
    """Whether `build` writes a file of this name; the hidden `._train.tokens` beside one of them is macOS's."""
    if name.startswith("."):
        return False
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
    if any(map(is_stdin, files)):
        return None
    named = [config.valid_file, config.latents_from]
    if config.tokenizer not in ("auto", "bytes", "bpe"):
        named.append(config.tokenizer)
    try:
        marks = [_file_mark(Path(file)) for file in [*files, *filter(None, named)]]
    except OSError:
        return None
    return hashlib.blake2b(json.dumps([asdict(config), marks]).encode("utf-8"), digest_size=16).hexdigest()


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
