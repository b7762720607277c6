"""The options that commands share."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from gptvae_cli.config import DEVICE, DType, Errors, Unit

COMMON = "Model and machine"
_common = partial(typer.Option, rich_help_panel=COMMON)
DEBUG_KEY = "gptvae.debug"
"""Where `ctx.meta` says whether an error shows its traceback."""


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[DEBUG_KEY] = value
    return value


DEVICES = ["auto", "cpu", "cuda"]


def _check_device(value: str) -> str:
    # Here, and not where the device is looked for, so that a wrong variable is told by its name.
    if DEVICE.fullmatch(value) is None:
        raise typer.BadParameter("auto, cpu, cuda or cuda:n")
    return value


ModelOption = Annotated[
    str | None,
    _common(metavar="PATH", help="A run folder or a .safetensors file. [default: $GPTVAE_MODEL, else ./gptvae-run]"),
]
DeviceOption = Annotated[
    str,
    _common(
        metavar="DEVICE",
        envvar="GPTVAE_DEVICE",
        callback=_check_device,
        autocompletion=lambda: DEVICES,
        help="auto, cpu, cuda or cuda:1.",
    ),
]
DTypeOption = Annotated[DType, _common(envvar="GPTVAE_DTYPE", help="Numbers to compute with; auto is float32.")]
ThreadsOption = Annotated[
    int | None, _common(min=1, envvar="GPTVAE_THREADS", help="CPU threads. [default: as torch finds best]")
]
SeedOption = Annotated[
    int | None,
    _common(
        min=0,
        max=2**63 - 1,
        envvar="GPTVAE_SEED",
        help="Seed of everything random. [default: one is picked and printed]",
    ),
]
QuietOption = Annotated[bool, _common("-q", "--quiet", help="No notes and no progress.")]
DebugOption = Annotated[bool, _common("--debug", help="Show the traceback of an error.", callback=_remember_debug)]
RefineOption = Annotated[
    bool,
    typer.Option(
        "--refine",
        help="Fit every text's latent to it by gradient descent, so that the text comes back more closely; takes many"
        " times as long as encoding.",
    ),
]
UnitOption = Annotated[Unit | None, typer.Option(help="What one text is. [default: as the model was trained]")]
FieldOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Of texts in .jsonl, .csv and .parquet files; standard input is then JSON lines."
        " [default: as the model was trained]",
    ),
]
ErrorsOption = Annotated[
    Errors | None,
    typer.Option(help="Bytes that are not UTF-8 are an error, or U+FFFD. [default: as the model was trained]"),
]
TextFormat = Literal["text", "jsonl"]
TextFormatOption = Annotated[TextFormat, typer.Option(help="Plain texts, or one JSON object a line.")]
NullOption = Annotated[
    bool, typer.Option("-0", "--null", help="End every text with a NUL, for xargs -0; one inside is left out.")
]
