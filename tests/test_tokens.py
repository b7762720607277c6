"""Tokens in bulk: the library's tokens, sooner, and rows that come back from files whatever is asked for first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from gptvae_cli.tokenizer import Tokenizer
from gptvae_cli.tokens import BulkTokenizer, TokenStore, TokenWriter, tokenized, tokenizer_pool

SENTENCES = [
    "the cat sat on the mat",
    "it's the dog's bone, isn't it?",
    "  two  spaces  ",
    "x = 1\n\treturn x\n",
    "1234 567",
]
# Letters, digits, signs, marks, what is white, and what only some libraries take for white.
ALPHABET = "aZé你\u0301'sdt1٣!-_ \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u180e\u2003\u2028\u200b\u3000\ufeff😀"


def random_texts(count: int) -> list[str]:
    random = np.random.default_rng(0)
    texts = []
    for _ in range(count):
        # Spaces come often, or a text would hardly have words.
        weights = random.dirichlet(np.full(len(ALPHABET), 0.3)) * 0.7
        weights[ALPHABET.index(" ")] += 0.3
        texts.append("".join(random.choice(list(ALPHABET), random.integers(0, 40), p=weights / weights.sum())))
    return texts


def as_lists(found: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    tokens, lengths = found
    assert lengths.sum() == len(tokens)
    return [piece.tolist() for piece in np.split(tokens, np.cumsum(lengths)[:-1])] if len(lengths) else []


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """With merges of spaces, tabs and line breaks, which a word must not cut."""
    return Tokenizer.train_bpe([*SENTENCES * 20, *random_texts(3000)], 600)


@pytest.fixture
def user_file(bpe: Tokenizer, tmp_path: Path) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(bpe.to_json(), "utf-8")
    return Tokenizer.from_file(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", ["bpe", "bytes", "file"])
def test_bulk_gives_the_tokens_of_the_library(bpe: Tokenizer, user_file: Tokenizer, kind: str) -> None:
    tokenizer = {"bpe": bpe, "bytes": Tokenizer.bytes(), "file": user_file}[kind]
    assert tokenizer.kind == kind
    bulk = BulkTokenizer(tokenizer)
    texts = [*SENTENCES, "", *random_texts(3000), ""]
    expected = tokenizer.encode_batch(texts)
    assert as_lists(bulk(texts)) == expected
    assert as_lists(bulk(texts)) == expected, "and when every word has come before"
    assert as_lists(bulk([])) == []
    assert as_lists(bulk(["", ""])) == [[], []]


@pytest.mark.parametrize("limit", ["_MOST_WORDS", "_MOST_TOKENS"])
def test_words_that_are_forgotten_are_learnt_again(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Or a corpus without spaces would be remembered whole."""
    monkeypatch.setattr(f"gptvae_cli.tokens.{limit}", 20)
    bulk = BulkTokenizer(bpe)
    for text in SENTENCES * 3:
        assert as_lists(bulk([text])) == bpe.encode_batch([text])
        assert len(bulk.known) < 40


