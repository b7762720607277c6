"""One frozen dataclass per concern; every field is checked where it is set.

Fields that the seed class has too carry its argument names (`x_transformers.gpt_vae.GPTVAE`), so that a flag,
a field and a keyword never have to be mapped onto each other.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gptvae_cli.errors import ConfigError

Unit = Literal["line", "paragraph", "file", "window"]
UNITS: tuple[Unit, ...] = get_args(Unit)
TABLES = ("run", "data", "model", "train")
Objective = Literal["elbo", "stock"]
DType = Literal["auto", "float32", "bfloat16"]
PathKind = Literal["slerp", "lerp"]


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field.replace('_', '-')} is {value!r}, it must be {allowed}")


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, field, value, "one of " + ", ".join(allowed))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture, as it is stored in a model file. Lengths are in tokens, BOS and EOS counted.

    Args:
        num_tokens: size of the vocabulary, the three special tokens counted.
        dim: width of the residual stream of encoder and decoder.
        depth: layers of the decoder.
        enc_depth: layers of the encoder.
        max_seq_len: longest sequence `BOS text EOS`; longer texts are cut.
        dim_latent: width Z of the latent.
        heads: attention heads of every layer.
        attn_dim_head: width of one head; half of it is rotated by position.
        pad_id, bos_id, eos_id: the special tokens.
    """

    num_tokens: int
    dim: int
    depth: int
    enc_depth: int
    max_seq_len: int
    dim_latent: int
    heads: int
    attn_dim_head: int = 64
    pad_id: int
    bos_id: int
    eos_id: int

    def __post_init__(self) -> None:
        for name in ("dim", "dim_latent", "heads"):
            _require(1 <= getattr(self, name) <= 65536, name, getattr(self, name), "between 1 and 65536")
        for name in ("depth", "enc_depth"):
            _require(1 <= getattr(self, name) <= 1024, name, getattr(self, name), "between 1 and 1024")
        _require(4 <= self.num_tokens <= 2**22, "num_tokens", self.num_tokens, "between 4 and 4194304")
        _require(3 <= self.max_seq_len <= 2**20, "max_seq_len", self.max_seq_len, "between 3 and 1048576")
        _require(
            8 <= self.attn_dim_head <= 1024 and self.attn_dim_head % 4 == 0,
            "attn_dim_head",
            self.attn_dim_head,
            "a multiple of 4 between 8 and 1024",
        )
        # x-transformers gives a single head no output product that could bring it back to the width of the model.
        _require(
            self.heads > 1 or self.attn_dim_head == self.dim,
            "attn_dim_head",
            self.attn_dim_head,
            f"dim ({self.dim}) where there is one head",
        )
        specials = (self.pad_id, self.bos_id, self.eos_id)
        _require(
            len(set(specials)) == 3 and all(0 <= i < self.num_tokens for i in specials),
            "pad_id, bos_id, eos_id",
            specials,
            f"three different tokens below {self.num_tokens}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a text is, and how a corpus becomes one.

    Args:
        unit: `line`, `paragraph` (blank-line separated), `file`, or `window` (random crops of a running text).
        field: the key that holds the text in `.jsonl` corpora.
        valid: a file of held-out texts, or the share of the texts to hold out.
        latents_from: a file of texts for the encoder, aligned with the corpus (the seed's `seq_for_latents`).
        tokenizer: `auto`, `bytes`, `bpe` or the path of a `tokenizers` JSON file.
        vocab_size: tokens that a trained BPE may have at most; None chooses by the size of the corpus.
    """

    unit: Unit = "line"
    field: str = "text"
    valid: str = "0.05"
    latents_from: str | None = None
    tokenizer: str = "auto"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        _one_of("unit", self.unit, UNITS)
        if self.vocab_size is not None:
            _require(256 <= self.vocab_size <= 2**20, "vocab_size", self.vocab_size, "between 256 and 1048576")
        share = self.valid_share
        if share is not None:
            _require(0 < share <= 0.5, "valid", self.valid, "a file or a share above 0 and up to 0.5")
        if self.latents_from is not None:
            _require(
                self.unit != "window",
                "latents_from",
                self.latents_from,
                "used with a unit of line, paragraph or file",
            )

    @property
    def valid_share(self) -> float | None:
        """The share of texts to hold out, or None where `valid` names a file."""
        try:
            return float(self.valid)
        except ValueError:
            return None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model learns. Whichever of `steps`, `epochs` and `max_time` is reached first ends the run.

    Args:
        objective: `elbo` (nats per token, see `objective.py`) or `stock` (the seed's own units).
        steps: optimizer steps.
        epochs: passes over the corpus.
        max_time: seconds for the whole process, start-up and final evaluation included.
        batch_tokens: target tokens of one optimizer step, about.
        accumulate: micro-batches that one step is cut into.
        lr: peak learning rate of AdamW; None is 2e-3 at a width of 128, falling with its square root.
        weight_decay: decoupled, on matrices only.
        warmup: share of the run over which the learning rate rises from 0.
        decay: share of the run, at its end, over which it falls to 0.
        clip: largest norm of the gradient.
        vae_kl_loss_weight: beta; 1 is the ELBO (with objective `elbo`).
        kl_warmup: share of the run over which beta rises from 0.
        vae_kl_div_floor: free bits, nats per latent dimension (arXiv 1606.04934, eq. 15).
        target_rate: free bits, nats per text, all dimensions together: the KL costs nothing below it, and the
            objective seldom pays for more.
        latents_dropout_prob: share of the rows whose latent is dropped; 1 trains a language model without one.
        bag_of_words: weight of the auxiliary loss that predicts a text's tokens, unordered, from z.
        word_dropout: share of the decoder's input tokens that are hidden at the start of training, falling
            linearly to 0 at half of the run.
        seed: of weights, data order and noise.
        strict: fail when the latent has collapsed.
    """

    objective: Objective = "elbo"
    steps: int | None = None
    epochs: float | None = None
    max_time: float | None = 600.0
    batch_tokens: int = 2048
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.02
    decay: float = 0.3
    clip: float = 1.0
    vae_kl_loss_weight: float = 1.0
    kl_warmup: float = 0.3
    vae_kl_div_floor: float = 0.0
    target_rate: float = 8.0
    latents_dropout_prob: float = 0.1
    bag_of_words: float = 1.0
    word_dropout: float = 0.0
    seed: int = 0
    strict: bool = False

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, get_args(Objective))
        _require(
            not (self.steps is None and self.epochs is None and self.max_time is None),
            "steps, epochs, max_time",
            None,
            "set, one of them at least",
        )
        for name in ("steps", "epochs", "max_time", "lr"):
            value = getattr(self, name)
            if value is not None:
                _require(0 < value < float("inf"), name, value, "above 0")
        for name, least in (("batch_tokens", 16), ("accumulate", 1)):
            _require(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        _require(0 < self.clip < float("inf"), "clip", self.clip, "above 0")
        for name in ("weight_decay", "vae_kl_loss_weight", "vae_kl_div_floor", "target_rate", "bag_of_words"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "0 or more")
        for name in ("warmup", "decay", "kl_warmup", "latents_dropout_prob"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _require(0 <= self.word_dropout < 1, "word_dropout", self.word_dropout, "at least 0 and below 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2^63 - 1")

    @property
    def without_latent(self) -> bool:
        """Whether only the decoder learns: a baseline, whose encoder stays as random as it began."""
        return self.latents_dropout_prob == 1


STOCK_RECIPE: dict[str, Any] = {
    "kl_warmup": 0.0,
    "vae_kl_div_floor": 0.0,
    "target_rate": 0.0,
    "latents_dropout_prob": 0.5,
    "bag_of_words": 0.0,
}
"""What `objective="stock"` means where nothing else is said: the seed class's defaults."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How tokens are chosen, in this order: temperature, top-k, top-p, min-p, one uniform number.

    Args:
        temperature: divides the logits; 1 is the model's own distribution.
        top_k: keep the k likeliest tokens.
        top_p: keep the smallest set of likeliest tokens whose share is at least p (arXiv 1904.09751).
        min_p: keep tokens at least this share as likely as the likeliest (arXiv 2407.01082).
        greedy: always the likeliest token; the four above are then unused.
        max_tokens: longest continuation in tokens; None is the model's `max_seq_len`.
        seed: names the noise; row and copy select within it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    greedy: bool = False
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Where denormals count as zero, dividing by one is dividing by zero.
        usable = sys.float_info.min <= self.temperature < float("inf")
        _require(usable, "temperature", self.temperature, "above 0 (or use --greedy)")
        if self.top_k is not None:
            _require(self.top_k >= 1, "top_k", self.top_k, "at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None:
                _require(0 < value <= 1, name, value, "above 0 and up to 1")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2^63 - 1")


Config = TypeVar("Config", ModelConfig, DataConfig, TrainConfig, SampleConfig)


def to_dict(config: ModelConfig | DataConfig | TrainConfig | SampleConfig) -> dict[str, Any]:
    """The fields as JSON values."""
    return asdict(config)


def from_dict(kind: type[Config], values: Mapping[str, object]) -> Config:
    """Builds a config from JSON or TOML values, checking names and types before the config checks the values.

    Raises:
        ConfigError: for an unknown or missing field or a value of another type.
    """
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{kind.__name__} has no field {unknown[0]!r}", hint="known fields: " + ", ".join(known))
    for name, value in values.items():
        _require(_fits(value, hints[name]), name, value, f"of type {_type_name(hints[name])}")
    try:
        return kind(**values)  # type: ignore[arg-type]
    except TypeError as error:
        missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
        raise ConfigError(f"{kind.__name__} needs a value for {', '.join(missing)}") from error


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if get_args(hint):
        return any(_fits(value, option) for option in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    options = get_args(hint)
    if get_origin(hint) is Literal:
        return "text"
    names = [_type_name(option) for option in options] if options else [getattr(hint, "__name__", str(hint))]
    return " or ".join("nothing" if name == "NoneType" else name for name in names)


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """A configuration file: tables named `run`, `data`, `model` and `train`, see `to_toml`.

    Raises:
        ConfigError: for a file that is missing, not TOML, or has a table of another name.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"the configuration {path} is not TOML: {error}") from error
    for name, table in tables.items():
        if name not in TABLES or not isinstance(table, dict):
            raise ConfigError(
                f"the configuration {path} has {name!r} at its top, known tables are {', '.join(TABLES)}",
                hint="gptvae train --print-config shows the form",
            )
    return tables


def to_toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of strings, numbers, booleans and lists of strings as TOML; values of None are left out."""
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]"]
        lines += [f"{key} = {_toml_value(value)}" for key, value in table.items() if value is not None]
        lines += [""]
    return "\n".join(lines)


def _toml_value(value: object) -> str:
    # JSON is TOML here but for two things: escaped surrogate pairs (so nothing is escaped), and a bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
