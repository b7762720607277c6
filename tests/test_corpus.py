"""Corpora as tokens: what is kept, what is held out, and when tokens are used again."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import tokenizers

from gptvae_cli.config import DataConfig, ModelConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import Epoch, Rows
from gptvae_cli.errors import CheckpointError, ConfigError, DataError, ExitCode, GPTVAEError
from gptvae_cli.ingest import _spread, corpus_digest
from gptvae_cli.tokenizer import Tokenizer
from gptvae_cli.tokens import Ints, TokenStore

PAD, BOS, EOS = 256, 257, 258  # of the bytes tokenizer
LINES = [f"{'abcdefghij' * 3}"[: 1 + i % 23] + str(i) for i in range(400)]


def build(folder: Path, text: str | bytes, *, on_progress: Callable[[int], None] | None = None, **data: Any) -> Corpus:
    """The corpus of a text file in bytes, with its cache in `folder/cache`."""
    path = folder / "corpus.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    config = DataConfig(**{"tokenizer": "bytes", **data})
    return Corpus.build([str(path)], config, folder / "cache", on_progress=on_progress)


def contents(corpus: Corpus, store: TokenStore | None) -> list[str]:
    assert store is not None
    starts_N, lengths_N = store.spans(np.arange(len(store)))
    pieces = np.split(store.read(starts_N, lengths_N), np.cumsum(lengths_N)[:-1])
    return [corpus.tokenizer.decode(piece.tolist()) for piece in pieces[: len(store)]]


def lengths_of(store: TokenStore) -> Ints:
    return np.concatenate(list(store.lengths()))


def shape(**changes: Any) -> ModelConfig:
    fields = {"dim": 32, "depth": 1, "enc_depth": 1, "max_seq_len": 32, "dim_latent": 4, "heads": 2}
    specials = {"num_tokens": 259, "pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "conditioning": "token"}
    return ModelConfig(**{**fields, **specials, **changes})


def rows_of(corpus: Corpus, **changes: int) -> Rows:
    return Rows(corpus.train, shape(**changes), window=False, source=corpus.train_source)


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", None), ("bpe", 300)])
def test_a_corpus_comes_back_from_its_cache(tmp_path: Path, tokenizer: str, size: int | None) -> None:
    lines = ["plain", "Füße 走る", "\t tab and spaces ", "a", "\x00 nul", *LINES]
    built = build(tmp_path, "\n".join(lines), tokenizer=tokenizer, vocab_size=size)
    opened = Corpus.open(tmp_path / "cache")
    for corpus in (built, opened):
        kept, held_out = contents(corpus, corpus.train), contents(corpus, corpus.valid)
        assert Counter(kept + held_out) == Counter(lines)
        assert kept == [line for line in lines if line not in held_out], "the order of the corpus is kept"
        assert (len(corpus.train), len(corpus.valid)) == (len(kept), len(held_out))
        assert lengths_of(corpus.train).tolist() == [len(ids) for ids in corpus.tokenizer.encode_batch(kept)]
    assert opened.facts == built.facts
    assert built.facts.texts == len(lines)
    assert built.facts.characters == sum(map(len, lines))
    assert built.tokenizer.kind == tokenizer


def test_a_text_that_makes_up_half_of_a_corpus_is_not_held_out(tmp_path: Path) -> None:
    """Nor are the others, by which hash there may be; equal texts stay together."""
    for word in ("same", "samesame", "again", "another", "x", "yes"):
        lines = [word] * 1000 + [f"text {i}" for i in range(1000)]
        corpus = build(tmp_path, "\n".join(lines))
        held_out = contents(corpus, corpus.valid)
        assert word not in held_out
        assert 50 <= len(held_out) <= 200, "of 2,000"


@pytest.mark.parametrize("count", [10, 15, 25, 40])
def test_of_a_few_texts_one_that_is_held_out_is_not_trained_on(tmp_path: Path, count: int) -> None:
    corpus = build(tmp_path, "\n".join(["twice", "twice", *(f"text {i}" for i in range(count - 2))]))
    kept, held_out = contents(corpus, corpus.train), contents(corpus, corpus.valid)
    assert 1 <= len(held_out) <= 4
    assert not set(kept) & set(held_out)


def test_what_is_held_out_of_many_depends_on_each_text_alone(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(3000)]
    corpus = build(tmp_path, "\n".join(texts))
    shares = [int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "big") / 2**64 for t in texts]
    assert contents(corpus, corpus.valid) == [t for t, share in zip(texts, shares, strict=True) if share < 0.05]


def test_a_size_of_the_vocabulary_asks_for_a_bpe(tmp_path: Path) -> None:
    """However small the corpus is; bytes, which it would get by itself, have no vocabulary to choose."""
    small = build(tmp_path, "\n".join(LINES), tokenizer="auto")
    assert small.tokenizer.kind == "bytes"
    sized = build(tmp_path, "\n".join(LINES), tokenizer="auto", vocab_size=300)
    assert (sized.tokenizer.kind, sized.facts.tokenizer_reason) == ("bpe", "a size of the vocabulary was asked for")
    few = build(tmp_path, "\n".join(["ab"] * 50), tokenizer="auto", vocab_size=300)
    assert few.tokenizer.num_tokens == 257 + 3, "a, b and ab, and there is no more to learn"
    assert few.facts.tokenizer_reason == "a size of the vocabulary was asked for; of 300 it has only 257"


def test_a_bpe_that_is_asked_for_learns_tokens_of_a_small_corpus_too(tmp_path: Path) -> None:
    built = build(tmp_path, "\n".join(LINES), tokenizer="bpe")
    assert built.tokenizer.kind == "bpe"
    assert built.tokenizer.num_tokens > 259


def test_more_than_65536_tokens_are_stored_without_wrapping_round(tmp_path: Path) -> None:
    """The cache is of two bytes a token where that is enough and of four where it is not."""
    vocab = {f"w{i}": i for i in range(70_000)}
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    corpus = build(tmp_path, "w69999 w1\nw65536 w65535\nw2", tokenizer=str(tmp_path / "words.json"), valid="0.001")
    assert corpus.tokenizer.num_tokens == 70_003
    found = [store.read(np.array([0]), np.array([store.count])).tolist() for store in (corpus.train, corpus.valid)]
    assert found == [[69999, 1, 65536, 65535], [2]]


@pytest.mark.parametrize("name", ["train.tokens", "train.offsets", "valid.offsets", "tokenizer.json", "corpus.json"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "half"])
def test_a_damaged_cache_is_an_error_and_not_other_tokens(tmp_path: Path, name: str, damage: str) -> None:
    """Half of a file of two-byte tokens must not pass for one of another width."""
    build(tmp_path, "\n".join(LINES))
    path = tmp_path / "cache" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: {"empty": 0, "cut": len(content) - 2, "half": len(content) // 2}[damage]])
    with pytest.raises(CheckpointError, match="cache is missing, damaged or of another version") as caught:
        Corpus.open(tmp_path / "cache")
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert "--force" in str(caught.value.hint)


def test_what_macos_leaves_beside_tokens_is_no_damage(tmp_path: Path) -> None:
    built = build(tmp_path, "\n".join(LINES))
    for name in (".DS_Store", "._train.tokens", "._corpus.json"):
        (tmp_path / "cache" / name).write_bytes(bytes(10))
    opened = Corpus.open(tmp_path / "cache")
    assert contents(opened, opened.train) == contents(built, built.train)


@pytest.mark.parametrize(("fact", "value"), [("texts", "| x"), ("characters", None), ("digest", 3), ("empty", True)])
def test_a_fact_of_another_type_is_an_error_at_once(tmp_path: Path, fact: str, value: object) -> None:
    """It may be a stranger's, and would fail in a sentence of the run."""
    build(tmp_path, "a\nb\nc\nd\n")
    facts = tmp_path / "cache/corpus.json"
    content = json.loads(facts.read_text())
    content["facts"][fact] = value
    facts.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cache is missing, damaged"):
        Corpus.open(tmp_path / "cache")


