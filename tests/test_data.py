"""Corpora as tokens: what is kept, what is held out, which rows make up a batch, and what a row is."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from gptvae_cli.config import DataConfig, ModelConfig
from gptvae_cli.data import Corpus, Epoch, Rows, Spans, corpus_digest, fixed_batches, padding_share, plan_batches
from gptvae_cli.errors import CheckpointError, ConfigError, DataError, ExitCode
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


def shape(**changes: int) -> ModelConfig:
    fields = {"dim": 32, "depth": 1, "enc_depth": 1, "max_seq_len": 32, "dim_latent": 4, "heads": 2}
    specials = {"num_tokens": 259, "pad_id": PAD, "bos_id": BOS, "eos_id": EOS}
    return ModelConfig(**{**fields, **specials, **changes})


def rows_of(corpus: Corpus, **changes: int) -> Rows:
    return Rows(corpus.train, shape(**changes), window=False, source=corpus.train_source)


def as_lists(tokens_BT: Tensor) -> list[list[int]]:
    return [[token for token in row if token != PAD] for row in tokens_BT.tolist()]


def all_rows(rows: Rows, seed: int | None = None) -> list[list[int]]:
    spans = rows.spans(np.arange(len(rows))) if seed is None else rows.drawn(seed, 0, 0, len(rows))
    return as_lists(rows.batch(spans).tokens_BT)


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("GPTVAE_TEST_DATA")
    if not folder:
        pytest.skip("needs the corpora that GPTVAE_TEST_DATA names")
    return Path(folder)


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_corpus_comes_back_from_its_cache(tmp_path: Path, tokenizer: str) -> None:
    lines = ["plain", "Füße 走る", "\t tab and spaces ", "a", "\x00 nul", *LINES]
    built = build(tmp_path, "\n".join(lines), tokenizer=tokenizer, vocab_size=300)
    opened = Corpus.open(tmp_path / "cache", Tokenizer.from_json(built.tokenizer.to_json()))
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
    corpus = build(tmp_path, "\n".join(LINES))
    path = tmp_path / "cache" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: {"empty": 0, "cut": len(content) - 2, "half": len(content) // 2}[damage]])
    with pytest.raises(CheckpointError, match="cache is missing or damaged") as caught:
        Corpus.open(tmp_path / "cache", corpus.tokenizer)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert "--force" in str(caught.value.hint)


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


def test_standard_input_is_a_corpus(tmp_path: Path) -> None:
    config = DataConfig(tokenizer="bytes")
    corpus = Corpus.build([], config, tmp_path, stdin=io.BytesIO("\n".join(LINES).encode()))
    assert corpus.facts.texts == len(LINES)
    assert corpus.facts.digest == build(tmp_path, "\n".join(LINES)).facts.digest


def test_progress_is_told_in_characters(tmp_path: Path) -> None:
    seen: list[int] = []
    build(tmp_path, "\n".join(LINES), on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(map(len, LINES))


def test_a_corpus_larger_than_a_piece_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at the seams of the pieces, nor between the sample that the tokenizer learns from and the rest."""
    monkeypatch.setattr("gptvae_cli.data._PIECE_CHARS", 100)
    monkeypatch.setattr("gptvae_cli.data._SAMPLE_CHARS", 1000)
    corpus = build(tmp_path, "\n".join(LINES))
    assert Counter(contents(corpus, corpus.train) + contents(corpus, corpus.valid)) == Counter(LINES)


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
    monkeypatch.setattr("gptvae_cli.data._EDGE_BYTES", 4)
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


def test_standard_input_is_never_recalled(tmp_path: Path) -> None:
    """What it holds is known only once it is read; its digest tells whether it is the corpus of a run."""
    config, text = DataConfig(tokenizer="bytes"), "\n".join(LINES).encode()
    corpus = Corpus.build([], config, tmp_path / "cache", stdin=io.BytesIO(text))
    assert corpus.fingerprint is None
    assert Corpus.recall(tmp_path / "cache", [], config) is None
    assert corpus.is_of([], config, stdin=io.BytesIO(text))
    assert not corpus.is_of([], config, stdin=io.BytesIO(text[1:]))


