"""A model for a corpus, the limits of a run and a machine: finds what the rules of `sizing.py` need to know."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from gptvae_cli import sizing
from gptvae_cli.config import LONGEST_SEQUENCE, DataConfig, ModelConfig, SizeConfig, TrainConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import Rows
from gptvae_cli.device import Device, Precision
from gptvae_cli.training import tokens_per_second

_FASTEST = 100_000.0
"""Tokens a second, of `small`, that no two cores reach: where even they would be too few, none need be measured."""


def fit_preset(
    corpus: Corpus,
    data: DataConfig,
    config: TrainConfig,
    sizes: SizeConfig,
    device: Device,
    precision: Precision,
) -> tuple[str, str]:
    """The preset that the limits of a run leave time for, on this machine where they are of time, and why.

    Args:
        corpus, data, config: what to learn, and until when.
        sizes: that were asked for.
        device, precision: where and in what to compute. A CPU's speed is measured where it decides; that takes seconds.
    """
    model = fit_sizes(corpus, data, sizing.MEASURED, sizes)
    rows = Rows(corpus.train, model, window=data.unit == "window", source=corpus.train_source)
    tokens = math.inf if config.steps is None else config.steps * config.batch_tokens
    if config.epochs is not None:
        tokens = min(tokens, config.epochs * len(rows) * rows.mean_width())
    if device.device.type != "cpu":
        return sizing.choose_preset_on_gpu(config.max_time, tokens)
    if config.max_time is not None:
        tokens = min(tokens, config.max_time * _FASTEST)
        if tokens >= sizing.ENOUGH_TOKENS:
            speed = tokens_per_second(model, config, rows, device.device, precision.dtype)
            tokens = min(tokens, config.max_time * speed)
    return sizing.choose_preset(tokens)


def fit_sizes(corpus: Corpus, data: DataConfig, preset: str, sizes: SizeConfig) -> ModelConfig:
    """The sizes of a preset, a length that fits the corpus, and the default conditioning.

    Args:
        corpus, data: what to learn.
        preset: a name from `sizing.PRESETS`.
        sizes: that were asked for, and win.

    Raises:
        ConfigError: for sizes that do not go together.
    """
    stores = [corpus.train] if corpus.train_source is None else [corpus.train, corpus.train_source]
    long_length = max(_long_length(store.lengths()) for store in stores) + 2
    fitted: dict[str, Any] = {
        **asdict(sizing.PRESETS[preset]),
        "dim_latent": sizing.LATENT_WIDTH,
        "conditioning": sizing.CONDITIONING,
        "max_seq_len": sizing.choose_max_seq_len(long_length, data.unit, of_bytes=corpus.tokenizer.kind == "bytes"),
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
    corpus may have a giant among its sentences. Lengths that no model reads count as one.

    Args:
        pieces: lengths in tokens.
    """
    counts = np.zeros(LONGEST_SEQUENCE + 1, dtype=np.int64)
    for lengths_N in pieces:
        counts += np.bincount(np.minimum(lengths_N, LONGEST_SEQUENCE), minlength=len(counts))
    longest = int(np.flatnonzero(counts)[-1])
    rank = np.ceil(0.999 * (counts.sum() - 1))
    return min(longest, 2 * int(np.searchsorted(np.cumsum(counts), rank, side="right")))