def test_a_cache_of_pairs_leaves_nothing_to_a_corpus_without_pairs(tmp_path: Path) -> None:
    """Its sources would otherwise be read as those of the new corpus."""
    (tmp_path / "others").write_text("\n".join(LINES))
    assert build(tmp_path, "\n".join(LINES), latents_from=str(tmp_path / "others")).train_source is not None
    assert build(tmp_path, "\n".join(LINES)).train_source is None


def test_empty_texts_are_dropped_and_counted(tmp_path: Path) -> None:
    corpus = build(tmp_path, "\n\na\n\nb\n\nc\n\n")
    assert sorted(contents(corpus, corpus.train) + contents(corpus, corpus.valid)) == ["a", "b", "c"]
    assert (corpus.facts.texts, corpus.facts.empty) == (3, 5), "what follows the last line break is no text"


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "0 non-empty"), ("\n\n\n", "0 non-empty"), ("one", "1 non-empty"), ("one\ntwo\n", "2 non-empty")],
    ids=["empty-file", "empty-lines", "one-text", "two-texts"],
)
def test_too_few_texts_are_an_error_that_tells_what_a_text_is(tmp_path: Path, text: str, found: str) -> None:
    """Two to train on and one to hold out are the least."""
    with pytest.raises(DataError, match=found) as caught:
        build(tmp_path, text)
    assert "a text is a line here" in str(caught.value.hint)
    assert caught.value.exit_code == ExitCode.BAD_INPUT


