"""`gptvae info`: what a model is and how it was trained, read from its header alone, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptvae_cli.cli import console
from gptvae_cli.errors import ConfigError
from gptvae_cli.options import UNSET

if TYPE_CHECKING:
    from gptvae_cli.header import Layout

_BUFFERS = (".inv_freq",)
"""Tensors that are stored and not learnt: the frequencies of rotary embeddings."""

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
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    model: console.ModelOption = None,
    debug: console.DebugOption = False,
) -> None:
    """Show what a model is and how it was trained."""
    from gptvae_cli.header import locate_model, read_layout, reading

    if file is not None and model is not None:
        raise ConfigError("MODEL and --model were both given", hint="leave one of them out")
    path = locate_model(file or model)
    layout = read_layout(path)
    with reading(path):
        summary = _summary(str(path), layout)
    if as_json:
        console.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    else:
        console.write_text("".join(f"{name:<28}  {value}\n" for name, value in _lines(summary)))


def _summary(path: str, layout: Layout) -> dict[str, Any]:
    from gptvae_cli.config import to_dict
    from gptvae_cli.header import ModelHeader
    from gptvae_cli.sizing import preset_of

    header = ModelHeader.from_metadata(layout.metadata)
    summary = {
        "file": path,
        "file_bytes": layout.size_bytes,
        "format_version": header.format_version,
        "parameters": sum(tensor.numel for name, tensor in layout.tensors.items() if not name.endswith(_BUFFERS)),
        "preset": preset_of(header.model),
        "has_latent": header.has_latent,
        "model": to_dict(header.model),
        "tokenizer": {"kind": _tokenizer_kind(header.tokenizer), "num_tokens": header.model.num_tokens},
        "data": to_dict(header.data),
        "training": header.training,
    }
    # Python reads and writes infinities and NaN, which JSON does not know.
    clean: dict[str, Any] = json.loads(json.dumps(summary), parse_constant=lambda name: None)
    return clean


def _tokenizer_kind(text: str) -> str:
    """As `Tokenizer.kind`, without the library, which takes a tenth of a second to load."""
    from gptvae_cli.header import json_object

    model = json_object(text, "its tokenizer").get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        return "file"
    return "bpe" if model.get("merges") else "bytes"


def _lines(values: Mapping[str, Any], indent: str = "") -> Iterator[tuple[str, str]]:
    """Names and values for people, what is nested below its name; all of it may come from a stranger."""
    for name, value in values.items():
        label = indent + console.one_line(name)
        if isinstance(value, dict) and len(indent) < 6:
            yield label, ""
            yield from _lines(value, indent + "  ")
        else:
            yield label, console.one_line(UNSET.get(name, "-") if value is None else _shown(value))


def _shown(value: object) -> str:
    match value:
        case str():
            return value
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case _:
            return json.dumps(value)
