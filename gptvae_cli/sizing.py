"""How large a model a corpus and a given time can fill: plain arithmetic, every choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from gptvae_cli.config import ModelConfig, Unit, did_you_mean
from gptvae_cli.errors import FieldError


@dataclass(frozen=True)
class Preset:
    """Widths and depths under one name."""

    dim: int
    depth: int
    enc_depth: int
    heads: int


PRESETS = {
    "nano": Preset(dim=64, depth=3, enc_depth=2, heads=2),
    "micro": Preset(dim=128, depth=4, enc_depth=1, heads=2),
    "small": Preset(dim=192, depth=4, enc_depth=1, heads=3),
    "medium": Preset(dim=256, depth=6, enc_depth=3, heads=4),
    "large": Preset(dim=512, depth=8, enc_depth=4, heads=8),
}

LATENT_WIDTH = 32


def choose_preset(seconds: float | None, *, accelerated: bool) -> tuple[str, str]:
    """The preset that learns most in the time given, and why.

    On Tatoeba's sentences, in ten minutes of one CPU thread, `small` gave an importance-weighted NLL of 30.5 nats
    a text and `micro` 30.9; on Wikipedia's longer ones, in four, 148.0 and 145.8 (`tests/benchmarks/latent/`). Hence
    twenty minutes of a thread, ten of two. The other bounds are rules of thumb.

    Args:
        seconds: of training; None is without a limit.
        accelerated: whether a GPU does the work.
    """
    if accelerated:
        name = "medium" if seconds is not None and seconds < 1800 else "large"
        return name, "a GPU trains it"
    if seconds is None or seconds > 4 * 3600:
        return "medium", "hours on a CPU"
    if seconds >= 600:
        return "small", "ten minutes or more on a CPU"
    return "micro", "less than ten minutes on a CPU"


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ConfigError: for a name that there is not.
    """
    if name not in PRESETS:
        raise FieldError("preset", name, f"auto or one of {', '.join(PRESETS)}", hint=did_you_mean(name, PRESETS))
    return PRESETS[name]


def preset_of(config: ModelConfig) -> str | None:
    """The name of the preset that has the sizes of a model, or None."""
    sizes = Preset(dim=config.dim, depth=config.depth, enc_depth=config.enc_depth, heads=config.heads)
    return next((name for name, values in PRESETS.items() if values == sizes), None)


def choose_max_seq_len(long_length: int, unit: Unit) -> int:
    """Longest sequence of the model, in tokens.

    Args:
        long_length: tokens that all but a thousandth of the texts stay under, BOS and EOS counted.
        unit: windows are as long as the model, so their length is a choice and not a finding.
    """
    if unit == "window":
        return 128
    return min(256, max(16, -(-long_length // 8) * 8))
