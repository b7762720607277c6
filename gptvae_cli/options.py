"""Where the options of a training run are given: flags, over a TOML file, over the environment, over the defaults.

Each place is a `Layer` of values under the same keys, the fields of the configs. The layers are merged and the
configs built from what is left on top; a layer knows what its place calls an option, so an error can say it.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gptvae_cli import __version__
from gptvae_cli.config import (
    CONDITIONING,
    LATENT_WIDTH,
    STOCK_RECIPE,
    Config,
    DataConfig,
    MachineConfig,
    RunConfig,
    SizeConfig,
    TrainConfig,
    did_you_mean,
    fits,
    from_dict,
    type_name,
)
from gptvae_cli.errors import ConfigError, FieldError

Options = RunConfig | DataConfig | SizeConfig | TrainConfig | MachineConfig
TABLES: dict[str, type[Options]] = {
    "run": RunConfig,
    "data": DataConfig,
    "model": SizeConfig,
    "train": TrainConfig,
    "machine": MachineConfig,
}
"""The tables of a configuration file. No two of them have a key in common, so a key alone names an option."""

KINDS: dict[str, type[Options]] = {field.name: kind for kind in TABLES.values() for field in fields(kind)}
"""The table of every key."""
_DEFAULTS = {kind: kind() for kind in TABLES.values()}

UNSET = {
    "corpus": "standard input",
    "latents_from": "the texts themselves",
    "vocab_size": "by the corpus",
    **dict.fromkeys(("dim", "depth", "enc_depth", "heads"), "by the preset"),
    "attn_dim_head": "64",
    "dim_latent": str(LATENT_WIDTH),
    "max_seq_len": "by the corpus",
    "conditioning": CONDITIONING,
    **dict.fromkeys(("steps", "epochs", "max_time"), "no limit"),
    "lr": "by the width of the model",
    "log": "metrics.jsonl alone",
    "threads": "as torch finds best",
}
"""What it means that an option is not set."""
_LIMITS = ("steps", "epochs", "max_time")


def default_in_words(key: str) -> str:
    """The default of an option as help and README say it; nothing for what is off."""
    match default := getattr(_DEFAULTS[KINDS[key]], key):
        case None | []:
            return UNSET.get(key, "not set")
        case float() if key == "max_time":
            return f"{default / 60:g}m, none with --steps or --epochs"
        case float():
            return f"{default:g}"
        case _:
            return str(default)


@dataclass(frozen=True)
class Layer:
    """Options of one place: flags, a configuration file or the environment.

    Args:
        values: by their keys in the tables.
        labels: what the place calls each of them.
    """

    values: Mapping[str, object]
    labels: Mapping[str, str]


def flags_layer(flags: Mapping[str, object]) -> Layer:
    """Options from the command line, where None is not given."""
    values = {key: value for key, value in flags.items() if key in KINDS and value is not None}
    return Layer(_read_times(values, "--max-time"), {key: f"--{key.replace('_', '-')}" for key in values})


def environment_layer(environment: Mapping[str, str]) -> Layer:
    """Options from variables such as GPTVAE_DIM_LATENT, which hold what the flag takes; empty ones are not set.

    Raises:
        FieldError: for a value of another type.
    """
    values: dict[str, object] = {}
    labels: dict[str, str] = {}
    for kind in TABLES.values():
        hints = get_type_hints(kind)
        for key in keys(kind):
            name = f"GPTVAE_{key.upper()}"
            if environment.get(name) and key != "corpus":  # a list of paths has no form that all shells share
                values[key], labels[key] = _parsed(key, environment[name], hints[key], name), name
    return Layer(_read_times(values, "GPTVAE_MAX_TIME"), labels)


def misspelt(environment: Mapping[str, str]) -> Iterator[str]:
    """A note on every variable that names no option of gptvae's, and looks as if it should."""
    known = ["model", *KINDS]
    for name in sorted(environment):
        word = name.removeprefix("GPTVAE_").lower()
        if name.startswith("GPTVAE_") and word not in known and (hint := did_you_mean(word, known)):
            yield f"{name} is set and names no option; {hint}"


def _parsed(key: str, text: str, hint: Any, name: str) -> object:
    """A value from text, for one of the types that fields have."""
    kinds = get_args(hint) or (hint,)
    try:
        if bool in kinds:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if int in kinds:
            return int(text)
        if float in kinds and key != "max_time":
            return float(text)
    except (KeyError, ValueError) as error:
        allowed = type_name(next(kind for kind in kinds if kind is not type(None)))
        raise FieldError(key, text, allowed, label=name) from error
    return text


