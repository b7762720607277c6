"""Rows of a token store, and batches of rows.

Which rows make up which batch is a pure function of seed and epoch, and is computed as batches are needed.

Shapes: B batch, T tokens, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from gptvae_cli.config import ModelConfig
from gptvae_cli.noise import Purpose, shuffled, stream
from gptvae_cli.objective import Batch
from gptvae_cli.tokens import Ints, TokenStore

Bools = npt.NDArray[np.bool_]

_POOL_BATCHES = 64
"""Batches whose rows are sorted by length together: more means less padding, and batches more alike in length."""


@dataclass(frozen=True, eq=False)
class Spans:
    """Which tokens of a store make up rows.

    Args:
        index_N: the rows' numbers.
        starts_N: their first tokens.
        lengths_N: their tokens, BOS and EOS not counted.
        whole_N: whether EOS follows.
    """

    index_N: Ints
    starts_N: Ints
    lengths_N: Ints
    whole_N: Bools

    @property
    def widths_N(self) -> Ints:
        """Tokens of every row, BOS and EOS counted."""
        return self.lengths_N + 1 + self.whole_N

    def __len__(self) -> int:
        return len(self.index_N)

    def __getitem__(self, chosen: Ints) -> Spans:
        return Spans(self.index_N[chosen], self.starts_N[chosen], self.lengths_N[chosen], self.whole_N[chosen])


class Rows:
    """Sequences `BOS text EOS` over a store: its rows, or, with `window`, crops of all of it as one running text.

    A text longer than the model is cut and has no EOS, as has a crop. The number of rows is that of the texts, or of
    the crops that cover the running text.
    """

    def __init__(
        self, store: TokenStore, config: ModelConfig, *, window: bool, source: TokenStore | None = None
    ) -> None:
        self.store, self.source, self.config, self.window = store, source, config, window
        self.longest = config.max_seq_len - 1
        self.crop = max(1, min(self.longest, store.count))

    def __len__(self) -> int:
        return -(-self.store.count // self.crop) if self.window else len(self.store)

    def count_cut(self) -> int:
        """Texts that are longer than the model, or whose source is. Reads the length of every text."""
        if self.window:
            return 0
        sources = self.store.lengths() if self.source is None else self.source.lengths()
        longest = (np.maximum(*both) for both in zip(self.store.lengths(), sources, strict=True))
        return sum(int((lengths_N + 2 > self.config.max_seq_len).sum()) for lengths_N in longest)

    def spans(self, index_N: Ints) -> Spans:
        """The rows of these numbers; crops stand one after another."""
        if self.window:
            return self._crops(index_N, self.crop * index_N)
        return self._texts(self.store, index_N)

    def spread(self, most: int) -> Ints:
        """The numbers of `most` rows, or of all, evenly spaced [N]."""
        count = min(most, len(self))
        return np.arange(count) * len(self) // max(1, count)

    def drawn(self, seed: int, epoch: int, first: int, stop: int) -> Spans:
        """The rows from `first` to `stop` in the order of an epoch; crops stand at random places, anew in each."""
        if self.window:
            random = stream(seed, Purpose.ORDER, epoch, 1 + first)
            starts_N = random.integers(0, self.store.count - self.crop + 1, stop - first)
            return self._crops(np.arange(first, stop), starts_N)
        return self.spans(shuffled(np.arange(first, stop), len(self), stream(seed, Purpose.ORDER, epoch)))

    def batch(self, spans: Spans) -> Batch:
        """These rows, padded to the longest."""
        source_BT = None
        if self.source is not None:
            source_BT = self._padded(self.source, self._texts(self.source, spans.index_N))
        return Batch(self._padded(self.store, spans), source_BT, int((spans.widths_N - 1).sum()))

    def mean_width(self) -> float:
        """Mean tokens of a row, about, BOS and EOS counted."""
        return min(self.config.max_seq_len, 2 + self.store.count / max(1, len(self)))

    def _texts(self, store: TokenStore, index_N: Ints) -> Spans:
        starts_N, lengths_N = store.spans(index_N)
        # A text that is cut has no room for EOS.
        whole_N = lengths_N + 2 <= self.config.max_seq_len
        return Spans(index_N, starts_N, np.where(whole_N, lengths_N, self.longest), whole_N)

    def _crops(self, index_N: Ints, starts_N: Ints) -> Spans:
        lengths_N = np.minimum(self.crop, self.store.count - starts_N)
        return Spans(index_N, starts_N, lengths_N, np.zeros(len(index_N), dtype=bool))

    def _padded(self, store: TokenStore, spans: Spans) -> torch.Tensor:
        config, widths_B = self.config, spans.widths_N
        tokens_BT = np.full((len(spans), int(widths_B.max())), config.pad_id, dtype=np.int64)
        tokens_BT[:, 0] = config.bos_id
        text_BT = np.arange(tokens_BT.shape[1] - 1) < spans.lengths_N[:, None]
        tokens_BT[:, 1:][text_BT] = store.read(spans.starts_N, spans.lengths_N)
        tokens_BT[spans.whole_N, widths_B[spans.whole_N] - 1] = config.eos_id
        return torch.from_numpy(tokens_BT)


def plan_batches(widths_N: Ints, batch_tokens: int) -> list[Ints]:
    """Cuts rows into batches of about `batch_tokens` tokens, padding counted, of rows about equally long.

    Args:
        widths_N: tokens of every row.
        batch_tokens: the most a batch may hold; a longer row is a batch of its own.

    Returns:
        Indices of rows, one array a batch, in order of length; every row is in exactly one.
    """
    order = np.argsort(widths_N, kind="stable")
    sorted_N = widths_N[order]
    batches: list[Ints] = []
    start = 0
    while start < len(order):
        # Rows are in order of length, so the last one of a batch sets its width.
        next_N = sorted_N[start : start + max(1, batch_tokens // max(1, int(sorted_N[start])))]
        fitting = int(np.searchsorted(next_N * np.arange(1, len(next_N) + 1), batch_tokens, side="right"))
        batches.append(order[start : start + max(1, fitting)])
        start += max(1, fitting)
    return batches


def padding_share(batches: Iterable[Spans]) -> float:
    """Share of the tokens of these batches that is padding."""
    tokens = padded = 0
    for spans in batches:
        tokens += int(spans.widths_N.sum())
        padded += len(spans) * int(spans.widths_N.max())
    return 1 - tokens / max(1, padded)


class Epoch:
    """One pass over the rows, in batches: a pure function of seed and epoch.

    All rows are shuffled; pools of many batches follow each other in that order; the rows of a pool are sorted by
    length and cut into batches, and these are shuffled. Only one pool is ever in memory.
    """

    def __init__(self, rows: Rows, batch_tokens: int, seed: int, epoch: int) -> None:
        self.rows, self.batch_tokens, self.seed, self.epoch = rows, batch_tokens, seed, epoch
        pools = -(-len(rows) // max(1, int(_POOL_BATCHES * batch_tokens / rows.mean_width())))
        # Pools of one size: a small one at the end would have more padding.
        self.pool_rows = max(1, -(-len(rows) // max(1, pools)))

    def spans(self, skip: int = 0) -> Iterator[Spans]:
        """The rows of each batch, in order.

        Args:
            skip: rows that the batches before the first one hold. Pools among them cost nothing.
        """
        for first in range(skip - skip % self.pool_rows, len(self.rows), self.pool_rows):
            pool = self.rows.drawn(self.seed, self.epoch, first, min(first + self.pool_rows, len(self.rows)))
            plan = plan_batches(pool.widths_N, self.batch_tokens)
            done = first
            for i in stream(self.seed, Purpose.BATCHES, self.epoch, first).permutation(len(plan)):
                if done >= skip:
                    yield pool[plan[i]]
                done += len(plan[i])

    def batches(self, skip: int = 0) -> Iterator[Batch]:
        """The batches behind the first `skip` rows, in order."""
        return (self.rows.batch(spans) for spans in self.spans(skip))


def fixed_batches(rows: Rows, batch_tokens: int, most: int) -> list[Batch]:
    """`most` of the rows, or all, in batches, for evaluation: the same ones every time. They are spread over all rows,
    since a corpus may be one file after another, or in some order."""
    spans = rows.spans(rows.spread(most))
    return [rows.batch(spans[index]) for index in plan_batches(spans.widths_N, batch_tokens)]


def batches_of(
    rows: Sequence[Sequence[int]], sources: Sequence[Sequence[int]] | None, pad_id: int, batch_tokens: int
) -> tuple[list[Batch], Ints]:
    """Rows of tokens with their specials, in batches in order of length, for evaluation; and the place of each row
    among those of the batches, one after another [N].

    Args:
        rows: what the decoder writes.
        sources: what the encoder reads, if not the same.
        pad_id: fills a batch.
        batch_tokens: of a batch, about.
    """
    batches = []
    plan = plan_batches(np.array([*map(len, rows)]), batch_tokens)
    for index in plan:
        tokens_BT = padded([rows[i] for i in index], pad_id)
        source_BT = None if sources is None else padded([sources[i] for i in index], pad_id)
        batches.append(Batch(tokens_BT, source_BT, sum(len(rows[i]) - 1 for i in index)))
    return batches, np.argsort(np.concatenate(plan))


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """Rows of tokens, padded behind [B T]. They are put into one array, since making a tensor of each row would take as
    long as tokenising."""
    widths_B = np.array([len(row) for row in rows])
    real_BT = np.arange(widths_B.max()) < widths_B[:, None]
    tokens_BT = np.full(real_BT.shape, pad_id, dtype=np.int64)
    tokens_BT[real_BT] = np.fromiter(chain.from_iterable(rows), np.int64)
    return torch.from_numpy(tokens_BT)
