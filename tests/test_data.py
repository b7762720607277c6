"""Rows of a corpus and batches of rows: what a row is, and which rows make up a batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from gptvae_cli.config import DataConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import Epoch, Rows, Spans, fixed_batches, padding_share, plan_batches
from gptvae_cli.errors import DataError
from gptvae_cli.tokens import Ints, TokenStore
from tests.test_corpus import BOS, EOS, LINES, PAD, build, contents, rows_of, shape


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


def test_evaluation_takes_rows_from_everywhere_whatever_the_batch_size(tmp_path: Path) -> None:
    """In order of length, so that neighbours are of about the same. A corpus may be one file after another."""
    rows = rows_of(build(tmp_path, "\n".join(LINES)))
    assert len(rows) > 150
    expected = sorted(tuple(all_rows(rows)[i * len(rows) // 100]) for i in range(100))
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


@pytest.mark.parametrize("valid", ["0.1", "file"])
def test_a_blank_line_stands_between_running_texts(tmp_path: Path, valid: str) -> None:
    """Of several files, as of several records: what the second begins with does not continue the first."""
    files = [tmp_path / name for name in ("one.txt", "two.txt", "three.txt")]
    for file, text in zip(files, ("The first ends here.", "Second begins.", "Third."), strict=True):
        file.write_text(text + "\n")
    if valid == "file":
        valid = str(tmp_path)
    corpus = Corpus.build([str(f) for f in files], DataConfig(unit="window", valid=valid), tmp_path / "cache")
    kept, held_out = "".join(contents(corpus, corpus.train)), "".join(contents(corpus, corpus.valid))
    if valid == "0.1":
        assert kept == "The first ends her\n\nSecond begins\n\nThird"
        assert held_out == "e.\n\n.\n\n."
    else:
        assert kept == "The first ends here.\n\nSecond begins.\n\nThird."
        assert held_out == "The first ends here.\n\nThird.\n\nSecond begins."


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
    assert contents(corpus, corpus.train) == ["a" * 75 + "\n\n" + "b" * 75]
    assert contents(corpus, corpus.valid) == ["a" * 25 + "\n\n" + "b" * 25]
