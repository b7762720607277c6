"""Tokenizers that lose nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from gptvae_cli.config import TextConfig, Unit
from gptvae_cli.errors import CheckpointError, DataError
from gptvae_cli.text import read_texts
from gptvae_cli.tokenizer import _MOST_GROWTH, Tokenizer, _growth, automatic_tokenizer, kind_of, pieces

HARD_TEXTS = [
    "",
    " ",
    "  two  spaces, a\ttab and trailing ",
    "a<pad>b <s></s> [UNK] <|endoftext|>",
    "NUL \0 ESC \x1b DEL \x7f C1 \x85 \x9b",
    "lines\nof\r\nevery\rkind\x0b\x0c\x1c\u2028\u2029",
    "\ufeffa mark and \ufffd",
    "e\u0301 é ﬁ Å \u212b ½ ㎏",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "don't I'LL 1234567890",
    "\u202eright to left\u202c עברית",
    "\U0010ffff\U00010000\uffff\ue000",
    "a" * 5000,
]


def lines_of(text: str) -> list[str]:
    """What the corpora of the tests hold: one text a line, LF."""
    return text.removesuffix("\n").split("\n")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(["the cat sat on the mat, the dog too\n"] * 3 + ["café 中文\n"] * 2, 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return Tokenizer.bytes() if request.param == "bytes" else bpe


def test_every_valid_string_comes_back_exactly(tokenizer: Tokenizer) -> None:
    """Normalizers, spellings of special tokens, regex splits and replacement are where texts get changed."""
    draw = random.Random(0)
    chars = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = HARD_TEXTS + ["".join(map(chr, draw.choices(chars, k=50))) for _ in range(200)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


@pytest.mark.parametrize("corpus", ["tatoeba_112langs", "chinese_poems", "python_source"])
def test_every_line_of_a_corpus_comes_back_exactly(corpus: str) -> None:
    folder = os.environ.get("GPTVAE_TEST_DATA")
    if not folder:
        pytest.skip("GPTVAE_TEST_DATA is not set")
    path = Path(folder, f"{corpus}_train.txt")
    texts = lines_of(path.read_bytes().decode("utf-8"))
    assert list(read_texts([str(path)], TextConfig())) == texts
    distinct = sorted(set(texts))
    for tokenizer in (Tokenizer.bytes(), Tokenizer.train_bpe(distinct[::10], 1000)):
        assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(distinct)] == distinct


def test_the_token_of_a_byte_is_the_byte() -> None:
    """The ids of a byte model must be the same in every release of the library."""
    texts = [*HARD_TEXTS, "".join(map(chr, range(0x800)))]
    assert Tokenizer.bytes().encode_batch(texts) == [list(text.encode("utf-8")) for text in texts]


def test_special_tokens_are_the_three_ids_after_the_vocabulary(bpe: Tokenizer) -> None:
    for tokenizer, vocab in ((Tokenizer.bytes(), 256), (bpe, len(json.loads(bpe.to_json())["model"]["vocab"]))):
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (vocab, vocab + 1, vocab + 2)
        assert tokenizer.num_tokens == vocab + 3


def test_the_stored_tokenizer_changes_no_text(bpe: Tokenizer) -> None:
    for tokenizer in (Tokenizer.bytes(), bpe):
        parts = json.loads(tokenizer.to_json())
        assert parts["added_tokens"] == []
        changing = ("normalizer", "post_processor", "truncation", "padding")
        assert [parts[part] for part in changing] == [None] * 4


def test_a_tokenizer_and_its_kind_survive_json(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.kind, again.num_tokens) == (tokenizer.kind, tokenizer.num_tokens)
    assert again.to_json() == tokenizer.to_json()
    assert again.encode_batch(HARD_TEXTS) == tokenizer.encode_batch(HARD_TEXTS)


def test_a_bpe_that_joins_nothing_is_one_of_bytes_only_if_it_has_these() -> None:
    letters = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    kinds = [kind_of(json.loads(text)["model"]) for text in (letters.to_str(), Tokenizer.bytes().to_json())]
    assert kinds == ["bpe", "bytes"]


def test_decode_skips_specials_and_unknown_ids_and_replaces_invalid_bytes() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.decode([257, 104, 256, 105, 258, 259, 10**9, -1, -257]) == "hi"
    broken = b"a\xffb\xe4\xb8c\xf0\x9f\x98\xed\xa0\x80"
    assert tokenizer.decode(list(broken)) == broken.decode("utf-8", "replace")
    assert tokenizer.decode([]) == ""


def test_line_break_tokens_are_all_that_decode_to_lf_or_cr() -> None:
    assert Tokenizer.bytes().line_break_ids == [10, 13]
    tokenizer = Tokenizer.train_bpe(["\n\n\r\n\r\n\x0b\x0b\u2028\u2028" * 5] * 5, 280)
    found = tokenizer.line_break_ids
    expected = [i for i in range(tokenizer.pad_id) if set(tokenizer.decode([i])) & {"\n", "\r"}]
    assert found == expected
    assert len(found) > 2  # merged ones too


@pytest.mark.parametrize("exact", [True, False], ids=["bytes", "words"])
def test_a_text_goes_on_with_no_special_token_but_its_end(exact: bool) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "\n": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer = Tokenizer.bytes() if exact else Tokenizer(words, "file")
    assert tokenizer.is_exact is exact
    units: list[Unit] = ["line", "paragraph", "file", "window"]
    for unit in units:
        allowed = set(np.flatnonzero(tokenizer.constraint(unit).allowed_SV[0]).tolist())
        if exact:  # those that begin no character of UTF-8 aside
            expected = {*range(0x80), *range(0xC2, 0xF5), tokenizer.eos_id}
        else:
            expected = {0, 1, 2, tokenizer.eos_id}
        assert allowed == (expected - set(tokenizer.line_break_ids) if unit == "line" else expected), unit
        assert tokenizer.constraint(unit) is tokenizer.constraint(unit), "it is made once"


def test_training_is_deterministic_and_keeps_to_the_size() -> None:
    texts = [f"number {i} of {i * i}" for i in range(2000)]
    first, second = Tokenizer.train_bpe(texts, 400), Tokenizer.train_bpe(iter(texts), 400)
    assert first.to_json() == second.to_json()
    assert first.num_tokens == 403
    assert Tokenizer.train_bpe([], 400).num_tokens == 259


def test_training_on_one_endless_word_ends() -> None:
    """The library takes time quadratic in the length of a word: minutes for this one, were it not cut."""
    dna = "".join(random.Random(0).choices("ACGT", k=300_000))
    assert Tokenizer.train_bpe([dna], 300).num_tokens == 303


def test_an_error_of_the_corpus_passes_through_training() -> None:
    def texts() -> Iterator[str]:
        yield "a"
        raise DataError("line 2 is broken")

    with pytest.raises(DataError, match="line 2 is broken"):
        Tokenizer.train_bpe(texts(), 300)


def test_a_lone_surrogate_is_bad_input_not_a_crash() -> None:
    """An argument of the shell that is not UTF-8 arrives with one."""
    with pytest.raises(DataError, match=r"lone surrogate U\+DCFF"):
        Tokenizer.bytes().encode_batch(["fine", "caf\udcff"])


def edited(tokenizer: Tokenizer, edit: Callable[[dict[str, Any]], object]) -> str:
    parts = json.loads(tokenizer.to_json())
    edit(parts)
    return json.dumps(parts)


def panicking(tokenizer: Tokenizer) -> str:
    return edited(tokenizer, lambda parts: parts["model"].update(continuing_subword_prefix="#" * 11))


def test_a_panic_of_the_library_is_an_ordinary_error(bpe: Tokenizer, tmp_path: Path) -> None:
    """PanicException is a BaseException, which `except Exception` misses."""
    with pytest.raises(BaseException) as panic:
        tokenizers.Tokenizer.from_str(panicking(bpe))
    assert not isinstance(panic.value, Exception)
    with pytest.raises(CheckpointError, match="tokenizer is malformed"):
        Tokenizer.from_json(panicking(bpe))
    path = tmp_path / "tokenizer.json"
    path.write_text(panicking(bpe))
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer.from_file(path)


class TimeIsUpError(Exception):
    """As a worker's time limit is raised, in a signal's handler."""


@pytest.mark.parametrize("raised", [TimeIsUpError, TimeoutError, KeyboardInterrupt, MemoryError])
def test_what_is_raised_meanwhile_is_no_error_of_the_library(bpe: Tokenizer, raised: type[BaseException]) -> None:
    def interrupt(*_: object) -> None:
        raise raised("now")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(raised, match="now"):
            while True:
                bpe.encode_batch(["some words of a long text " * 100] * 20)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        ("decoder", None),
    ],
)
def test_only_bytes_give_every_text_back(bpe: Tokenizer, part: str, value: object) -> None:
    """Byte by byte, changing nothing before: each of these does change or drop something."""
    assert bpe.is_exact
    assert Tokenizer.bytes().is_exact
    assert not Tokenizer.from_json(edited(bpe, lambda parts: parts.update({part: value}))).is_exact
    without_a_byte = {"a": 0, "b": 1}
    lossy = Tokenizer.from_json(edited(bpe, lambda parts: parts["model"].update(vocab=without_a_byte, merges=[])))
    assert not lossy.is_exact
    assert lossy.decode(lossy.encode_batch(["abc"])[0]) == "ab"


@pytest.mark.parametrize(("added", "exact"), [("<|end|>", True), ("日本", True), ("naïve", False), ("Ġx", False)])
def test_a_token_that_was_added_comes_back_or_the_tokenizer_is_not_exact(
    bpe: Tokenizer, added: str, exact: bool
) -> None:
    """The library writes it as it is, and decodes it as if its characters stood for bytes."""
    library = tokenizers.Tokenizer.from_str(bpe.to_json())
    library.add_tokens([added])
    tokenizer = Tokenizer.from_json(library.to_str())
    assert tokenizer.is_exact == exact
    assert (tokenizer.decode(tokenizer.encode_batch([added])[0]) == added) == exact


def test_a_panic_while_encoding_is_bad_input(bpe: Tokenizer) -> None:
    pre_tokenizer = {"type": "FixedLength", "length": 0}
    tokenizer = Tokenizer.from_json(edited(bpe, lambda parts: parts.update(pre_tokenizer=pre_tokenizer)))
    with pytest.raises(DataError, match="cannot encode a text"):
        tokenizer.encode_batch(["text"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_taken_for_a_bad_tokenizer(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: str) -> object:
        raise error

    monkeypatch.setattr(json, "loads", interrupted)
    with pytest.raises(error):
        Tokenizer.from_json("{}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"model": []}',
        '{"model": {"type": "BPE"}}',
        "[" * 100_000,
        "\ud800",
        '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 18446744073709551616}, "merges": []}}',
        '{"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}}',
    ],
)
def test_a_malformed_tokenizer_is_a_checkpoint_error_of_one_line(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_json(text)
    assert len(caught.value.message.splitlines()) == 1
    assert len(caught.value.message) < 300


def test_a_table_of_normal_forms_may_not_make_a_text_much_longer(bpe: Tokenizer) -> None:
    """That of a SentencePiece model has at most 18 characters for one. A thousand, three times over, would make
    gigabytes of a letter."""
    assert _MOST_GROWTH >= 18
    for length, refused in ((18, False), (1000, True)):
        table = struct.pack("<I", 4) + bytes(4) + b"x\0" + b"a" * length + b"\0"
        normalizer = {"type": "Precompiled", "precompiled_charsmap": b64encode(table).decode()}
        assert _growth(normalizer) == length
        if refused:
            parts = json.loads(bpe.to_json()) | {"normalizer": normalizer}
            with pytest.raises(CheckpointError, match=r"normalizer can make a text 1e\+03 times as long"):
                Tokenizer.from_json(json.dumps(parts))


def test_tokens_are_not_endless(bpe: Tokenizer) -> None:
    """One of a million letters took a minute to load, and as many bytes of every text that it is drawn for."""

    def added(length: int) -> str:
        return edited(bpe, lambda parts: parts["model"]["vocab"].update({"a" * length: 10_000}))

    Tokenizer.from_json(added(4096))
    with pytest.raises(CheckpointError, match="a token is 4,097 characters long"):
        Tokenizer.from_json(added(4097))


def test_mutated_tokenizers_load_or_are_refused(bpe: Tokenizer) -> None:
    draw, original = random.Random(1), bpe.to_json()
    for _ in range(200):
        chars = list(original)
        for _ in range(draw.randint(1, 4)):
            chars[draw.randrange(len(chars))] = draw.choice('{}[]",:09azé\0')
        try:
            tokenizer = Tokenizer.from_json("".join(chars))
            tokenizer.decode(tokenizer.encode_batch(["the cat"])[0])
        except (CheckpointError, DataError):
            pass


def save_word_tokenizer(path: Path) -> None:
    """A user's tokenizer as others make them: words, specials, a gap in the ids, padding, truncation, a template."""
    vocab = {"[UNK]": 0, "C": 1, "O": 2, "N": 9}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 10), ("</s>", 11)]
    )
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))


