"""`gptvae demo`: the whole tool in two minutes, on names that come with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptvae_cli.cli import console

EXAMPLES = """Examples:

  gptvae demo

  gptvae demo --out names-run --max-time 5m
"""


def demo(
    out: Annotated[Path, typer.Option(help="Where the model goes.")] = Path("gptvae-demo"),
    max_time: Annotated[str, typer.Option(help="Of the training, as 90s or 5m.")] = "90s",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")] = False,
    device: console.DeviceOption = "auto",
    quiet: console.QuietOption = False,
    debug: console.DebugOption = False,
) -> None:
    """Train on 32,033 first names, then encode, interpolate and generate, saying what it does."""