def file_layer(path: Path) -> Layer:
    """Options from a TOML file with the tables of `TABLES`, see `to_toml`.

    A time may be written as for the flag, `"10m"`, and a share of held-out texts as a number.

    Raises:
        ConfigError: for a file that is missing, not TOML, or has a table or a key of another name.
        FieldError: for a value of another type.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise ConfigError(f"the configuration {path} is not TOML: {error}", hint=_FORM) from error
    values: dict[str, object] = {}
    labels: dict[str, str] = {}
    for table, content in tables.items():
        if table not in TABLES or not isinstance(content, dict):
            raise ConfigError(
                f"{path} has {table!r} at its top, its tables are {', '.join(TABLES)}",
                hint=_home(table) or did_you_mean(table, TABLES) or _FORM,
            )
        hints = get_type_hints(TABLES[table])
        for key, value in content.items():
            if key not in hints:
                raise ConfigError(
                    f"{path}, [{table}] has no key {key!r}",
                    hint=_home(key) or did_you_mean(key, hints) or f"known keys: {', '.join(hints)}",
                )
            labels[key] = f"{path}, [{table}] {key}"
            if key == "valid" and fits(value, float):
                value = str(value)
            if not (fits(value, hints[key]) or (key == "max_time" and isinstance(value, str))):
                allowed = type_name(hints[key]).removesuffix(" or nothing")
                raise FieldError(key, value, allowed, label=labels[key])
            values[key] = value
    return Layer(_read_times(values, labels.get("max_time", "")), labels)


_FORM = "gptvae train --print-config shows the form"


def _home(key: str) -> str | None:
    """A hint for a key that stands outside its table."""
    return next((f"it belongs below [{name}]" for name, kind in TABLES.items() if KINDS.get(key) is kind), None)


def keys(kind: type) -> list[str]:
    """The keys of a table."""
    return [field.name for field in fields(kind)]


def _read_times(values: Mapping[str, object], label: str) -> dict[str, object]:
    time = values.get("max_time")
    try:
        return {**values, "max_time": parse_seconds(time)} if isinstance(time, str) else dict(values)
    except FieldError as error:
        raise error.named(label) from None


def parse_seconds(text: str) -> float:
    """Seconds from `90`, `90s`, `10m`, `2h`, `1h30m` or `1d`.

    Raises:
        FieldError: for anything else.
    """
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise FieldError("max_time", text, "a time such as 90s, 10m or 1h30m")
    return sum(float(number) * units[unit] for number, unit in parts)


def merged(layers: Sequence[Layer]) -> Layer:
    """The layers over each other, the last on top."""
    values: dict[str, object] = {}
    labels: dict[str, str] = {}
    for layer in layers:
        values |= layer.values
        labels |= layer.labels
    return Layer(values, labels)


def to_toml(configs: Iterable[Options]) -> str:
    """Configs as the tables of a file that `file_layer` reads; what is not set stands in comments, to be filled in.

    Raises:
        ConfigError: for the name of a file that is not Unicode.
    """
    names = {kind: name for name, kind in TABLES.items()}
    lines: list[str] = []
    for config in configs:
        lines += [f"[{names[type(config)]}]"]
        for key, value in asdict(config).items():
            unset = value is None or value == []
            lines += [f"# {key} =    # {UNSET.get(key, 'not set')}" if unset else f"{key} = {_toml_value(value)}"]
        lines += [""]
    return "\n".join(lines)


def _toml_value(value: object) -> str:
    # JSON is TOML here but for two things: escaped surrogate pairs (so nothing is escaped), and a bare DEL.
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ConfigError(f"{value!r} is not UTF-8, which is all that TOML can hold", hint="rename the file")
    return text


# All of them together -------------------------------------------------------------------------------------------------


class Plan:
    """What was asked for: flags over the configuration file over the environment, as one config a table.

    Args:
        options: of `gptvae train`, by their names in Python; None is not given.
        environment: the variables of the process, of which `--resume` leaves most out.

    Raises:
        ConfigError: for what cannot be, naming the place where it was asked for.
    """

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.flags = flags_layer(options)
        self.has_file = options["config"] is not None
        if options["resume"]:  # which takes nothing else from there
            taken = [f"GPTVAE_{key.upper()}" for key in ("out", *keys(MachineConfig))]
            environment = {name: environment[name] for name in taken if name in environment}
        below = [environment_layer(environment)] + ([file_layer(options["config"])] if self.has_file else [])
        self.asked = merged([*below, self.flags])
        values = dict(self.asked.values)
        if ("steps" in values or "epochs" in values) and "max_time" not in values:
            values["max_time"] = None
        if values.get("objective") == "stock":
            values = {**STOCK_RECIPE, "conditioning": "token", **values}
        with self.naming():
            self.run = _config(RunConfig, values)
            self.data = _config(DataConfig, values)
            self.sizes = _config(SizeConfig, values)
            self.train = _config(TrainConfig, values)
            self.machine = _config(MachineConfig, values)
            # Loading a model checks no such thing: what it was trained with is past.
            if self.train.objective == "stock" and self.train.target_rate > 0:
                raise FieldError("target_rate", self.train.target_rate, "0 with --objective stock, which knows none")
            if self.train.objective == "stock" and self.train.on_collapse == "treat":
                raise FieldError("on_collapse", "treat", "warn with --objective stock, which has no free nats to give")

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Makes an error of a field say where the field was set."""
        try:
            yield
        except FieldError as error:
            label = self.asked.labels.get(error.field)
            raise (error.named(label) if label else error) from error

    def limits_for_resume(self) -> dict[str, Any]:
        """The flags that a resumed run may change: those that say when to stop. The environment is not asked."""
        kept = {key for kind in (DataConfig, SizeConfig, TrainConfig) for key in keys(kind)} - {*_LIMITS, "strict"}
        changed = [label for key, label in self.flags.labels.items() if key in kept]
        if self.has_file:
            changed.append("--config")
        if changed:
            raise ConfigError(
                f"--resume keeps the run's configuration, found {changed[0]}",
                hint="only --max-time, --steps, --epochs and --strict may change",
            )
        limits = {key: self.flags.values[key] for key in _LIMITS if key in self.flags.values}
        if limits:
            limits = dict.fromkeys(_LIMITS) | limits
        return limits | ({"strict": True} if "strict" in self.flags.values else {})

    def to_toml(self) -> str:
        """The configuration as a file that `--config` reads."""
        tables = to_toml((self.run, self.data, self.sizes, self.train, self.machine))
        return f"# gptvae {__version__}; paths are relative to the working directory\n\n{tables}"


def _config(kind: type[Config], values: Mapping[str, object]) -> Config:
    known = keys(kind)
    return from_dict(kind, {key: value for key, value in values.items() if key in known})
