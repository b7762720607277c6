"""`gptvae info`: what a model is and how it was trained, read from its header alone, without torch."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from gptvae_cli.cli import console, flags, streams
from gptvae_cli.errors import ConfigError

if TYPE_CHECKING:
    from gptvae_cli.header import Layout

_BUFFERS = (".inv_freq",)
"""Tensors that are stored and not learnt: the frequencies of rotary embeddings."""
_LEFT = len("training  ")
"""Columns of names."""

EXAMPLES = """\
gptvae info
gptvae info names-run
gptvae info model.safetensors --json | jq .training.validation
"""


def info(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A run folder or a .safetensors file. [default: $GPTVAE_MODEL, else ./gptvae-run]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All there is, as one JSON object.")] = False,
    model: flags.ModelOption = None,
    debug: flags.DebugOption = False,
) -> None:
    """Show what a model is and how it was trained; with --json all that its file says of it."""
    from gptvae_cli.header import locate_model, read_layout, reading

    if file is not None and model is not None:
        raise ConfigError("MODEL and --model were both given", hint="leave one of them out")
    path = locate_model(model if file is None else file)
    layout = read_layout(path)
    with reading(path):
        summary = _summary(str(path), layout)
    if as_json:
        streams.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    else:
        # A value may come from a stranger, and hold line breaks or worse.
        rows = ((name, console.one_line(text)) for name, text in _rows(summary) if text)
        streams.write_text("".join(f"{name:<8}  {_fitted(text)}\n" for name, text in rows))


def _fitted(text: str) -> str:
    """A value in lines that fit beside its name on a terminal, where words in several would be hard to read."""
    if not sys.stdout.isatty():
        return text
    room = max(Console().width - _LEFT, 1)
    return f"\n{' ' * _LEFT}".join(textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False))


def _summary(path: str, layout: Layout) -> dict[str, Any]:
    from gptvae_cli.header import DIGEST_KEY, ModelHeader, json_object
    from gptvae_cli.tokenizer import kind_of

    header = ModelHeader.from_metadata(layout.metadata)
    tokenizer = json_object(header.tokenizer, "its tokenizer")
    summary = {
        "file": path,
        "file_bytes": layout.size_bytes,
        "sha256": layout.metadata.get(DIGEST_KEY),
        "format_version": header.format_version,
        "parameters": sum(tensor.numel for name, tensor in layout.tensors.items() if not name.endswith(_BUFFERS)),
        "preset": header.model.preset,
        "has_latent": header.has_latent,
        "model": asdict(header.model),
        "tokenizer": {"kind": kind_of(tokenizer.get("model")), "num_tokens": header.model.num_tokens},
        "data": asdict(header.data),
        "training": header.training,
    }
    # Python reads and writes infinities and NaN, which JSON does not know.
    clean: dict[str, Any] = json.loads(json.dumps(summary), parse_constant=lambda name: None)
    return clean


def _rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What people ask first, named. What stands in `training` may be anything, and is left out where it is not what a
    run writes."""
    from gptvae_cli.config import DataConfig, TrainConfig

    model, data, training = summary["model"], summary["data"], summary["training"]
    version = _told(training, gptvae=", by gptvae {}")
    yield "model", f"{summary['file']}, {summary['file_bytes'] / 1e6:.1f} MB{version}"
    layers = f"encoder of {model['enc_depth']} and decoder of {model['depth']} layers, {model['dim']} wide"
    preset = f"{summary['preset']}: " if summary["preset"] else ""
    yield "size", f"{preset}{summary['parameters']:,} parameters, {layers}"
    latent = f"{model['dim_latent']} dimensions, conditioning {model['conditioning']}"
    yield "latent", latent if summary["has_latent"] else "none: the model is a baseline"
    tokenizer = summary["tokenizer"]
    kind = {"bytes": "bytes", "bpe": f"a BPE of {tokenizer['num_tokens']:,} tokens"}
    own = f"a tokenizer of {tokenizer['num_tokens']:,} tokens from a file"
    yield "texts", f"unit {data['unit']}, up to {model['max_seq_len']:,} tokens; {kind.get(tokenizer['kind'], own)}"
    yield "corpus", _told(training.get("corpus"), texts="{:,} texts", characters="{:,} characters")
    spent = {"steps": "{:,} steps", "epochs": "{:,.3g} epochs", "seconds": "{:,.0f} seconds"}
    unfinished = training.get("share_done", 1) != 1  # interrupted, or best before its end
    share = {"share_done": "{:.0%} of the run"} if unfinished else {}
    yield "training", _told(training, **spent, **share, device="{}", threads="{:,} thread(s)", precision="{}")
    chosen = {**data, **(training["train"] if isinstance(training.get("train"), dict) else {})}
    defaults = asdict(DataConfig()) | asdict(TrainConfig())
    changed = (name for name, default in defaults.items() if chosen.get(name) not in (None, default))
    yield "options", " ".join(f"--{name.replace('_', '-')} {_shown(chosen[name])}" for name in changed)
    yield "treated", _told(training, treatment="{}")
    figures = training.get("validation")
    yield "held out", _told(figures, texts="{:,} texts", tokens="{:,} tokens; in nats a text:")
    if summary["has_latent"]:
        rows = {
            "cross_entropy": "cross-entropy {:.2f}",
            "cross_entropy_shuffled": "{:.2f} with another text's latent",
            "cross_entropy_without": "{:.2f} without one",
        }
        yield "", _told(figures, **rows)
        rows = {"kl": "KL {:.2f}", "mutual_information": "information {:.2f}"}
        yield "", _told(figures, **rows, active_001="{:,} dimensions active", active_02="{:,} of them strongly")
        carries, _, rest = _told(training, verdict="{}").partition("; ")
        yield "verdict", f"{carries};" if rest else carries
        yield "", rest
    else:
        yield "", _told(figures, cross_entropy_without="cross-entropy {:.2f}")


def _told(values: object, **phrases: str) -> str:
    """The values that are there, each in its phrase."""
    if not isinstance(values, dict):
        return ""

    def fits(name: str, phrase: str) -> bool:
        value = values.get(name)
        return (
            isinstance(value, str) if phrase.endswith("{}") else isinstance(value, (int, float)) and abs(value) < 2**53
        )

    return ", ".join(phrase.format(values[name]) for name, phrase in phrases.items() if fits(name, phrase))


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
