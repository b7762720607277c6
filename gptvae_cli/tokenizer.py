"""The tokenizer that a model carries: texts to tokens and back.

Nothing here loads torch or numpy, and `tokenizers`, which is heavy, is loaded only when a tokenizer is made.
"""

from __future__ import annotations

import json
import math
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptvae_cli.errors import CheckpointError, DataError, GPTVAEError

if TYPE_CHECKING:
    import tokenizers

    from gptvae_cli.config import Unit
    from gptvae_cli.constraint import Constraint

TokenizerKind = Literal["bytes", "bpe", "file"]

_MOST_TOKENS = 2**22 - 3
"""What `ModelConfig` allows, less the special tokens. A crafted file may number its tokens up to 2^32."""
_MOST_GROWTH = 64
"""How many times longer than the text a part of a tokenizer may make it, see `_growth`."""
_LONGEST_TOKEN = 4096
"""Characters of a token: each costs time when a text is written, whether the token is in it or not."""
_LONGEST_WORD = 1000
"""Characters of a word, in training. The time a BPE takes to learn grows with the square of a word's length (a
word ends at a space, or between letters, digits and signs): 2 MB of DNA on one line take 3 s cut to this length,
and more than 13 minutes uncut."""
OFTEN = 16
"""How often a pair of tokens occurs in a corpus for a BPE to make one of it, where no size is asked for: what is rarer
is learnt too seldom. So English gets 2,000 tokens for 0.6 MB and 5,000 for 3.4 MB, and five languages 8,000
(`tests/benchmarks/latent/defaults.txt`)."""
MOST = 8_000
"""Tokens of such a BPE: each costs time in every step, and no larger one was measured."""
PIECE_CHARS = 2**16
"""Characters that are tokenised at once."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate, which is not valid Unicode: half of a character, or a byte that was not UTF-8."""


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
        self._constraints: dict[Unit, Constraint] = {}

    @cached_property
    def is_exact(self) -> bool:
        """Whether every text comes back as it was: a byte-level one with a token for every byte, which changes nothing
        before, and no added token whose characters the library takes for bytes."""
        from tokenizers import pre_tokenizers

        parts = json.loads(self.to_json())
        byte_level = parts["pre_tokenizer"] or {}
        added = self._tokenizer.get_added_tokens_decoder()
        return (
            parts["normalizer"] is None
            and byte_level.get("type") == "ByteLevel"
            and not byte_level["add_prefix_space"]
            and (parts["decoder"] or {}).get("type") == "ByteLevel"
            and set(pre_tokenizers.ByteLevel.alphabet()) <= self._tokenizer.get_vocab().keys()
            and all(self.decode([number]) == token.content for number, token in added.items())
        )

    def spelled(self) -> list[bytes]:
        """The bytes of UTF-8 that every token stands for, special ones none; of a tokenizer that `is_exact`."""
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        byte_of = _bytes_of_characters()
        spelled = [b""] * self.num_tokens
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            # The library writes a byte as one character, but for tokens that were added, which it writes as they are.
            as_it_is = token in added or not byte_of.keys() >= set(token)
            spelled[number] = token.encode("utf-8") if as_it_is else bytes(byte_of[char] for char in token)
        return spelled

    def constraint(self, unit: Unit) -> Constraint:
        """What a text of a unit may go on with: no special token but EOS, no line break in a `line`, and of a tokenizer
        that `is_exact` only what is valid UTF-8."""
        from gptvae_cli.constraint import Constraint  # which loads numpy

        if unit not in self._constraints:
            tokens = self.spelled() if self.is_exact else [b""] * self.num_tokens
            never = [self.pad_id, self.bos_id, *(self.line_break_ids if unit == "line" else ())]
            self._constraints[unit] = Constraint(tokens, never=never, eos_id=self.eos_id)
        return self._constraints[unit]

    @classmethod
    def bytes(cls) -> Tokenizer:
        """One token for each byte of UTF-8; its id is the byte."""
        from tokenizers import models

        return cls(_byte_level(models.BPE(vocab=_bytes_of_characters(), merges=[]), use_regex=False), "bytes")

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int | None = None) -> Tokenizer:
        """A BPE over bytes (arXiv 1508.07909).

        Args:
            vocab_size: tokens that it may have at most, the 256 bytes among them; None is as many as occur `OFTEN`, and
                no more than `MOST`.
        """
        from tokenizers import models, pre_tokenizers, trainers

        tokenizer = _byte_level(models.BPE(), use_regex=True)
        trainer = trainers.BpeTrainer(
            vocab_size=MOST if vocab_size is None else vocab_size,
            min_frequency=OFTEN if vocab_size is None else 2,
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

    def encode_batch(self, texts: Sequence[str], *, longest: int | None = None) -> list[list[int]]:
        """The tokens of each text, special tokens not added.

        A text of more than 65,536 characters is tokenised in pieces, see `pieces`: whole, 100 MB of text would take
        gigabytes and, where they are one word, minutes.

        Args:
            longest: tokens of a text that are wanted at most. They are the first of those that it has without a
                limit; of a long text no more is tokenised than they need.

        Raises:
            DataError: for a text that is not valid Unicode, or that a user's tokenizer has no tokens for.
        """
        short = iter(self._encode([text for text in texts if len(text) <= PIECE_CHARS]))
        return [
            (next(short) if len(text) <= PIECE_CHARS else self._encode_long(text, longest))[:longest] for text in texts
        ]

    def _encode_long(self, text: str, longest: int | None) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text):
            ids += self._encode([piece])[0]
            if longest is not None and len(ids) >= longest:
                break
        return ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            with _library_errors(DataError, "the tokenizer cannot encode a text"):
                encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except DataError:
            for text in texts:
                if surrogate := SURROGATE.search(text):
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

    @cached_property
    def line_break_ids(self) -> list[int]:
        """The tokens that hold LF or CR, ascending."""
        return [i for i, text in enumerate(self._texts) if "\n" in text or "\r" in text]

    def beginning_with(self, text: str) -> list[int]:
        """The tokens whose text begins so, ascending."""
        return [i for i, each in enumerate(self._texts) if each.startswith(text)]

    @cached_property
    def _texts(self) -> list[str]:
        """The text of every token by itself, but for special ones."""
        with _library_errors(DataError, "the tokenizer cannot decode"):
            return self._tokenizer.decode_batch([[i] for i in range(self.pad_id)], skip_special_tokens=False)


