"""One frozen dataclass per concern; every field is checked where it is set.

Fields that the seed class has too carry its argument names (`x_transformers.gpt_vae.GPTVAE`), so that a flag,
a field and a keyword never have to be mapped onto each other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from gptvae_cli.errors import ConfigError, FieldError

Unit = Literal["line", "paragraph", "file", "window"]
PresetName = Literal["auto", "nano", "micro", "small", "medium", "large"]
Errors = Literal["strict", "replace"]
LONGEST_SEQUENCE = 2**20
"""What a model's `max_seq_len` may be at most."""
Objective = Literal["elbo", "stock"]
Log = Literal["tensorboard"]
OnCollapse = Literal["treat", "warn"]
DType = Literal["auto", "float32", "bfloat16"]
PathKind = Literal["slerp", "lerp"]
ConditioningName = Literal["token", "bos"]
DEVICE = re.compile(r"auto|cpu|cuda(?::([0-9]{1,4}))?")
"""The names of devices; the group is the number of a GPU."""


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise FieldError(field, value, allowed)


def _each(config: object, allowed: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Checks fields of a config by themselves; None is one that is not set."""
    for name in names:
        value = getattr(config, name)
        _require(value is None or holds(value), name, value, allowed)


def _one_of(field: str, value: object, kind: Any) -> None:
    """Checks a field whose type is a `Literal`."""
    if value not in get_args(kind):
        words = get_args(kind)
        raise FieldError(field, value, "one of " + ", ".join(words), hint=did_you_mean(str(value), words))


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """A hint for a word that is not known but looks like one that is."""
    matches = get_close_matches(word, known, n=2)
    return f"did you mean {' or '.join(matches)}?" if matches else None


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
        conditioning: how a latent enters the decoder, see `conditioning.py`.
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
    conditioning: ConditioningName

    def __post_init__(self) -> None:
        _check_sizes(self)
        _one_of("conditioning", self.conditioning, ConditioningName)
        _each(self, "between 4 and 4194304", lambda n: 4 <= n <= 2**22, "num_tokens")
        if self.heads == 1:
            _check_one_head(self.dim, self.attn_dim_head)
        specials = (self.pad_id, self.bos_id, self.eos_id)
        _require(
            len(set(specials)) == 3 and all(0 <= i < self.num_tokens for i in specials),
            "pad_id, bos_id, eos_id",
            specials,
            f"three different tokens below {self.num_tokens}",
        )

    @property
    def preset(self) -> str | None:
        """The name of the preset that has these sizes, or None."""
        sizes = Preset(dim=self.dim, depth=self.depth, enc_depth=self.enc_depth, heads=self.heads)
        return next((name for name, values in PRESETS.items() if values == sizes), None)


def _check_one_head(dim: int, width: int) -> None:
    """x-transformers gives a single head no output product that could bring it back to the width of the model."""
    _require(width == dim, "attn_dim_head", width, f"dim ({dim}) where there is one head")


def _check_sizes(sizes: ModelConfig | SizeConfig) -> None:
    """What holds of every size by itself, where it is set."""
    _each(sizes, "between 1 and 65536", lambda n: 1 <= n <= 65536, "dim", "dim_latent", "heads")
    _each(sizes, "between 1 and 1024", lambda n: 1 <= n <= 1024, "depth", "enc_depth")
    _each(sizes, f"between 3 and {LONGEST_SEQUENCE}", lambda n: 3 <= n <= LONGEST_SEQUENCE, "max_seq_len")
    _each(sizes, "a multiple of 4 between 8 and 1024", lambda n: 8 <= n <= 1024 and n % 4 == 0, "attn_dim_head")


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


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """The model that was asked for; None is left to the preset, the corpus or the default.

    Args:
        preset: a name from `PRESETS`, or `auto`.
        dim, depth, enc_depth, heads, attn_dim_head, dim_latent, max_seq_len, conditioning: as in `ModelConfig`.
    """

    preset: PresetName = "auto"
    dim: int | None = None
    depth: int | None = None
    enc_depth: int | None = None
    heads: int | None = None
    attn_dim_head: int | None = None
    dim_latent: int | None = None
    max_seq_len: int | None = None
    conditioning: ConditioningName | None = None

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, PresetName)
        if self.conditioning is not None:
            _one_of("conditioning", self.conditioning, ConditioningName)
        _check_sizes(self)
        if self.heads == 1 and self.dim is not None and self.attn_dim_head is not None:
            _check_one_head(self.dim, self.attn_dim_head)

    @property
    def shape(self) -> dict[str, Any]:
        """The fields of `ModelConfig` that are set."""
        return {name: value for name, value in asdict(self).items() if name != "preset" and value is not None}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run reads and where it goes.

    Args:
        corpus: files and folders, `-` for standard input; nothing is standard input, too.
        out: the run folder.
    """

    corpus: list[str] = field(default_factory=list)
    out: str = "gptvae-run"

    def __post_init__(self) -> None:
        _require(self.out != "", "out", self.out, "the name of a folder")


@dataclass(frozen=True, kw_only=True)
class MachineConfig:
    """What a run computes with, see `device.py`.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:n`.
        dtype: `auto` asks the hardware.
        threads: of the CPU; None is torch's own choice.
    """

    device: str = "auto"
    dtype: DType = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        _each(self, "auto, cpu, cuda or cuda:n", lambda name: DEVICE.fullmatch(name) is not None, "device")
        _one_of("dtype", self.dtype, DType)
        _each(self, "between 1 and 4096", lambda n: 1 <= n <= 4096, "threads")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """What a text is.

    Args:
        unit: `line`, `paragraph` (blank-line separated), `file`, or `window` (random crops of a running text).
        field: the key, or the column, that holds the text in `.jsonl`, `.csv` and `.parquet` files.
        errors: what bytes that are not UTF-8 are: `strict` an error, `replace` U+FFFD.
    """

    unit: Unit = "line"
    field: str = "text"
    errors: Errors = "strict"

    def __post_init__(self) -> None:
        _one_of("unit", self.unit, Unit)
        _one_of("errors", self.errors, Errors)

    def overridden(self, *, unit: Unit | None, field: str | None, errors: Errors | None) -> TextConfig:
        """The same, but for what is given."""
        return TextConfig(unit=unit or self.unit, field=field or self.field, errors=errors or self.errors)


@dataclass(frozen=True, kw_only=True)
class DataConfig(TextConfig):
    """What a text is, and what is made of a corpus.

    Args:
        unit, field, errors: as in `TextConfig`.
        valid: a file of held-out texts, or the share of the texts to hold out.
        latents_from: a file of texts for the encoder, aligned with the corpus (the seed's `seq_for_latents`).
        tokenizer: `auto`, `bytes`, `bpe` or the path of a `tokenizers` JSON file.
        vocab_size: tokens that a trained BPE may have at most, and a wish for one where the tokenizer is `auto`; None
            chooses by the size of the corpus.
    """

    valid: str = "0.05"
    latents_from: str | None = None
    tokenizer: str = "auto"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _each(self, "between 256 and 1048576", lambda n: 256 <= n <= 2**20, "vocab_size")
        if self.vocab_size is not None and self.tokenizer not in ("auto", "bpe"):
            allowed = f"left out where the tokenizer is {self.tokenizer}, whose size is given"
            raise FieldError("vocab_size", self.vocab_size, allowed, hint="--tokenizer bpe")
        share = self.valid_share
        _require(share is None or 0 < share <= 0.5, "valid", self.valid, "a file or a share above 0 and up to 0.5")
        _each(self, "used with a unit of line, paragraph or file", lambda _: self.unit != "window", "latents_from")

    @property
    def valid_share(self) -> float | None:
        """The share of texts to hold out, or None where `valid` names a file."""
        try:
            return float(self.valid)
        except ValueError:
            return None

    @property
    def valid_file(self) -> str | None:
        """The file of held-out texts, or None where `valid` is a share."""
        return self.valid if self.valid_share is None else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model learns. Whichever of `steps`, `epochs` and `max_time` is reached first ends the run.

    Args:
        objective: `elbo` (nats per token, see `objective.py`) or `stock` (the seed's own units).
        steps: optimizer steps.
        epochs: passes over the corpus.
        max_time: seconds for the whole process, start-up and final evaluation included.
        batch_tokens: of one optimizer step, about; BOS, EOS and padding are counted.
        accumulate: micro-batches that one step is cut into.
        lr: peak learning rate of AdamW, of embeddings ten times as much; None is 2e-3 at a width of 128, falling with
            its square root.
        weight_decay: decoupled, on matrices only.
        warmup: share of the run over which the learning rate rises from 0.
        decay: share of the run, at its end, over which it falls to 0.
        clip: largest norm of the gradient.
        vae_kl_loss_weight: beta; 1 is the ELBO (with objective `elbo`).
        kl_warmup: share of the run over which beta rises from 0.
        vae_kl_div_floor: free bits, nats per latent dimension (arXiv 1606.04934, eq. 15).
        target_rate: free bits, nats per text, all dimensions together: the KL costs nothing below it, and the
            objective seldom pays for more.
        latents_dropout_prob: share of the rows whose latent is dropped, from half of the run on; before, of objective
            `elbo`, falling from five times as many, up to a half. 1 trains a language model without a latent.
        bag_of_words: weight of the auxiliary loss that predicts a text's tokens, unordered, from z.
        word_dropout: share of the decoder's input tokens that are hidden at the start of training, falling
            linearly to 0 at half of the run.
        dropout: share of what each block of the decoder adds to the residual stream that is dropped, the same along a
            text (arXiv 1512.05287), after eight passes over the corpus: less before, more later, and of its embedded
            tokens and last states, too (`dropout_shares`). Nothing of the encoder.
        seed: of weights, data order and noise.
        on_collapse: what a latent that is not being used brings about: `treat` changes the rest of the run, see
            `doctor.py`; `warn` only says so.
        strict: fail when the latent has collapsed.
        log: what is written besides `metrics.jsonl`.
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
    dropout: float = 0.1
    seed: int = 0
    on_collapse: OnCollapse = "treat"
    strict: bool = False
    log: Log | None = None

    def __post_init__(self) -> None:
        _one_of("objective", self.objective, Objective)
        _one_of("on_collapse", self.on_collapse, OnCollapse)
        if self.log is not None:
            _one_of("log", self.log, Log)
        limited = (self.steps, self.epochs, self.max_time) != (None, None, None)
        _require(limited, "steps, epochs, max_time", None, "set, one of them at least")
        _each(self, "above 0", lambda x: 0 < x < float("inf"), "steps", "epochs", "max_time", "lr", "clip")
        _each(self, "at least 16", lambda n: n >= 16, "batch_tokens")
        _each(self, "at least 1", lambda n: n >= 1, "accumulate")
        costs = ("weight_decay", "vae_kl_loss_weight", "vae_kl_div_floor", "target_rate", "bag_of_words")
        _each(self, "between 0 and 1e9", lambda x: 0 <= x <= 1e9, *costs)
        shares = ("warmup", "decay", "kl_warmup", "latents_dropout_prob")
        _each(self, "between 0 and 1", lambda x: 0 <= x <= 1, *shares)
        _each(self, "at least 0 and below 1", lambda x: 0 <= x < 1, "word_dropout", "dropout")
        _each(self, "between 0 and 2^63 - 1", lambda n: 0 <= n < 2**63, "seed")

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
    "dropout": 0.0,
    "on_collapse": "warn",
}
"""What `objective="stock"` means where nothing else is said: the seed class's defaults."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How tokens are chosen, in this order: guidance, temperature, top-k, top-p, min-p, one uniform number.

    Args:
        guidance: how far to go from the logits without the latent to those with it; 1 is the model's own distribution,
            and beyond it a text keeps closer to its latent (classifier-free guidance, arXiv 2306.17806).
        temperature: divides the logits; 1 is the model's own distribution.
        top_k: keep the k likeliest tokens.
        top_p: keep the smallest set of likeliest tokens whose share is at least p (arXiv 1904.09751).
        min_p: keep tokens at least this share as likely as the likeliest (arXiv 2407.01082).
        greedy: always the likeliest token; of those above only guidance is used then.
        max_tokens: longest continuation in tokens; None is one less than the model's `max_seq_len`.
        seed: names the noise; row and copy select within it.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    greedy: bool = False
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        # Of Python or of NumPy: these come from callers in Python, too. Python's count without end.
        for names, kind, plain, allowed in (
            (("top_k", "max_tokens", "seed"), Integral, int, "a whole number"),
            (("guidance", "temperature", "top_p", "min_p"), Real, float, "a number"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is None and name not in ("guidance", "temperature", "seed"):
                    continue
                _require(isinstance(value, kind) and not isinstance(value, bool), name, value, allowed)
                with suppress(OverflowError):
                    object.__setattr__(self, name, plain(value))
        _each(self, "between 0 and 1000", lambda x: 0 <= x <= 1000, "guidance")
        # Where denormals count as zero, dividing by one is dividing by zero.
        usable = self.greedy or sys.float_info.min <= self.temperature <= sys.float_info.max
        _require(usable, "temperature", self.temperature, "above 0 (or use --greedy)")
        _each(self, "at least 1", lambda n: n >= 1, "top_k", "max_tokens")
        _each(self, "above 0 and up to 1", lambda x: 0 < x <= 1, "top_p", "min_p")
        _each(self, "between 0 and 2^63 - 1", lambda n: 0 <= n < 2**63, "seed")


AnyConfig = ModelConfig | DataConfig | TrainConfig | SampleConfig | RunConfig | SizeConfig | MachineConfig
Config = TypeVar("Config", bound=AnyConfig)


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
        _require(fits(value, hints[name]), name, value, type_name(hints[name]))
    try:
        return kind(**values)  # type: ignore[arg-type]
    except TypeError as error:
        missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
        raise ConfigError(f"{kind.__name__} needs a value for {', '.join(missing)}") from error


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the type of a field; a choice only has to be text."""
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(fits(item, get_args(hint)[0]) for item in value)
    if get_args(hint):
        return any(fits(value, option) for option in get_args(hint))
    if hint is float:  # a whole number may be larger than any of these
        return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}


def type_name(hint: Any) -> str:
    """The type of a field in words."""
    if get_origin(hint) is Literal:
        return "text"
    if get_origin(hint) is list:
        return "a list of texts"
    if options := get_args(hint):
        return " or ".join(map(type_name, options))
    return _TYPE_NAMES[hint]