def test_a_users_tokenizer_neither_cuts_nor_pads_nor_adds(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "words.json")
    tokenizer = Tokenizer.from_file(tmp_path / "words.json")
    assert tokenizer.kind == "file"
    assert tokenizer.encode_batch(["C O N C O N", "N"]) == [[1, 2, 9, 1, 2, 9], [9]]
    vocab = json.loads(tokenizer.to_json())["added_tokens"]
    assert tokenizer.pad_id == 10  # behind N, the last
    assert tokenizer.decode([1, 7, 2]) == "C O"  # 7 is in the gap
    assert tokenizer.encode_batch(["<s>"])[0] == [next(t["id"] for t in vocab if t["content"] == "<s>")]
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode_batch(["C O N"]) == tokenizer.encode_batch(["C O N"])
    assert again.kind == "file"


def test_a_users_bpe_encodes_without_its_dropout(bpe: Tokenizer, tmp_path: Path) -> None:
    """BPE dropout would give one text other tokens each time."""
    path = tmp_path / "tokenizer.json"
    path.write_text(edited(bpe, lambda parts: parts["model"].update(dropout=0.5)))
    text = ["the cat sat on the mat"]
    assert all(Tokenizer.from_file(path).encode_batch(text) == bpe.encode_batch(text) for _ in range(20))