_FILE_HINT = "give a tokenizer.json of the tokenizers library (Tokenizer.save), or --tokenizer bytes|bpe"


def _bytes_of_characters() -> dict[str, int]:
    """The library writes a byte as a character: itself where that is printable, else the next from U+0100 on."""
    from tokenizers import pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    unprintable = sorted(set(range(256)) - set(map(ord, alphabet)))
    return {char: ord(char) if ord(char) < 256 else unprintable[ord(char) - 256] for char in alphabet}


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
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(parts.get(name))) > _MOST_GROWTH:
            raise ValueError(f"its {name} can make a text {growth:.3g} times as long, expected {_MOST_GROWTH} at most")
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if (longest := max(map(len, vocabulary), default=0)) > _LONGEST_TOKEN:
        raise ValueError(f"a token is {longest:,} characters long, expected {_LONGEST_TOKEN:,} at most")
    last = max(vocabulary.values(), default=-1)
    if not 0 <= last < _MOST_TOKENS:
        raise ValueError(f"its last token is number {last}, expected 0 to {_MOST_TOKENS - 1}")
    return tokenizer, kind_of(model)


def kind_of(model: object) -> TokenizerKind:
    """The kind of a tokenizer by the `model` in its JSON, without the library, which takes a tenth of a second to
    load."""
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return "file"
    return "bytes" if not model.get("merges") and len(model.get("vocab", ())) == 256 else "bpe"


def _growth(part: Any) -> float:
    """How many times longer a part of a tokenizer can make a text, in characters; 1 to 18 for real ones.

    Forty steps that each replace `a` by `aa` would make a terabyte of one letter.
    """
    if isinstance(part, list):
        return math.prod(map(_growth, part), start=1.0)
    match part:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return max(1.0, len(new) / len(old))
        case {"type": "Replace", "content": str(new)}:  # an expression may match between any two characters
            return 1.0 + len(new)
        case {"type": "Prepend", "prepend": str(new)}:
            return max(1.0, len(new))
        case {"type": "Precompiled", "precompiled_charsmap": str(packed)}:  # a table, and what stands in for texts
            table = b64decode(packed)
            texts = table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")
            return max(1.0, *(len(text.decode("utf-8", "replace")) for text in texts))
        case {"type": "ByteLevel" | "BPEDecoder"}:  # a byte of UTF-8 as a character, or a space behind each one
            return 2.0
        case dict():
            return math.prod(map(_growth, part.values()), start=1.0)
    return 1.0


@contextmanager
def _library_errors(kind: type[GPTVAEError], message: str, *, hint: str | None = None) -> Iterator[None]:
    """Translates every failure of the library, which panics on some files and texts.

    A panic of Rust is a BaseException. It also prints to the process's stderr, which only redirecting that for
    all threads would prevent. What a signal's handler raises meanwhile, such as the end of a time limit, passes.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__module__ not in ("builtins", "pyo3_runtime"):
            raise
        raise kind(f"{message}: {' '.join(str(error).split())[:200]}", hint=hint) from error


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most 65,536 characters, to be tokenised one by one.

    A piece ends after the last line break that fits, else before the last space, else anywhere. At a line's or a
    word's end a byte-level BPE makes the same tokens of the pieces as of the whole; elsewhere a token may be split.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        most = start + PIECE_CHARS
        stop = text.rfind("\n", start, most) + 1 or max(0, text.rfind(" ", start + 1, most)) or most
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def automatic_tokenizer(sample: Sequence[str]) -> tuple[Literal["bytes", "bpe"], str]:
    """Chooses a tokenizer by how much text there is and how long a text is, and says why.

    Args:
        sample: texts of the corpus, all of it if they are not many.
    """
    size = sum(len(text.encode("utf-8")) for text in sample)
    mean = size / max(1, len(sample))
    amount = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    if size < 200_000:
        return "bytes", f"{amount} of text is too little to learn longer tokens from"
    if mean < 16:
        return "bytes", f"the texts are short, {mean:.0f} bytes on average, so longer tokens would save little"
    return "bpe", f"what occurs {OFTEN} times or more in {amount} of text"
