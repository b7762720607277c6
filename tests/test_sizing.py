"""Sizes fitted to the time, the device and the corpus."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from gptvae_cli.config import LATENT_WIDTH, PRESETS, ModelConfig
from gptvae_cli.sizing import choose_max_seq_len, choose_preset, choose_preset_on_gpu


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model(name: str) -> None:
    specials = {"num_tokens": 259, "pad_id": 256, "bos_id": 257, "eos_id": 258}
    sizes: dict[str, Any] = asdict(PRESETS[name]) | specials
    config = ModelConfig(**sizes, max_seq_len=64, dim_latent=LATENT_WIDTH, conditioning="bos")
    assert config.heads * config.attn_dim_head >= config.dim


def test_presets_grow() -> None:
    sizes = [chosen.dim**2 * (chosen.depth + chosen.enc_depth) for chosen in PRESETS.values()]
    assert sizes == sorted(set(sizes))


def test_more_tokens_or_time_never_mean_a_smaller_model() -> None:
    order = list(PRESETS)
    for chosen in (
        [choose_preset(tokens) for tokens in (0.0, 1e3, 1e6, 4.9e6, 5e6, 1e8, 2e8, 1e12, math.inf)],
        [choose_preset_on_gpu(seconds, math.inf) for seconds in (1.0, 600.0, 1800.0, 1e6, None)],
        [choose_preset_on_gpu(None, tokens) for tokens in (1e3, 1e6, 5e6, 1e8, 2e8, math.inf)],
    ):
        places = [order.index(name) for name, _ in chosen]
        assert places == sorted(places)
        assert len(set(places)) > 1


@pytest.mark.parametrize(
    ("tokens", "name", "reason"),
    [(3.94e6, "micro", "less than 5 million tokens"), (5e6, "small", "time for it"), (1e9, "medium", "time for it")],
)
def test_the_preset_fits_what_there_is_time_for_and_says_why(tokens: float, name: str, reason: str) -> None:
    found, why = choose_preset(tokens)
    assert found == name
    assert reason in why


@pytest.mark.parametrize(
    ("long_length", "expected"),
    [(3, 16), (16, 16), (17, 24), (24, 24), (250, 256), (257, 256), (10_000, 256)],
)
def test_the_longest_sequence_is_what_the_corpus_needs_within_bounds(long_length: int, expected: int) -> None:
    """Rounded up to 8; more than 256 has to be asked for, as its price grows with the square."""
    assert choose_max_seq_len(long_length, "line", of_bytes=False) == expected
    assert choose_max_seq_len(long_length, "file", of_bytes=False) == expected


@pytest.mark.parametrize(("long_length", "expected"), [(3, 16), (257, 264), (1024, 1024), (10_000, 1024)])
def test_bytes_say_less_than_other_tokens(long_length: int, expected: int) -> None:
    """A sonnet has six hundred of them."""
    assert choose_max_seq_len(long_length, "file", of_bytes=True) == expected


@pytest.mark.parametrize("of_bytes", [True, False])
def test_windows_have_a_length_of_their_own(of_bytes: bool) -> None:
    assert {choose_max_seq_len(length, "window", of_bytes=of_bytes) for length in (3, 10**6)} == {128}