def test_a_share_that_leaves_nothing_to_train_on_is_told(tmp_path: Path) -> None:
    """A text is held out by its hash, and so with all that are equal to it."""
    with pytest.raises(
        DataError, match=r"200 of the 200 texts of .* are held out, need at least two to train on"
    ) as caught:
        build(tmp_path, "line\n" * 200, valid="0.5")
    assert caught.value.hint == "a smaller --valid; equal texts are held out together"


def test_three_texts_are_enough(tmp_path: Path) -> None:
    corpus = build(tmp_path, "one\ntwo\nthree\n")
    assert (len(corpus.train), len(corpus.valid)) == (2, 1)
    assert sorted(contents(corpus, corpus.train) + contents(corpus, corpus.valid)) == ["one", "three", "two"]


@pytest.mark.parametrize("unit", ["paragraph", "file"])
def test_units_decide_what_is_one_text(tmp_path: Path, unit: str) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"first {i}\n\nsecond\nof {i}\n")
    config = DataConfig(unit=unit, tokenizer="bytes", valid="0.2")  # type: ignore[arg-type]
    corpus = Corpus.build([str(folder)], config, tmp_path / "cache")
    found = sorted(contents(corpus, corpus.train) + contents(corpus, corpus.valid))
    halves = [f"first {i}" for i in range(6)] + [f"second\nof {i}" for i in range(6)]
    assert found == (halves if unit == "paragraph" else [f"first {i}\n\nsecond\nof {i}" for i in range(6)])


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sends a text to standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_standard_input_is_a_corpus(tmp_path: Path, pipe: Callable[[str], None]) -> None:
    pipe("\n".join(LINES))
    corpus = Corpus.build([], DataConfig(tokenizer="bytes"), tmp_path)
    assert corpus.facts.texts == len(LINES)
    assert corpus.facts.digest == build(tmp_path, "\n".join(LINES)).facts.digest


