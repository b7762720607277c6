"""How large a model a corpus, a given time and a machine can fill: rules, every choice with its reason, and what they
have to know of these three."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from gptvae_cli.config import (
    CONDITIONING,
    LATENT_WIDTH,
    LONGEST_SEQUENCE,
    PRESETS,
    DataConfig,
    ModelConfig,
    SizeConfig,
    TrainConfig,
    Unit,
)
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import Rows
from gptvae_cli.device import Device, Precision
from gptvae_cli.training import tokens_per_second

MEASURED = "small"
"""The preset whose speed tells what there is time for."""
ENOUGH_TOKENS = 5e6
PLENTY_OF_TOKENS = 2e8
_FASTEST = 100_000.0
"""Tokens a second, of `small`, that no two cores reach: where even they would be too few, none need be measured."""


def choose_preset(tokens: float) -> tuple[str, str]:
    """The preset that learns most on a CPU in the time that `small` takes for so many tokens, and why.

    Tokens, and not minutes: machines of two cores differ fourfold. In the time that `small` took for 6.6 million on
    Tatoeba's sentences it came to an importance-weighted NLL of 30.5 nats a text and `micro` to 30.9, in that for 3.9
    million to 31.6 and 31.4; on Wikipedia's, in that for 2.8 million, to 145.9 and 145.6
    (`tests/benchmarks/latent/results.txt`). The other bound, hours, is a rule of thumb.

    Args:
        tokens: that a run trains on if its model is `MEASURED`, repeats counted.
    """
    if tokens >= PLENTY_OF_TOKENS:
        return "medium", "there is time for it"
    if tokens >= ENOUGH_TOKENS:
        return MEASURED, "there is time for it"
    return "micro", f"{MEASURED} would learn from less than {ENOUGH_TOKENS / 1e6:g} million tokens"


def choose_preset_on_gpu(seconds: float | None, tokens: float) -> tuple[str, str]:
    """The same for a GPU, which takes steps of a larger model about as fast: rules of thumb.

    Args:
        seconds: of training; None is without a limit.
        tokens: that steps or epochs allow, however fast it is.
    """
    if tokens < PLENTY_OF_TOKENS:
        return choose_preset(tokens)
    return "medium" if seconds is not None and seconds < 1800 else "large", "a GPU trains it"


def choose_max_seq_len(long_length: int, unit: Unit, *, of_bytes: bool) -> int:
    """Longest sequence of the model, in tokens.

    Args:
        long_length: tokens of the longest text that it should read whole, BOS and EOS counted.
        unit: windows are as long as the model, so their length is a choice and not a finding.
        of_bytes: whether a token is a byte and not, as in a BPE, about four.
    """
    if unit == "window":
        return 128
    return min(1024 if of_bytes else 256, max(16, -(-long_length // 8) * 8))


def fit_preset(
    corpus: Corpus, data: DataConfig, config: TrainConfig, sizes: SizeConfig, device: Device, precision: Precision
) -> tuple[str, str]:
    """The preset that the limits of a run leave time for, on this machine where they are of time, and why. A CPU's
    speed is measured where it decides; that takes seconds."""
    model = fit_sizes(corpus, data, MEASURED, sizes)
    rows = Rows(corpus.train, model, window=data.unit == "window", source=corpus.train_source)
    tokens = math.inf if config.steps is None else config.steps * config.batch_tokens
    if config.epochs is not None:
        tokens = min(tokens, config.epochs * len(rows) * rows.mean_width())
    if device.device.type != "cpu":
        return choose_preset_on_gpu(config.max_time, tokens)
    if config.max_time is not None:
        tokens = min(tokens, config.max_time * _FASTEST)
        if tokens >= ENOUGH_TOKENS:
            speed = tokens_per_second(model, config, rows, device.device, precision.dtype)
            tokens = min(tokens, config.max_time * speed)
    return choose_preset(tokens)


def fit_sizes(corpus: Corpus, data: DataConfig, preset: str, sizes: SizeConfig) -> ModelConfig:
    """The sizes that were asked for, and for the others those of a preset, a length that fits the corpus, and defaults.

    Raises:
        ConfigError: for sizes that do not go together.
    """
    stores = [corpus.train] if corpus.train_source is None else [corpus.train, corpus.train_source]
    long_length = max(_long_length(store.lengths()) for store in stores) + 2
    fitted: dict[str, Any] = {
        **asdict(PRESETS[preset]),
        "dim_latent": LATENT_WIDTH,
        "conditioning": CONDITIONING,
        "max_seq_len": choose_max_seq_len(long_length, data.unit, of_bytes=corpus.tokenizer.kind == "bytes"),
        **sizes.shape,
    }
    if fitted["heads"] == 1 and sizes.attn_dim_head is None:
        fitted["attn_dim_head"] = fitted["dim"]  # as x-transformers has it for one head
    tokenizer = corpus.tokenizer
    return ModelConfig(
        num_tokens=tokenizer.num_tokens,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        **fitted,
    )


def _long_length(pieces: Iterable[npt.NDArray[np.int64]]) -> int:
    """Tokens of the longest text, but no more than twice those that all but a thousandth of the texts stay under: a
    corpus may have a giant among its sentences. Lengths that no model reads count as one."""
    counts = np.zeros(LONGEST_SEQUENCE + 1, dtype=np.int64)
    for lengths_N in pieces:
        counts += np.bincount(np.minimum(lengths_N, LONGEST_SEQUENCE), minlength=len(counts))
    longest = int(np.flatnonzero(counts)[-1])
    rank = np.ceil(0.999 * (counts.sum() - 1))
    return min(longest, 2 * int(np.searchsorted(np.cumsum(counts), rank, side="right")))
