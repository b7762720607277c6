"""Sizes fitted to the time, the device and the corpus."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from gptvae_cli.config import ModelConfig
from gptvae_cli.errors import ConfigError
from gptvae_cli.sizing import LATENT_WIDTH, PRESETS, choose_max_seq_len, choose_preset, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model(name: str) -> None:
    specials = {"num_tokens": 259, "pad_id": 256, "bos_id": 257, "eos_id": 258}
    config = ModelConfig(**asdict(preset(name)), **specials, max_seq_len=64, dim_latent=LATENT_WIDTH)
    assert config.heads * config.attn_dim_head >= config.dim


def test_presets_grow() -> None:
    sizes = [chosen.dim**2 * (chosen.depth + chosen.enc_depth) for chosen in PRESETS.values()]
    assert sizes == sorted(set(sizes))


def test_an_unknown_preset_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="preset is 'huge', it must be auto or one of nano, micro, small, medium"):
        preset("huge")


@pytest.mark.parametrize("accelerated", [False, True])
def test_more_time_never_means_a_smaller_model(accelerated: bool) -> None:
    order = list(PRESETS)
    times = [1.0, 60.0, 599.0, 600.0, 1800.0, 1801.0, 3600.0, 4 * 3600.0, 4 * 3600.0 + 1, 1e6, None]
    chosen = [order.index(choose_preset(seconds, accelerated=accelerated)[0]) for seconds in times]
    assert chosen == sorted(chosen)
    assert len(set(chosen)) > 1


@pytest.mark.parametrize(
    ("seconds", "accelerated", "name"),
    [(599.0, False, "micro"), (600.0, False, "small"), (8 * 3600.0, False, "medium"), (600.0, True, "medium")],
    ids=["minutes", "more", "a-night", "gpu"],
)
def test_the_preset_fits_time_and_device_and_says_why(seconds: float, accelerated: bool, name: str) -> None:
    found, reason = choose_preset(seconds, accelerated=accelerated)
    assert found == name
    assert ("GPU" in reason) == accelerated


@pytest.mark.parametrize(
    ("long_length", "expected"),
    [(3, 16), (16, 16), (17, 24), (24, 24), (250, 256), (257, 256), (10_000, 256)],
)
def test_the_longest_sequence_is_what_the_corpus_needs_within_bounds(long_length: int, expected: int) -> None:
    """Rounded up to 8; more than 256 has to be asked for, as its price grows with the square."""
    assert choose_max_seq_len(long_length, "line") == expected
    assert choose_max_seq_len(long_length, "file") == expected


def test_windows_have_a_length_of_their_own() -> None:
    assert choose_max_seq_len(3, "window") == choose_max_seq_len(10**6, "window") == 128