def test_a_tokenizer_file_that_is_missing_or_binary_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*none\.json: No such file"):
        Tokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="it is not UTF-8"):
        Tokenizer.from_file(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("length", "texts", "kind", "why"),
    [
        (100, 0, "bytes", "0 kB of text is too little"),
        (100, 1_999, "bytes", "200 kB of text is too little"),
        (100, 2_000, "bpe", "16 times or more in 200 kB of text"),
        (15, 40_000, "bytes", "the texts are short, 15 bytes on average"),
        (16, 40_000, "bpe", "16 times or more in 640 kB of text"),
        (1_000, 3_400, "bpe", "16 times or more in 3.4 MB of text"),
    ],
)
def test_the_automatic_tokenizer_by_size_and_length_of_texts(length: int, texts: int, kind: str, why: str) -> None:
    chosen, reason = automatic_tokenizer(["é" * (length // 2) + "x" * (length % 2)] * texts)
    assert chosen == kind
    assert why in reason


def test_a_bpe_without_a_size_has_the_tokens_that_occur_often() -> None:
    """Against counts of words of one token each, which nothing is left over from."""
    words = {chr(ord("a") + i) + chr(ord("A") + j): 20 - 4 * i for i in range(6) for j in range(20)}
    texts = [word for word, count in words.items() for _ in range(count)]
    vocab = {word for word, count in words.items() if count >= 16}
    tokenizer = Tokenizer.train_bpe(texts)
    assert {word for word in words if len(tokenizer.encode_batch([word])[0]) == 1} == vocab
    assert tokenizer.num_tokens == 256 + len(vocab) + 3


def test_a_bpe_without_a_size_has_8000_tokens_at_most() -> None:
    letters = [chr(0x4E00 + i) for i in range(5_000)]  # three bytes each, so two merges
    texts = [letters[i] + letters[j] for i in range(5_000) for j in (i - 1, i - 2)] * 16
    assert Tokenizer.train_bpe(texts).num_tokens == 8_000 + 3


# Long texts -----------------------------------------------------------------------------------------------------------

LONG = {
    "words": " ".join(["the cat sat on the mat, the dog too"] * 6000),
    "lines": "café 中文\n" * 20_000,
    "one word": "the" * 60_000,
    "wide": "😀中é" * 40_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_text_comes_back_exactly_and_in_small_pieces(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(pieces(text)) == text
    assert all(len(piece) <= 2**16 for piece in pieces(text))
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_limit_gives_the_first_tokens_of_the_whole(tokenizer: Tokenizer, text: str) -> None:
    """Or a cut text would be encoded in another way than it was trained on."""
    whole = tokenizer.encode_batch([text])[0]
    for longest in (1, 24, 20_000, 70_000, len(whole), len(whole) + 1):
        found = tokenizer.encode_batch(["a", text, "the cat"], longest=longest)
        assert found[1] == whole[:longest]
        assert (found[0], found[2]) == tuple(ids[:longest] for ids in tokenizer.encode_batch(["a", "the cat"]))


@pytest.mark.parametrize("name", ["words", "lines"])
def test_pieces_between_words_and_lines_change_no_token(bpe: Tokenizer, name: str) -> None:
    """Against the library on the whole text."""
    library = tokenizers.Tokenizer.from_str(bpe.to_json())
    assert bpe.encode_batch([LONG[name]])[0] == library.encode(LONG[name], add_special_tokens=False).ids


def test_only_what_the_limit_needs_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = Tokenizer._encode

    def counted(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        seen.extend(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "_encode", counted)
    assert Tokenizer.bytes().encode_batch(["a" * 10**7], longest=100) == [[97] * 100]
    assert seen == [2**16]