def test_progress_is_told_in_characters(tmp_path: Path) -> None:
    seen: list[int] = []
    build(tmp_path, "\n".join(LINES), on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(map(len, LINES))


def test_a_corpus_larger_than_a_piece_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at the seams of the pieces, nor between the sample that the tokenizer learns from and the rest."""
    monkeypatch.setattr("gptvae_cli.ingest._PIECE_CHARS", 100)
    monkeypatch.setattr("gptvae_cli.corpus._BEGINNING_CHARS", 1000)
    corpus = build(tmp_path, "\n".join(LINES))
    assert Counter(contents(corpus, corpus.train) + contents(corpus, corpus.valid)) == Counter(LINES)


def test_the_tokenizer_learns_from_all_of_a_sorted_corpus_that_is_larger_than_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Callable[[str], None]
) -> None:
    """A word of the last third is one token; through a pipe, whose beginning is all that can be kept, it is not."""
    for name in ("ingest.SAMPLE_CHARS", "corpus.SAMPLE_CHARS", "corpus._BEGINNING_CHARS"):
        monkeypatch.setattr(f"gptvae_cli.{name}", 20_000)
    lines = [f"{word} {i}" for word in ("antelope", "buffalo", "crocodile") for i in range(1000)]
    text = "\n".join(lines)
    spread = build(tmp_path, text, tokenizer="bpe")
    assert spread.facts.texts == len(lines)
    assert [len(spread.tokenizer.encode_batch([word])[0]) for word in ("antelope", "crocodile")] == [1, 1]
    pipe(text)
    piped = Corpus.build([], DataConfig(tokenizer="bpe"), tmp_path / "piped")
    assert len(piped.tokenizer.encode_batch(["antelope"])[0]) == 1 < len(piped.tokenizer.encode_batch(["crocodile"])[0])
    assert piped.facts.texts == len(lines)


@pytest.mark.parametrize("characters", [17, 100, 1000, 10**6])
def test_a_spread_sample_is_every_nth_text(characters: int) -> None:
    texts = [f"{i:04}" for i in range(1000)]
    sample = _spread(iter(texts), characters)
    # One counts its 4 characters and 16 more.
    every = next(n for n in (2**i for i in range(11)) if 20 * math.ceil(1000 / n) <= characters or n > 1000)
    assert sample == texts[::every]


def test_processes_write_the_very_cache_that_one_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the corpus, pairs and held-out texts included; a BPE, and a tokenizer of a user's own."""
    lines = [f"{i} times {'the same words again' if i % 3 else 'others'}" for i in range(3000)]
    (tmp_path / "sources.txt").write_text("\n".join(line[::-1] for line in lines))
    Tokenizer.train_bpe(lines, 300)._tokenizer.save(str(tmp_path / "own.json"))
    monkeypatch.setattr("gptvae_cli.ingest._PIECE_CHARS", 4000)
    written: dict[tuple[str, int], dict[str, bytes]] = {}
    for processes in (1, 2):
        monkeypatch.setattr("gptvae_cli.machine.processors", lambda count=processes: count)
        for tokenizer, start in (("bpe", 5000), (str(tmp_path / "own.json"), 0)):
            monkeypatch.setattr("gptvae_cli.ingest._POOL_CHARS", start)
            build(tmp_path, "\n".join(lines), tokenizer=tokenizer, latents_from=str(tmp_path / "sources.txt"))
            files = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
            written[tokenizer, processes] = {name: files[name] for name in files if name != "corpus.json"}
    for tokenizer in ("bpe", str(tmp_path / "own.json")):
        assert len(written[tokenizer, 1]) == 9
        assert written[tokenizer, 1] == written[tokenizer, 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_running_texts_are_the_tokens_of_each_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Whatever they are read in, with the tail of each held out, and some of the tails longer than what is moved."""
    texts = ["".join(f"{i} of {name}\n" for i in range(count)) for name, count in (("one", 30_000), ("two", 9_000))]
    files = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    monkeypatch.setattr("gptvae_cli.ingest._PIECE_CHARS", 2**17)
    monkeypatch.setattr("gptvae_cli.ingest._POOL_CHARS", 2**18)
    monkeypatch.setattr("gptvae_cli.tokens._TOKENS_AT_ONCE", 1000)
    monkeypatch.setattr("gptvae_cli.machine.processors", lambda: processes)
    config = DataConfig(tokenizer="bpe", unit="window", valid="0.1")
    corpus = Corpus.build(list(map(str, files)), config, tmp_path / "cache")
    tokens = corpus.tokenizer.encode_batch(["\n\n", *(text.removesuffix("\n") for text in texts)])
    held_out = [round(0.1 * len(ids)) for ids in tokens]
    for store, ends in (
        (corpus.train, [slice(-n) for n in held_out]),
        (corpus.valid, [slice(-n, None) for n in held_out]),
    ):
        found = store.read(np.array([0]), np.array([store.count])).tolist()
        assert found == [*tokens[1][ends[1]], *tokens[0], *tokens[2][ends[2]]]
    assert (corpus.facts.texts, corpus.facts.characters) == (2, sum(map(len, texts)) - 2)
    assert corpus.facts.digest == corpus_digest(list(map(str, files)), config)


def test_a_running_text_may_have_no_tokens(tmp_path: Path) -> None:
    """By a tokenizer of a user's own, which drops what is between words."""
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(tmp_path / "own.json"))
    for name, text in (("1.txt", "   "), ("2.txt", "a a a a"), ("3.txt", "  "), ("4.txt", "b b")):
        (tmp_path / name).write_text(text)
    config = DataConfig(unit="window", tokenizer=str(tmp_path / "own.json"), valid="0.5")
    corpus = Corpus.build([str(tmp_path / "*.txt")], config, tmp_path / "cache")
    tokens = [store.read(np.array([0]), np.array([store.count])).tolist() for store in (corpus.train, corpus.valid)]
    assert tokens == [[1, 1, 2], [1, 1, 2]]


def be_killed(texts: Sequence[str], longest: int | None = None) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_was_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptvae_cli.machine.processors", lambda: 2)
    monkeypatch.setattr("gptvae_cli.ingest._POOL_CHARS", 0)
    monkeypatch.setattr("gptvae_cli.ingest._PIECE_CHARS", 100)
    monkeypatch.setattr("gptvae_cli.ingest.tokenized", be_killed)
    with pytest.raises(GPTVAEError, match="was killed"):
        build(tmp_path, "\n".join(LINES), tokenizer="bpe")


def test_a_corpus_may_come_through_a_named_pipe(tmp_path: Path) -> None:
    """Of which nothing is lost by looking at what it is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "".join(f"{line}\n" for line in LINES)
    writer = threading.Thread(target=lambda: pipe.write_text(text))
    writer.start()
    corpus = Corpus.build([str(pipe)], DataConfig(tokenizer="bytes"), tmp_path / "cache")
    writer.join()
    assert corpus.facts.texts == len(LINES)
    assert corpus.fingerprint is None


# Using a cache again --------------------------------------------------------------------------------------------------


def recalled(folder: Path, **data: Any) -> Corpus | None:
    return Corpus.recall(folder / "cache", [str(folder / "corpus.txt")], DataConfig(**{"tokenizer": "bytes", **data}))


def test_a_corpus_that_did_not_change_is_recalled(tmp_path: Path) -> None:
    built = build(tmp_path, "\n".join(LINES), tokenizer="bpe", vocab_size=300)
    again = recalled(tmp_path, tokenizer="bpe", vocab_size=300)
    assert again is not None
    assert again.facts == built.facts
    assert again.tokenizer.to_json() == built.tokenizer.to_json()
    assert contents(again, again.train) == contents(built, built.train)
    assert contents(again, again.valid) == contents(built, built.valid)


def test_a_file_that_was_moved_is_recalled(tmp_path: Path) -> None:
    build(tmp_path, "\n".join(LINES))
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "corpus.txt").rename(tmp_path / "elsewhere" / "corpus.txt")
    assert Corpus.recall(tmp_path / "cache", [str(moved)], DataConfig(tokenizer="bytes")) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"unit": "paragraph"},
        {"valid": "0.1"},
        {"tokenizer": "bpe"},
        {"tokenizer": "bpe", "vocab_size": 300},
        {"latents_from": "corpus.txt"},
    ],
    ids=str,
)
def test_other_settings_are_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    monkeypatch.chdir(tmp_path)
    build(tmp_path, "\n".join(LINES))
    assert recalled(tmp_path) is not None
    assert recalled(tmp_path, **change) is None


@pytest.mark.parametrize("change", ["first", "last", "longer", "touched", "renamed", "one-more"])
def test_another_corpus_is_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Only what is neither at an edge of a file nor shows in its size and time passes unseen."""
    monkeypatch.setattr("gptvae_cli.corpus._EDGE_BYTES", 4)
    text = "\n".join(LINES)
    build(tmp_path, text)
    path, config = tmp_path / "corpus.txt", DataConfig(tokenizer="bytes")
    time = path.stat().st_mtime_ns
    sources = [str(path)]
    match change:
        case "first":
            path.write_text("X" + text[1:])
        case "last":
            path.write_text(text[:-1] + "X")
        case "longer":
            path.write_text(text + "\n")
        case "renamed":
            sources = [str(path.rename(tmp_path / "corpus.jsonl"))]
        case "one-more":
            (tmp_path / "more.txt").write_text("more")
            sources.append(str(tmp_path / "more.txt"))
    if change == "touched":
        os.utime(path, ns=(time, time + 1))
    elif path.exists():
        os.utime(path, ns=(time, time))
    assert Corpus.recall(tmp_path / "cache", sources, config) is None


@pytest.mark.parametrize("option", ["valid", "latents_from", "tokenizer"])
def test_a_file_that_a_setting_names_belongs_to_the_corpus(tmp_path: Path, option: str) -> None:
    named = tmp_path / "named"
    text = Tokenizer.train_bpe(LINES, 300).to_json() if option == "tokenizer" else "\n".join(LINES)
    named.write_text(text)
    data: dict[str, Any] = {option: str(named)}
    build(tmp_path, "\n".join(LINES), **data)
    assert recalled(tmp_path, **data) is not None
    named.write_text(text.replace("a", "b", 1))
    assert recalled(tmp_path, **data) is None
    named.unlink()
    assert recalled(tmp_path, **data) is None


def test_standard_input_is_never_recalled(tmp_path: Path, pipe: Callable[[str], None]) -> None:
    """What it holds is known only once it is read; its digest tells whether it is the corpus of a run."""
    config, text = DataConfig(tokenizer="bytes"), "\n".join(LINES)
    pipe(text)
    corpus = Corpus.build([], config, tmp_path / "cache")
    assert corpus.fingerprint is None
    assert Corpus.recall(tmp_path / "cache", [], config) is None
    pipe(text)
    assert corpus.is_of([], config)
    pipe(text[1:])
    assert not corpus.is_of([], config)


def test_a_corpus_is_known_by_its_files_or_else_by_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, config = build(tmp_path, "\n".join(LINES)), DataConfig(tokenizer="bytes")
    path, copy = tmp_path / "corpus.txt", tmp_path / "copy.txt"
    copy.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert corpus.is_of([str(copy)], config)
    copy.write_bytes(b"another" + path.read_bytes())
    assert not corpus.is_of([str(copy)], config)
    monkeypatch.setattr("gptvae_cli.ingest.read_texts", None)
    assert corpus.is_of([str(path)], config), "without reading it"


def test_an_interrupted_cache_is_none_and_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a whole one of another corpus, too, whose list of files would else vouch for it."""
    monkeypatch.setattr("gptvae_cli.ingest._PIECE_CHARS", 1000)
    text = "\n".join(LINES)
    build(tmp_path, "another\ncorpus\nthan\nthat")

    def interrupt(characters: int) -> None:
        if characters > sum(map(len, LINES)) / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, text, on_progress=interrupt)
    assert (tmp_path / "cache" / "train.tokens").stat().st_size > 0
    assert recalled(tmp_path) is None
    with pytest.raises(CheckpointError):
        Corpus.open(tmp_path / "cache")
    corpus = build(tmp_path, text)
    assert Counter(contents(corpus, corpus.train) + contents(corpus, corpus.valid)) == Counter(LINES)
    assert recalled(tmp_path) is not None


def test_a_damaged_cache_is_not_recalled(tmp_path: Path) -> None:
    build(tmp_path, "\n".join(LINES))
    for path in sorted((tmp_path / "cache").iterdir()):
        content = path.read_bytes()
        for damaged in (content[:-2], content + b"x", b""):
            path.write_bytes(damaged)
            assert recalled(tmp_path) is None, path.name
        path.write_bytes(content)
        assert recalled(tmp_path) is not None


# Memory ---------------------------------------------------------------------------------------------------------------

MANY_ROWS = """
import resource, sys
from pathlib import Path
from gptvae_cli import corpus as cache
from gptvae_cli import data, ingest
from gptvae_cli.config import DataConfig, ModelConfig

cache._BEGINNING_CHARS = ingest.SAMPLE_CHARS = ingest._PIECE_CHARS = 2**16
corpus, folder = Path(sys.argv[1]), Path(sys.argv[2])
config = DataConfig(tokenizer="bytes")
model = ModelConfig(num_tokens=259, dim=32, depth=1, enc_depth=1, max_seq_len=32, dim_latent=4, heads=2,
                    pad_id=256, bos_id=257, eos_id=258, conditioning="token")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)

