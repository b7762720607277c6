"""`gptvae interpolate`: texts along a path from one latent to another."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptvae_cli.cli import console, flags, streams
from gptvae_cli.cli.encode import latents_to
from gptvae_cli.config import PathKind, SampleConfig, TextConfig
from gptvae_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gptvae_cli.sampling import Floats
    from gptvae_cli.text import Repairs

_point_on = partial(typer.Option, rich_help_panel="Where the path leads, one of these")

EXAMPLES = """\
gptvae interpolate a.txt b.txt
gptvae interpolate --from "the food was great" --to "never again" --steps 9
gptvae interpolate a.npy b.npy c.npy --path lerp --latents-out path.npy
gptvae encode reviews.txt | gptvae interpolate --latent - --format jsonl
"""


def interpolate(
    points: Annotated[
        list[str] | None,
        typer.Argument(metavar="POINT", help="Two or more files, each with one text or, as .npy, one latent."),
    ] = None,
    start: Annotated[str | None, _point_on("--from", metavar="TEXT", help="The first text.")] = None,
    end: Annotated[str | None, _point_on("--to", metavar="TEXT", help="The last text.")] = None,
    latent: Annotated[
        str | None,
        _point_on(metavar="FILE", help=".npy or JSON lines; the path leads through its rows; - is standard input."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Texts from one point to the next, both counted.")] = 7,
    kind: Annotated[PathKind, typer.Option("--path", help="Along an arc around the origin, or straight.")] = "slerp",
    refine: flags.RefineOption = False,
    guidance: Annotated[
        float, typer.Option(metavar="W", help="Above 1, such as 2, keeps a text closer to its latent.")
    ] = 1.0,
    latents_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the latents, a .npy file.", rich_help_panel="Output")
    ] = None,
    format: flags.TextFormatOption = "text",
    null: flags.NullOption = False,
    unit: flags.UnitOption = None,
    field: flags.FieldOption = None,
    errors: flags.ErrorsOption = None,
    model: flags.ModelOption = None,
    device: flags.DeviceOption = "auto",
    dtype: flags.DTypeOption = "auto",
    threads: flags.ThreadsOption = None,
    quiet: flags.QuietOption = False,
    debug: flags.DebugOption = False,
) -> None:
    """Write texts along a path between latents, greedily.

    The ends of the path are what the model makes of the latents that went in. Where a path leads through several
    points, each point is printed once: N points give (N - 1) x (steps - 1) + 1 texts.
    """
    from gptvae_cli.header import locate_model, read_header
    from gptvae_cli.text import Repairs, of_unit, with_field

    config = SampleConfig(guidance=guidance, greedy=True)
    _check_points(points or [], start, end, latent)
    if field is not None:
        if not points:
            raise ConfigError("--field is of texts in files, and there are none", hint="leave it out")
        points = with_field(points, field)
    streams.refuse_stdout("--latents-out", latents_out)
    path = locate_model(model)
    streams.refuse_input("--latents-out", latents_out, [*(points or []), *([latent] if latent else []), str(path)])
    header = read_header(path)
    header.require(path, guidance=guidance, refine=refine)
    data, width = header.data.overridden(unit=unit, field=field, errors=errors), header.model.dim_latent
    printer = streams.TextWriter(format, data.unit, null=null)
    repairs = Repairs()
    found: Sequence[str | Floats]
    if latent is not None:
        found = _latents(latent, width)
    elif start is not None and end is not None:
        found = [of_unit(start, data.unit), of_unit(end, data.unit)]
    else:
        found = [_point(name, data, width, repairs) for name in points or []]

    if refine and not any(isinstance(point, str) for point in found):
        raise ConfigError("--refine fits latents to texts, and there are none", hint="leave it out")

    checkpoint = console.load_model(path, device=device, dtype=dtype, threads=threads, quiet=quiet)
    import numpy as np

    from gptvae_cli import sampling

    encoder = sampling.Encoder(checkpoint, data.unit, refine=refine)
    points_NZ = np.stack([encoder.point(point) if isinstance(point, str) else point for point in found])
    path_KZ = sampling.walk(points_NZ, steps, kind)
    if latents_out is not None:
        with latents_to(latents_out, "npy", width) as write:
            for latent_Z in path_KZ:
                write(latent_Z)
    requests = sampling.repeated(path_KZ, 1)
    with console.progress("writing", "texts", quiet=quiet, total=len(path_KZ), beside_data=True) as advance:
        for step, text in enumerate(sampling.write(checkpoint, requests, config, unit=data.unit)):
            printer.write(text, step=step)
            advance(step + 1)
    console.note(encoder.note, quiet=quiet)
    console.note(repairs.note, quiet=quiet)


def _check_points(points: Sequence[str], start: str | None, end: str | None, latent: str | None) -> None:
    texts = start is not None or end is not None
    if sum((bool(points), texts, latent is not None)) > 1:
        raise ConfigError(
            "a path leads through files, or --from one text --to another, or the rows of --latent",
            hint="use one of the three",
        )
    if texts and (start is None or end is None):
        raise ConfigError(f"{'--from' if end is None else '--to'} is given alone", hint="--from TEXT --to TEXT")
    if not texts and latent is None and len(points) < 2:
        found = f"only {points[0]}" if points else "nothing"
        raise ConfigError(f"a path needs two points at least, found {found}", hint="gptvae interpolate a.txt b.txt")
    if points.count("-") > 1:
        raise ConfigError("standard input was named twice, and can be read once", hint="gptvae interpolate - b.txt")
    if latent == "-" or "-" in points:
        streams.refuse_terminal_stdin("gptvae interpolate a.txt b.txt")


def _latents(name: str, width: int) -> Sequence[Floats]:
    from gptvae_cli.latent_file import read_latents

    with streams.source(name) as stream:
        latents_NZ = read_latents(stream, streams.called(name), width=width)
    if len(latents_NZ) < 2:
        raise DataError(f"{streams.called(name)} holds {len(latents_NZ)} latents, a path needs two at least")
    return list(latents_NZ)


def _point(name: str, data: TextConfig, width: int, repairs: Repairs) -> str | Floats:
    """The one text, or the one latent, of a file."""
    from gptvae_cli.latent_file import is_npy, read_latents
    from gptvae_cli.sources import STDIN, is_stdin
    from gptvae_cli.text import read_texts

    with streams.source(name, hint="check the path; texts themselves go to --from TEXT --to TEXT") as stream:
        if not stream.seekable():  # a pipe, perhaps of <(...), gives its bytes only once
            stream = io.BytesIO(stream.read())
        begin = stream.tell()
        is_latent = is_npy(stream.read(6))
        stream.seek(begin)
        found: Sequence[str | Floats]
        if is_latent:
            found = list(read_latents(stream, streams.called(name), width=width))
        else:
            by_name = is_stdin(name) or Path(name).is_file()  # whose ending may tell how to read it
            texts = read_texts([name if by_name else STDIN], data, repairs=repairs, stdin=stream)
            found = ["".join(texts)] if data.unit == "window" else list(islice(texts, 2))
    if len(found) != 1:
        amount, thing = "more than one" if found else "no", "latent" if is_latent else "text"
        hint = f"--latent {name} leads through its rows" if is_latent else "--from and --to take texts themselves"
        if found and data.unit == "paragraph":
            hint = "--unit file takes a file as one text"
        raise DataError(f"{streams.called(name)} holds {amount} {thing}, a point of a path is exactly one", hint=hint)
    return found[0]
