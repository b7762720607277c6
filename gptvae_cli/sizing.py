"""How large a model a corpus and a given time can fill: plain arithmetic, every choice with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from gptvae_cli.config import ConditioningName, ModelConfig, Unit


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
    "small": Preset(dim=192, depth=4, enc_depth=2, heads=3),
    "medium": Preset(dim=256, depth=6, enc_depth=3, heads=4),
    "large": Preset(dim=512, depth=8, enc_depth=4, heads=8),
}

LATENT_WIDTH = 32
CONDITIONING: ConditioningName = "bos"
MEASURED = "small"
"""The preset whose speed tells what there is time for."""
ENOUGH_TOKENS = 5e6
PLENTY_OF_TOKENS = 2e8


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


def preset_of(config: ModelConfig) -> str | None:
    """The name of the preset that has the sizes of a model, or None."""
    sizes = Preset(dim=config.dim, depth=config.depth, enc_depth=config.enc_depth, heads=config.heads)
    return next((name for name, values in PRESETS.items() if values == sizes), None)


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