def test_a_word_goes_to_the_library_once(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    library = bpe.encode_batch

    def encode_batch(texts: Sequence[str], *, longest: int | None = None) -> list[list[int]]:
        asked.extend(texts)
        return library(texts, longest=longest)

    monkeypatch.setattr(bpe, "encode_batch", encode_batch)
    bulk = BulkTokenizer(bpe)
    bulk(["to be or not to be", "to be"])
    bulk(["not to be"])
    assert sorted(asked) == sorted(["to", " be", " or", " not", " to", "not"])


def test_a_process_of_a_pool_makes_the_same_tokens() -> None:
    tokenizer = Tokenizer.bytes()
    texts = ["first", "second", "x" * 1000]
    with tokenizer_pool(tokenizer, 1) as pool:
        for found, expected in zip(
            pool.submit(tokenized, texts).result(), BulkTokenizer(tokenizer)(texts), strict=True
        ):
            assert np.array_equal(found, expected)


def test_a_process_of_a_pool_runs_nothing_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a stranger's corpus."""
    for name in ("multiprocessing", "tokenizers", "json"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    with tokenizer_pool(Tokenizer.bytes(), 1) as pool:
        tokens, _ = pool.submit(tokenized, ["a text"]).result()
    assert tokens.tolist() == [*b"a text"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("num_tokens", [300, 70_000])
def test_rows_come_back_in_any_order(tmp_path: Path, num_tokens: int) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(0, num_tokens, length).tolist() for length in [0, 5, 1, 0, 300, 2, 0]]
    writer = TokenWriter(tmp_path, "train", num_tokens)
    writer.append(np.array([t for row in rows[:4] for t in row], np.uint32), np.array([len(row) for row in rows[:4]]))
    writer.append(np.zeros(0, np.uint32), np.zeros(0, np.int64))
    writer.append(np.array([t for row in rows[4:] for t in row], np.uint32), np.array([len(row) for row in rows[4:]]))
    assert (writer.rows, writer.count) == (7, 308)
    writer.close()
    store = TokenStore(tmp_path, "train")
    assert (len(store), store.count) == (7, 308)
    index = np.array([4, 0, 6, 5, 4, 1])
    assert as_lists((store.read(*store.spans(index)), store.spans(index)[1])) == [rows[i] for i in index]
    assert store.read(np.array([2]), np.array([3])).tolist() == rows[1][2:]
    assert len(store.read(*store.spans(np.zeros(0, np.int64)))) == 0


def test_the_last_row_can_be_taken_back(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, "train", 300)
    writer.append(np.array([1, 2, 3, 4], np.uint16), np.array([1, 3]))
    assert writer.pop().tolist() == [2, 3, 4]
    writer.append(np.array([7], np.uint16), np.array([1]))
    writer.close()
    store = TokenStore(tmp_path, "train")
    assert as_lists((store.read(*store.spans(np.arange(2))), np.array([1, 1]))) == [[1], [7]]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_the_tail_of_a_row_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """And both rows go on behind it."""
    monkeypatch.setattr("gptvae_cli.tokens._TOKENS_AT_ONCE", 3)
    one, other = (TokenWriter(tmp_path, name, 300) for name in ("one", "other"))
    one.append(np.array([9], np.uint16), np.array([1]))
    one.extend(np.arange(3, dtype=np.uint16))
    one.extend(np.arange(3, 7, dtype=np.uint16))
    other.extend(np.array([8], np.uint16))
    one.move_tail(count, other)
    for writer in (one, other):
        writer.extend(np.array([10 + writer.count], np.uint16))
        writer.end_row()
        writer.close()
    expected = {"one": [[9], [*range(7 - count), 18 - count]], "other": [[8, *range(7 - count, 7), 11 + count]]}
    for name, rows in expected.items():
        store = TokenStore(tmp_path, name)
        assert (
            as_lists((store.read(*store.spans(np.arange(len(store)))), store.spans(np.arange(len(store)))[1])) == rows
        )


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8])
def test_lengths_come_in_pieces_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("gptvae_cli.tokens._OFFSETS_AT_ONCE", 3)
    writer = TokenWriter(tmp_path, "train", 300)
    writer.append(np.zeros(sum(range(count)), np.uint16), np.arange(count))
    writer.close()
    pieces = [piece.tolist() for piece in TokenStore(tmp_path, "train").lengths()]
    assert list(chain.from_iterable(pieces)) == list(range(count))
    assert all(len(piece) <= 3 for piece in pieces)


def test_a_store_that_is_gone_leaves_no_file_open(tmp_path: Path) -> None:
    """Neither does one that could not be opened."""
    TokenWriter(tmp_path, "train", 300).close()
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    store = TokenStore(tmp_path, "train")
    del store
    (tmp_path / "train.tokens").write_bytes(b"odd")
    with pytest.raises(ValueError, match="0 tokens in 3 bytes"):
        TokenStore(tmp_path, "train")
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208