def begin(count):
    corpus.write_bytes(b"".join(b"%x\\n" % i for i in range(min(count, 10_000))) * max(1, count // 10_000))
    tokens = cache.Corpus.build([str(corpus)], config, folder)
    rows = data.Rows(tokens.train, model, window=False)
    next(iter(data.Epoch(rows, 2048, 0, 0).batches()))
    assert len(tokens.train) + len(tokens.valid) == count

begin(50_000)
before = peak()
begin(1_000_000)
print(peak() - before)
"""


def test_a_million_rows_take_no_more_memory_than_fifty_thousand(tmp_path: Path) -> None:
    """Peak memory of building the cache and taking the first batch. Arrays over all rows, and a plan of the whole
    epoch, took 54 MB here."""
    arguments = [sys.executable, "-c", MANY_ROWS, str(tmp_path / "corpus.txt"), str(tmp_path / "cache")]
    ran = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert int(ran.stdout) < 20e6


LONG_TEXT = """
import resource, sys
from pathlib import Path
from gptvae_cli import corpus as cache
from gptvae_cli import ingest
from gptvae_cli.config import DataConfig

cache._BEGINNING_CHARS = ingest.SAMPLE_CHARS = ingest._PIECE_CHARS = 2**16
ingest._POOL_CHARS = 2**40
text, folder = Path(sys.argv[1]), Path(sys.argv[2])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)

def build(size):
    text.write_bytes(b"a line of some words\\n" * (size // 21))
    corpus = cache.Corpus.build([str(text)], DataConfig(tokenizer="bytes", unit="window", valid="0.5"), folder)
    assert corpus.train.count + corpus.valid.count == size // 21 * 21 - 1

build(10**6)
before = peak()
build(3 * 10**7)
print(peak() - before)
"""


def test_a_long_running_text_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """Nor does the half of it that is held out: 30 MB took 250 MB here, when a text was tokenised as a whole."""
    arguments = [sys.executable, "-c", LONG_TEXT, str(tmp_path / "corpus.txt"), str(tmp_path / "cache")]
    ran = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert int(ran.stdout) < 40e6


# The digest -----------------------------------------------------------------------------------------------------------


def test_the_digest_recognises_a_corpus_whatever_file_it_is_in(tmp_path: Path, pipe: Callable[[str], None]) -> None:
    facts = build(tmp_path, "\n".join(LINES)).facts
    config = DataConfig()
    (tmp_path / "other.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(LINES).encode() + b"\r\n\r\n")
    assert corpus_digest([str(tmp_path / "other.txt")], config) == facts.digest
    pipe("\n".join(LINES))
    assert corpus_digest(["-"], config) == facts.digest


@pytest.mark.parametrize(
    "lines",
    [LINES[:-1], [*LINES, "one more"], [LINES[1], LINES[0], *LINES[2:]], [LINES[0] + LINES[1], *LINES[2:]]],
    ids=["fewer", "more", "another-order", "joined"],
)
def test_the_digest_tells_corpora_apart(tmp_path: Path, lines: list[str]) -> None:
    facts = build(tmp_path, "\n".join(LINES)).facts
    other = tmp_path / "other.txt"
    other.write_text("\n".join(lines))
    assert corpus_digest([str(other)], DataConfig()) != facts.digest


# Held-out texts -------------------------------------------------------------------------------------------------------


def test_about_the_share_is_held_out(tmp_path: Path) -> None:
    """Within four standard deviations of a binomial."""
    lines = [f"line {i}" for i in range(5000)]
    for share in (0.05, 0.3):
        corpus = build(tmp_path, "\n".join(lines), valid=str(share))
        assert abs(len(corpus.valid) - 5000 * share) < 4 * (5000 * share * (1 - share)) ** 0.5


def test_equal_texts_are_held_out_together_or_not_at_all(tmp_path: Path) -> None:
    """A text that is in both parts would make the held-out figures too good."""
    lines = [f"line {i % 97}" for i in range(2000)]
    corpus = build(tmp_path, "\n".join(lines), valid="0.3")
    kept, held_out = set(contents(corpus, corpus.train)), set(contents(corpus, corpus.valid))
    assert kept & held_out == set()
    assert len(kept) + len(held_out) == 97
    assert len(held_out) > 10


def test_the_split_does_not_depend_on_the_other_texts(tmp_path: Path) -> None:
    alone = build(tmp_path, "\n".join(LINES), valid="0.2")
    expected = set(contents(alone, alone.valid))
    more = build(tmp_path, "\n".join([f"another {i}" for i in range(100)] + LINES[::-1]), valid="0.2")
    assert set(contents(more, more.valid)) & set(LINES) == expected


def test_a_file_of_held_out_texts_leaves_the_corpus_whole(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("x\n\ny\n")
    corpus = build(tmp_path, "\n".join(LINES), valid=str(tmp_path / "held.txt"))
    assert contents(corpus, corpus.train) == LINES
    assert contents(corpus, corpus.valid) == ["x", "y"]


def test_a_file_of_held_out_texts_must_have_one(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"no text in the validation file .*held\.txt"):
        build(tmp_path, "\n".join(LINES), valid=str(tmp_path / "held.txt"))
    with pytest.raises(DataError, match="nowhere"):
        build(tmp_path, "\n".join(LINES), valid=str(tmp_path / "nowhere.txt"))


# Aligned texts --------------------------------------------------------------------------------------------------------


def test_texts_and_their_sources_stay_together(tmp_path: Path) -> None:
    """Through the split, the dropping of empty texts and the shuffling. An empty source stays: it is a text that the
    encoder reads as nothing."""
    targets = [f"target {i}" if i % 7 else "" for i in range(300)]
    sources = [f"source {i}" if i % 5 else "" for i in range(300)]
    (tmp_path / "sources.txt").write_text("\n".join(sources) + "\n")
    corpus = build(tmp_path, "\n".join(targets) + "\n", latents_from=str(tmp_path / "sources.txt"), valid="0.2")
    pairs = {target: source for target, source in zip(targets, sources, strict=True) if target}
    seen = 0
    for store, source in ((corpus.train, corpus.train_source), (corpus.valid, corpus.valid_source)):
        found = list(zip(contents(corpus, store), contents(corpus, source), strict=True))
        assert all(pairs[target] == source for target, source in found)
        seen += len(found)
    assert seen == len(pairs) == corpus.facts.texts
    assert corpus.facts.empty == 300 - len(pairs)
    decode = corpus.tokenizer.decode
    for batch in Epoch(rows_of(corpus), 200, seed=1, epoch=0).batches():
        for target_T, source_T in zip(batch.tokens_BT.tolist(), batch.encoder_BT.tolist(), strict=True):
            assert pairs[decode(target_T)] == decode(source_T)
            assert [token for token in source_T if token != PAD][-1] == EOS
    # A run goes on with its corpus where that other file is gone.
    again = [str(tmp_path / "corpus.txt")], DataConfig(latents_from=str(tmp_path / "gone.txt"))
    assert corpus.facts.digest == corpus_digest(*again)


def test_the_last_text_takes_its_source_along_when_it_alone_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "sources.txt").write_text("1\n22\n333\n")
    corpus = build(tmp_path, "one\ntwo\nthree\n", latents_from=str(tmp_path / "sources.txt"), valid="0.0001")
    assert contents(corpus, corpus.valid) == ["three"]
    assert contents(corpus, corpus.valid_source) == ["333"]
    assert contents(corpus, corpus.train) == ["one", "two"]
    assert contents(corpus, corpus.train_source) == ["1", "22"]


@pytest.mark.parametrize(
    ("count", "message"),
    [(9, "corpus has more than 9 texts, .*sources.txt has 9"), (11, "sources.txt has more texts than the corpus")],
)
def test_unequal_numbers_of_texts_and_sources_are_an_error(tmp_path: Path, count: int, message: str) -> None:
    (tmp_path / "sources.txt").write_text("source\n" * count)
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path, "target\n" * 10, latents_from=str(tmp_path / "sources.txt"))
    assert "in the same order" in str(caught.value.hint)


def test_a_validation_file_has_no_texts_for_the_encoder(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(LINES))
    with pytest.raises(ConfigError, match=r"valid is .*x\.txt.*must be a share"):
        build(tmp_path, "\n".join(LINES), latents_from=str(tmp_path / "x.txt"), valid=str(tmp_path / "x.txt"))


def test_a_corpus_is_not_a_source_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "other": "two"}\n' * 9)
    config = DataConfig(latents_from=str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match=r"latents-from is .*a\.jsonl, the corpus itself"):
        Corpus.build([str(tmp_path / "a.jsonl")], config, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