def test_a_corpus_is_known_by_its_files_or_else_by_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, config = build(tmp_path, "\n".join(LINES)), DataConfig(tokenizer="bytes")
    path, copy = tmp_path / "corpus.txt", tmp_path / "copy.txt"
    copy.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert corpus.is_of([str(copy)], config)
    copy.write_bytes(b"another" + path.read_bytes())
    assert not corpus.is_of([str(copy)], config)
    monkeypatch.setattr("gptvae_cli.data.read_texts", None)
    assert corpus.is_of([str(path)], config), "without reading it"


def test_an_interrupted_cache_is_none_and_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a whole one of another corpus, too, whose list of files would else vouch for it."""
    monkeypatch.setattr("gptvae_cli.data._PIECE_CHARS", 1000)
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
        Corpus.open(tmp_path / "cache", Tokenizer.bytes())
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
from gptvae_cli import data
from gptvae_cli.config import DataConfig, ModelConfig

data._SAMPLE_CHARS = data._PIECE_CHARS = 2**16
corpus, folder = Path(sys.argv[1]), Path(sys.argv[2])
config = DataConfig(tokenizer="bytes")
model = ModelConfig(num_tokens=259, dim=32, depth=1, enc_depth=1, max_seq_len=32, dim_latent=4, heads=2,
                    pad_id=256, bos_id=257, eos_id=258)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)

def begin(count):
    corpus.write_bytes(b"".join(b"%x\\n" % i for i in range(min(count, 10_000))) * max(1, count // 10_000))
    tokens = data.Corpus.build([str(corpus)], config, folder)
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


# The digest -----------------------------------------------------------------------------------------------------------


def test_the_digest_recognises_a_corpus_whatever_file_it_is_in(tmp_path: Path) -> None:
    facts = build(tmp_path, "\n".join(LINES)).facts
    config = DataConfig()
    (tmp_path / "other.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(LINES).encode() + b"\r\n\r\n")
    assert corpus_digest([str(tmp_path / "other.txt")], config) == facts.digest
    assert corpus_digest(["-"], config, stdin=io.BytesIO("\n".join(LINES).encode())) == facts.digest


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
    corpus = build(
        tmp_path, "\n".join(targets) + "\n", latents_from=str(tmp_path / "sources.txt"), valid="0.2", vocab_size=300
    )
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
    assert corpus.facts.digest == corpus_digest(
        [str(tmp_path / "corpus.txt")], DataConfig(latents_from=str(tmp_path / "sources.txt"))
    )


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


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_text_that_just_fits_keeps_its_eos_and_a_longer_one_is_cut_without(tmp_path: Path) -> None:
    """Texts of 8 to 14 tokens for a model of 12: BOS and EOS take two of these."""
    longest = 12
    texts = ["abcdefghijklmnop"[:length] for length in range(longest - 4, longest + 3)]
    corpus = build(tmp_path, "\n".join([*texts, "z"]), valid="0.0001")
    rows = rows_of(corpus, max_seq_len=longest)
    expected = [
        [BOS, *text.encode(), EOS] if len(text) <= longest - 2 else [BOS, *text.encode()[: longest - 1]]
        for text in texts
    ]
    assert all_rows(rows) == expected
    assert max(map(len, expected)) == longest
    assert rows.count_cut() == sum(len(text) > longest - 2 for text in texts) == 4


def test_sources_are_cut_by_the_same_rule(tmp_path: Path) -> None:
    texts = ["abcdefghijklmnop"[:length] for length in range(8, 15)]
    (tmp_path / "sources.txt").write_text("\n".join([*texts, "z"]))
    corpus = build(
        tmp_path, "\n".join("t" * (i + 1) for i in range(8)), valid="0.0001", latents_from=str(tmp_path / "sources.txt")
    )
    rows = rows_of(corpus, max_seq_len=12)
    batch = rows.batch(rows.spans(np.arange(7)))
    assert as_lists(batch.encoder_BT) == [
        [BOS, *text.encode(), EOS] if len(text) <= 10 else [BOS, *text.encode()[:11]] for text in texts
    ]
    assert rows.count_cut() == 4, "what the encoder does not see is counted too"


def test_a_batch_counts_its_target_tokens(tmp_path: Path) -> None:
    rows = rows_of(build(tmp_path, "\n".join(LINES)), max_seq_len=16)
    for batch in Epoch(rows, 256, seed=0, epoch=0).batches():
        assert batch.target_tokens == int((batch.tokens_BT[:, 1:] != PAD).sum())
        assert (batch.tokens_BT[:, 0] == BOS).all()


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [16, 100, 2048, 10**6])
def test_every_row_is_in_exactly_one_batch_and_no_batch_is_over_budget(batch_tokens: int) -> None:
    """But for a row that is longer than the budget, which is a batch of its own. One row more would be too much."""
    lengths = np.random.default_rng(0).geometric(0.05, 3000) + 2
    plan = plan_batches(lengths, batch_tokens)
    assert sorted(np.concatenate(plan).tolist()) == list(range(3000))
    for rows in plan:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= batch_tokens
    for rows, following in pairwise(plan):
        assert (len(rows) + 1) * lengths[following].min() > batch_tokens


@pytest.mark.parametrize("batch_tokens", [16, 100, 2048, 10**6])
@pytest.mark.parametrize("unit", ["line", "window"])
def test_an_epoch_is_every_row_once_and_no_batch_is_over_budget(tmp_path: Path, unit: str, batch_tokens: int) -> None:
    corpus = build(tmp_path, "\n".join(LINES * 5), unit=unit)
    rows = Rows(corpus.train, shape(), window=unit == "window")
    batches = list(Epoch(rows, batch_tokens, seed=4, epoch=2).spans())
    assert sorted(np.concatenate([batch.index_N for batch in batches]).tolist()) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * batch.widths_N.max() <= batch_tokens


def test_the_padding_that_is_told_is_the_padding_that_is_there(tmp_path: Path) -> None:
    rows = rows_of(build(tmp_path, "\n".join(LINES)))
    epoch = Epoch(rows, 300, seed=0, epoch=0)
    padding = tokens = 0
    for batch in epoch.batches():
        padding += int((batch.tokens_BT == PAD).sum())
        tokens += batch.tokens_BT.numel()
    assert padding_share(epoch.spans()) == pytest.approx(padding / tokens)
    assert padding_share(rows.spans(np.array([i])) for i in range(len(rows))) == 0


@pytest.mark.parametrize("name", ["tatoeba_eng_train", "zinc_smiles_train", "snli_train", "names_us"])
def test_padding_of_a_real_corpus_is_below_five_percent(tmp_path: Path, data: Path, name: str) -> None:
    with (data / f"{name}.txt").open("rb") as lines:
        text = b"".join(islice(lines, 20_000))
    corpus = build(tmp_path, text, tokenizer="auto")
    rows = Rows(corpus.train, shape(max_seq_len=256, num_tokens=30_000), window=False)
    epoch = Epoch(rows, 2048, seed=0, epoch=0)
    assert padding_share(epoch.spans()) < 0.05
    assert len(list(epoch.spans())) > 50


def plan_of(rows: Rows, seed: int, epoch: int) -> list[list[int]]:
    return [batch.index_N.tolist() for batch in Epoch(rows, 256, seed, epoch).spans()]


def test_the_order_is_a_function_of_seed_and_epoch_alone(tmp_path: Path) -> None:
    rows = rows_of(build(tmp_path, "\n".join(LINES)))
    np.random.default_rng(1).random()
    first = plan_of(rows, 5, 3)
    assert plan_of(rows, 5, 3) == first
    assert plan_of(rows, 5, 4) != first
    assert plan_of(rows, 6, 3) != first
    # Neither the same batches in another order.
    assert sorted(map(sorted, plan_of(rows, 5, 4))) != sorted(map(sorted, first))


def test_batches_of_one_epoch_do_not_come_in_order_of_length(tmp_path: Path) -> None:
    """Rows are sorted within pools; if the batches stayed so, a run would swing between short texts and long ones."""
    rows = rows_of(build(tmp_path, "\n".join(LINES)))
    widths = [batch.tokens_BT.shape[1] for batch in Epoch(rows, 256, seed=0, epoch=0).batches()]
    assert widths != sorted(widths)
    assert widths != sorted(widths, reverse=True)


@pytest.mark.parametrize("unit", ["line", "window"])
def test_an_epoch_goes_on_from_behind_any_of_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """In the middle of a pool, at the seam of two, and at the end."""
    monkeypatch.setattr("gptvae_cli.data._POOL_BATCHES", 4)
    corpus = build(tmp_path, "\n".join(LINES), unit=unit)
    epoch = Epoch(Rows(corpus.train, shape(), window=unit == "window"), 256, seed=2, epoch=1)
    whole = [batch.tokens_BT.tolist() for batch in epoch.batches()]
    assert len(whole) > 12
    skip = 0
    for done, batch in enumerate(whole):
        assert [batch.tokens_BT.tolist() for batch in epoch.batches(skip)] == whole[done:]
        skip += len(batch)
    assert list(epoch.batches(skip)) == []


def test_pools_that_are_skipped_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or to resume late in an epoch of billions of rows would take hours."""
    monkeypatch.setattr("gptvae_cli.data._POOL_BATCHES", 1)
    rows = rows_of(build(tmp_path, "\n".join(LINES * 20)))
    read: list[tuple[int, int]] = []
    drawn = rows.drawn

    def noted(seed: int, epoch: int, first: int, stop: int) -> Spans:
        read.append((first, stop))
        return drawn(seed, epoch, first, stop)

    monkeypatch.setattr(rows, "drawn", noted)
    epoch = Epoch(rows, 256, seed=0, epoch=0)
    skip = len(rows) - epoch.pool_rows - len(rows) % epoch.pool_rows
    list(epoch.batches(skip))
    assert min(read)[0] == skip
    read.clear()
    next(epoch.batches())
    assert read == [(0, epoch.pool_rows)], "and the first batch needs no pool but its own"


