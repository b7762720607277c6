"""Texts in, tokens out and back: the tokenizer that a model carries, and the reading of corpora.

Nothing here loads torch or numpy, and `tokenizers`, which is heavy, is loaded only when a tokenizer is made.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, TextIO

from gptvae_cli.config import Unit
from gptvae_cli.errors import CheckpointError, DataError, GPTVAEError

if TYPE_CHECKING:
    import tokenizers

# Tokenizers -------------------------------------------------------------------------------------------------

TokenizerKind = Literal["bytes", "bpe", "file"]

_MOST_TOKENS = 2**22 - 3
"""What `ModelConfig` allows, less the special tokens. A crafted file may number its tokens up to 2^32."""
_LONGEST_WORD = 1000
"""Characters of a word, in training. The time a BPE takes to learn grows with the square of a word's length (a
word ends at a space, or between letters, digits and signs): 2 MB of DNA on one line take 3 s cut to this length,
and more than 13 minutes uncut."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library; pad, bos and eos are the three ids after its vocabulary.

    Those made here are byte-level: every valid Unicode string comes back exactly. The special tokens are not in
    the vocabulary, so no text can spell one.

    Args:
        tokenizer: without truncation, padding and post-processor.
        kind: `bytes`, `bpe`, or `file` for one that a user brought.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, kind: TokenizerKind) -> None:
        self._tokenizer = tokenizer
        self.kind = kind
        # One above the last id, not the number of entries: a user's vocabulary may have gaps.
        self.pad_id = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id = self.pad_id + 1
        self.eos_id = self.pad_id + 2
        self.num_tokens = self.pad_id + 3

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token for each byte of UTF-8; its id is the byte."""
        from tokenizers import models, pre_tokenizers

        # The library writes a byte as a character: itself where that is printable, else the next from U+0100 on.
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        unprintable = sorted(set(range(256)) - set(map(ord, alphabet)))
        vocab = {char: ord(char) if ord(char) < 256 else unprintable[ord(char) - 256] for char in alphabet}
        return cls(_byte_level(models.BPE(vocab=vocab, merges=[]), use_regex=False), "bytes")

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A BPE over bytes (arXiv 1508.07909) of at most `vocab_size` tokens, the 256 bytes among them."""
        from tokenizers import models, pre_tokenizers, trainers

        tokenizer = _byte_level(models.BPE(), use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        pieces = (text[i : i + _LONGEST_WORD] for text in texts for i in range(0, len(text), _LONGEST_WORD))
        tokenizer.train_from_iterator(pieces, trainer)
        return cls(tokenizer, "bpe")

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """What `to_json` wrote, checked: it may come from a stranger's model file.

        A user's own byte-level BPE comes back as `bpe`: it differs in nothing but its origin.

        Raises:
            CheckpointError: for anything that cannot be loaded.
        """
        with _library_errors(CheckpointError, "the tokenizer is malformed"):
            return cls(*_load(text))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """A user's `tokenizer.json`. Its own special tokens are ordinary ones here.

        Raises:
            DataError: for a file that is missing, unreadable or not a tokenizer.
        """
        try:
            text = Path(path).read_text("utf-8")
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not a tokenizer file: it is not UTF-8", hint=_FILE_HINT) from error
        with _library_errors(DataError, f"{path} is not a tokenizer file", hint=_FILE_HINT):
            return cls(_load(text)[0], "file")

    def to_json(self) -> str:
        """The whole tokenizer, in the format of the `tokenizers` library."""
        return self._tokenizer.to_str()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, special tokens not added.

        Raises:
            DataError: for a text that is not valid Unicode, or that a user's tokenizer has no tokens for.
        """
        try:
            with _library_errors(DataError, "the tokenizer cannot encode a text"):
                encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except DataError:
            for text in texts:
                if surrogate := _SURROGATE.search(text):
                    raise DataError(
                        f"a text holds the lone surrogate U+{ord(surrogate[0]):04X}, which is not valid Unicode",
                        hint="bytes that are not UTF-8 arrive like this in an argument",
                    ) from None
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens; special and unknown ids are skipped, invalid bytes become U+FFFD."""
        known = [i for i in ids if 0 <= i < self.pad_id]
        with _library_errors(DataError, "the tokenizer cannot decode"):
            return self._tokenizer.decode(known, skip_special_tokens=False)

    def line_break_ids(self) -> list[int]:
        """The tokens that hold LF or CR, ascending."""
        with _library_errors(DataError, "the tokenizer cannot decode"):
            texts = self._tokenizer.decode_batch([[i] for i in range(self.pad_id)], skip_special_tokens=False)
        return [i for i, text in enumerate(texts) if "\n" in text or "\r" in text]


_FILE_HINT = "give a tokenizer.json of the tokenizers library (Tokenizer.save), or --tokenizer bytes|bpe"
_SURROGATE = re.compile("[\ud800-\udfff]")


def _byte_level(model: tokenizers.models.BPE, *, use_regex: bool) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _load(text: str) -> tuple[tokenizers.Tokenizer, TokenizerKind]:
    """Loads a tokenizer without what would change the tokens of a text."""
    from tokenizers import Tokenizer

    parts: Any = json.loads(text)
    if not isinstance(parts, dict) or not isinstance(model := parts.get("model"), dict):
        raise ValueError("no JSON object with a model")
    # Cutting, padding and special tokens are the model's business. Padding may also ask for terabytes, a
    # post-processor may drop the text, and dropout would make the tokens random.
    parts |= {"truncation": None, "padding": None, "post_processor": None}
    if "dropout" in model:
        model["dropout"] = None
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= last < _MOST_TOKENS:
        raise ValueError(f"its last token is number {last}, expected 0 to {_MOST_TOKENS - 1}")
    if model.get("type") != "BPE":
        return tokenizer, "file"
    return tokenizer, "bpe" if model.get("merges") else "bytes"


@contextmanager
def _library_errors(kind: type[GPTVAEError], message: str, *, hint: str | None = None) -> Iterator[None]:
    """Translates every failure of the library, which panics on some files and texts.

    A panic of Rust is a BaseException. It also prints to the process's stderr, which only redirecting that for
    all threads would prevent.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise kind(f"{message}: {' '.join(str(error).split())[:200]}", hint=hint) from error


class TokenizerChoice(NamedTuple):
    """A kind of tokenizer, the size of its vocabulary without special tokens, and why."""

    kind: Literal["bytes", "bpe"]
    vocab_size: int
    reason: str


def automatic_tokenizer(sample: Sequence[str], total_bytes: int | None) -> TokenizerChoice:
    """Chooses a tokenizer by how much text there is and how long a text is.

    The vocabulary is a rule of thumb: 1000 tokens for 0.5 MB, 2000 for 3 MB, 3750 for 20 MB and 8750 for
    200 MB, at most 16,000, so that most tokens are seen often enough to be learnt.

    Args:
        sample: texts of the corpus.
        total_bytes: size of the whole corpus; None where it is not known: the sample counts as all of it.
    """
    sample_bytes = sum(len(text.encode("utf-8")) for text in sample)
    size = sample_bytes if total_bytes is None else total_bytes
    mean = sample_bytes / max(1, len(sample))
    amount = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    if size < 250_000:
        return TokenizerChoice("bytes", 256, f"{amount} of text is too little to learn longer tokens from")
    if mean < 16:
        reason = f"the texts are short, {mean:.0f} bytes on average, so longer tokens would save little"
        return TokenizerChoice("bytes", 256, reason)
    vocab_size = min(16_000, 250 * round(1000 * (size / 500_000) ** 0.36 / 250))
    reason = f"{amount} in texts of {mean:.0f} bytes on average is enough to learn {vocab_size} tokens from"
    return TokenizerChoice("bpe", vocab_size, reason)


# Texts ------------------------------------------------------------------------------------------------------

_STDIN = "-"
_FOLDER_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def read_texts(
    sources: Sequence[str], *, unit: Unit, field: str = "text", stdin: BinaryIO | None = None
) -> Iterator[str]:
    r"""The texts of files, folders and stdin, in order.

    A file is UTF-8 text whatever its ending, except `.jsonl` (one JSON object a line) and `.gz`. A folder stands
    for the `.txt`, `.jsonl`, `.txt.gz` and `.jsonl.gz` files below it, sorted by path. LF, CRLF and CR end a line
    and nothing else does; they are LF within a text. A byte order mark at the start of a file and its last line
    end are not text.

    - `line`: an empty line is an empty text.
    - `paragraph`: lines between blank ones, joined by LF; a line of only whitespace is blank.
    - `file`: one text a file.
    - `window`: the same; crops of it are the consumer's business.

    A record of a `.jsonl` file is one text. With `line`, line breaks within it become a space; with `window`,
    the records of a file are joined into one text with a blank line between them. Blank lines are no records.

    Memory holds one line or paragraph at a time, or one file.

    Args:
        sources: paths, or `-` for stdin; none is stdin.
        unit: what a text is.
        field: the key of a record's text.
        stdin: stands for standard input; None is the process's own.

    Raises:
        DataError: at once for a source that is missing or a folder without texts; while reading for one that
            cannot be read, is not UTF-8, is not valid JSON or gzip, or lacks the field.
    """
    files = source_files(sources)
    if _STDIN in files and stdin is None:
        stdin = getattr(sys.stdin, "buffer", None)
        if stdin is None:
            raise DataError("cannot read stdin: it is closed", hint="name a file")
    return chain.from_iterable(_read_file(file, unit, field, stdin) for file in files)


def source_files(sources: Sequence[str]) -> list[str]:
    """The files that sources stand for, in order; `-` is stdin, as are no sources.

    Raises:
        DataError: for a source that is missing or a folder without texts.
    """
    return [file for source in sources or [_STDIN] for file in _files(source)]


def _files(source: str) -> list[str]:
    if source == _STDIN:
        return [source]
    with _reading_errors(source):
        if not S_ISDIR(Path(source).stat().st_mode):
            return [source]
        # Not Path.rglob, which passes over folders that it may not read.
        tree = os.walk(source, onerror=_raise)
        paths = [Path(folder, name) for folder, _, names in tree for name in names]
    files = sorted(path for path in paths if path.name.lower().endswith(_FOLDER_ENDINGS))
    if not files:
        raise DataError(
            f"found no texts in the folder {source}: no file ends in {', '.join(_FOLDER_ENDINGS)}",
            hint="name files with other endings one by one",
        )
    return [str(file) for file in files]


def _raise(error: OSError) -> None:
    raise error


def _read_file(file: str, unit: Unit, field: str, stdin: BinaryIO | None) -> Iterator[str]:
    name = "stdin" if file == _STDIN else file
    with _reading_errors(name), _opened(file, stdin) as stream:
        lines = _lines(stream, name)
        if file.lower().removesuffix(".gz").endswith(".jsonl"):
            records = _records(lines, name, field)
            if unit == "line":
                yield from (record.replace("\n", " ") for record in records)
            elif unit == "window":
                yield "\n\n".join(records)
            else:
                yield from records
        elif unit == "line":
            yield from lines
        elif unit == "paragraph":
            yield from _paragraphs(lines)
        else:
            yield "\n".join(lines)


@contextmanager
def _reading_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is not gzip, or cut or damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from error


@contextmanager
def _opened(file: str, stdin: BinaryIO | None) -> Iterator[TextIO]:
    if file == _STDIN:
        assert stdin is not None
        stream = _decoded(stdin)
        try:
            yield stream
        finally:
            stream.detach()  # or it would close stdin, which is not ours
        return
    with Path(file).open("rb") as raw:
        if not file.lower().endswith(".gz"):
            yield _decoded(raw)
            return
        if not raw.peek(1):
            raise EOFError("it is empty")  # which Python's gzip takes for an empty text
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield _decoded(unpacked)


def _decoded(stream: BinaryIO | gzip.GzipFile) -> io.TextIOWrapper:
    # Invalid bytes are let through as lone surrogates, which `_lines` finds: a strict decoder fails a whole
    # buffer at once, and the lines before the bad one would be lost with their count.
    return io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline=None)


def _lines(stream: TextIO, name: str) -> Iterator[str]:
    """Lines without their ends. Iterating a stream splits at LF, CRLF and CR only, `str.splitlines` at more."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line.isascii() and (escaped := _ESCAPED_BYTE.search(line)):
            byte = ord(escaped[0]) - 0xDC00
            encoding = "utf-16" if number == 1 and line[0] in "\udcfe\udcff" else "latin1"
            raise DataError(
                f"{name}, line {number}: byte 0x{byte:02x} is not UTF-8",
                hint=f"convert it, e.g. iconv -f {encoding} -t utf-8 < OLD > NEW",
            )
        yield line.removesuffix("\n")


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line and not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _records(lines: Iterator[str], name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        text = _record_text(line, f"{name}, line {number}", field)
        yield text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _record_text(line: str, place: str, field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting
        raise DataError(f"{place} is not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} is {_json_type(record)}, expected an object with the field {field!r}")
    if field not in record:
        fields = ", ".join(repr(key[:40]) for key in list(record)[:10]) or "none"
        raise DataError(f"{place} has no field {field!r}", hint=f"--field names it; this line has {fields}")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{place}: the field {field!r} is {_json_type(text)}, expected a string")
    if surrogate := _SURROGATE.search(text):
        raise DataError(f"{place}: \\u{ord(surrogate[0]):04x} is a lone surrogate, half of a character")
    return text


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