def test_lines_that_follow_each_other_are_shuffled_over_the_whole_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corpora come sorted: a pool that held neighbours would be of one topic."""
    monkeypatch.setattr("gptvae_cli.data._POOL_BATCHES", 4)
    rows = rows_of(build(tmp_path, "\n".join(LINES * 20)))
    epoch = Epoch(rows, 256, seed=0, epoch=0)
    index_N = np.concatenate([batch.index_N for batch in epoch.spans()])
    pools = np.split(index_N, range(epoch.pool_rows, len(rows), epoch.pool_rows))
    assert len(pools) > 50
    # The mean of a pool is that of the corpus, within five standard deviations of a mean of uniform numbers.
    tolerance = 5 * len(rows) / (12 * epoch.pool_rows) ** 0.5
    assert all(abs(pool.mean() - len(rows) / 2) < tolerance for pool in pools[:-1])


def test_evaluation_takes_the_first_rows_whatever_the_batch_size(tmp_path: Path) -> None:
    """In order of length, so that neighbours are of about the same."""
    rows = rows_of(build(tmp_path, "\n".join(LINES)))
    expected = sorted(map(tuple, all_rows(rows)[:100]))
    orders = []
    for batch_tokens in (40, 500, 10**6):
        batches = fixed_batches(rows, batch_tokens, 100)
        found = [row for batch in batches for row in as_lists(batch.tokens_BT)]
        assert sorted(map(tuple, found)) == expected
        assert [len(row) for row in found] == sorted(len(row) for row in found)
        orders.append(found)
    assert orders[0] == orders[1] == orders[2]


# Windows --------------------------------------------------------------------------------------------------------------

RUNNING = "".join(f"{i}," for i in range(2000)) + "\n"


def window_rows(corpus: Corpus, store: TokenStore, longest: int = 33) -> Rows:
    return Rows(store, shape(max_seq_len=longest), window=True)


def test_crops_are_pieces_of_the_text_and_as_long_as_the_model(tmp_path: Path) -> None:
    corpus = build(tmp_path, RUNNING, unit="window")
    text = "".join(contents(corpus, corpus.train))
    rows = window_rows(corpus, corpus.train)
    crops = all_rows(rows, seed=0)
    assert len(crops) == -(-len(text) // 32), "as many as cover the text"
    assert all(len(crop) == 33 and crop[0] == BOS and EOS not in crop for crop in crops)
    assert all(corpus.tokenizer.decode(crop) in text for crop in crops)
    assert rows.count_cut() == 0


def test_crops_fall_everywhere_and_elsewhere_in_every_epoch(tmp_path: Path) -> None:
    corpus = build(tmp_path, RUNNING, unit="window")
    rows = window_rows(corpus, corpus.train)
    total = corpus.train.count

    def starts_of(seed: int, epoch: int) -> Ints:
        return rows.drawn(seed, epoch, 0, len(rows)).starts_N

    starts = [starts_of(seed=0, epoch=epoch) for epoch in range(30)]
    assert len({tuple(one.tolist()) for one in starts}) == 30
    assert starts[7].tolist() == starts_of(seed=0, epoch=7).tolist()
    assert starts[7].tolist() != starts_of(seed=1, epoch=7).tolist()
    seen = np.zeros(total, dtype=int)
    for start in np.concatenate(starts):
        seen[start : start + 32] += 1
    # 30 passes: away from the ends every token is seen about 30 times.
    assert seen[32:-32].min() > 5
    assert 25 < seen[32:-32].mean() < 35
    drawn = np.concatenate(starts)
    assert drawn.min() < total * 0.01
    assert total - 32 - drawn.max() < total * 0.01
    assert drawn.max() + 32 <= total


def test_the_very_last_crop_can_be_drawn(tmp_path: Path) -> None:
    corpus = build(tmp_path, "abcdefgh", unit="window", valid="0.0001")
    rows = window_rows(corpus, corpus.train, longest=7)
    assert contents(corpus, corpus.train) == ["abcdefg"]
    drawn = {corpus.tokenizer.decode(all_rows(rows, seed)[0]) for seed in range(50)}
    assert drawn == {"abcdef", "bcdefg"}


def test_validation_windows_are_consecutive_and_complete(tmp_path: Path) -> None:
    """And the held-out part is the end of the text."""
    corpus = build(tmp_path, RUNNING, unit="window", valid="0.1")
    kept, held_out = contents(corpus, corpus.train), contents(corpus, corpus.valid)
    assert "".join(kept + held_out) == RUNNING.removesuffix("\n")
    assert len(held_out[0]) == pytest.approx(0.1 * len(RUNNING), abs=2)
    crops = all_rows(window_rows(corpus, corpus.valid))
    assert "".join(corpus.tokenizer.decode(crop) for crop in crops) == held_out[0]
    assert {len(crop) for crop in crops[:-1]} == {33}


def test_a_text_shorter_than_the_window_is_one_crop(tmp_path: Path) -> None:
    corpus = build(tmp_path, "abcdefghij", unit="window", valid="0.2")
    rows = window_rows(corpus, corpus.train)
    assert all_rows(rows, seed=3) == [[BOS, *b"abcdefgh"]]
    assert all_rows(window_rows(corpus, corpus.valid)) == [[BOS, *b"ij"]]


def test_windows_need_some_text(tmp_path: Path) -> None:
    for text in ("", "a"):
        with pytest.raises(DataError, match="no text to train on"):
            build(tmp_path, text, unit="window")


def test_a_long_running_text_is_tokenised_in_pieces_that_lose_nothing(tmp_path: Path) -> None:
    """Pieces end at a line break where there is one within their length."""
    text = "".join(f"{i} {'x' * (i % 50)}\n" for i in range(10_000)) + "y" * 200_000
    held_out = tmp_path / "held.txt"
    held_out.write_text(text[::-1])
    corpus = build(tmp_path, text, unit="window", valid=str(held_out))
    assert "".join(contents(corpus, corpus.train)) == text
    assert "".join(contents(corpus, corpus.valid)) == text[::-1]


def test_windows_of_several_files_hold_out_the_end_of_each(tmp_path: Path) -> None:
    files: Sequence[Path] = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in files:
        file.write_text(file.stem * 100)
    config = DataConfig(unit="window", tokenizer="bytes", valid="0.25")
    corpus = Corpus.build([str(file) for file in files], config, tmp_path / "cache")
    assert contents(corpus, corpus.train) == ["a" * 75, "b" * 75]
    assert contents(corpus, corpus.valid) == ["a" * 25, "b" * 25]
