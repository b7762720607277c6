"""`gptvae encode`: texts to latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain, count
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gptvae_cli.cli import console, flags, streams
from gptvae_cli.errors import ConfigError

if TYPE_CHECKING:
    from gptvae_cli.sampling import Floats

Write = Callable[["Floats"], object]
"""Takes one latent [Z]."""

EXAMPLES = """\
gptvae encode reviews.txt > z.npy
gptvae encode a.txt b.txt --out z.npy --std-out std.npy
gptvae encode a.txt --refine | gptvae generate --latent - --greedy --guidance 2
gptvae encode - < a.txt | gptvae generate --latent -
gptvae encode reviews.jsonl --field review --format jsonl | jq .latent
"""


def encode(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Files, folders or patterns of text; - or nothing reads standard input."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the latents go. [default: standard output]")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="A random draw of each posterior instead of its mean.")
    ] = False,
    refine: flags.RefineOption = False,
    std_out: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the posteriors' standard deviations, a .npy file.")
    ] = None,
    format: Annotated[
        Literal["npy", "jsonl"] | None,
        typer.Option(
            help="One float32 array (texts, Z), or one JSON object a text. [default: jsonl for such an --out, else npy]"
        ),
    ] = None,
    unit: flags.UnitOption = None,
    field: flags.FieldOption = None,
    errors: flags.ErrorsOption = None,
    model: flags.ModelOption = None,
    device: flags.DeviceOption = "auto",
    dtype: flags.DTypeOption = "auto",
    threads: flags.ThreadsOption = None,
    seed: flags.SeedOption = None,
    quiet: flags.QuietOption = False,
    debug: flags.DebugOption = False,
) -> None:
    """Turn texts into latents, in their order: a NumPy file, one row a text.

    A latent is the mean of the text's posterior, unless you --sample or --refine. A text of unit window has one for
    each of its windows.
    """
    from gptvae_cli.header import locate_model, read_header
    from gptvae_cli.sources import expand
    from gptvae_cli.text import Repairs, read_texts, with_field

    if not files or "-" in files:
        streams.refuse_terminal_stdin("gptvae encode texts.txt > z.npy")
    format = format or ("jsonl" if out is not None and out.endswith(".jsonl") else "npy")
    on_stdout = streams.is_stdout(out)
    if on_stdout and format == "npy":
        streams.refuse_terminal_stdout("gptvae encode texts.txt > z.npy")
    streams.refuse_stdout("--std-out", std_out)
    if out is not None and std_out is not None and os.path.realpath(out) == os.path.realpath(std_out):
        raise ConfigError(f"--out and --std-out are both {std_out}", hint="name two files")
    sources = expand(with_field(files or [], field) if field is not None else files or ["-"])
    path = locate_model(model)
    streams.refuse_input("--out", out, [*sources, str(path)])
    streams.refuse_input("--std-out", std_out, [*sources, str(path)])
    header = read_header(path)
    if sample and refine:
        raise ConfigError("--sample draws from posteriors, which --refine leaves alone", hint="leave one of them out")
    header.require(path, refine=refine)
    config = header.data.overridden(unit=unit, field=field, errors=errors)
    repairs = Repairs()
    texts = read_texts(sources, config, repairs=repairs)
    seed = console.pick_seed(seed, quiet=quiet) if sample else None
    checkpoint = console.load_model(path, device=device, dtype=dtype, threads=threads, quiet=quiet)
    from gptvae_cli.sampling import Encoder

    encoder = Encoder(checkpoint, config.unit, refine=refine)
    encodings = chain.from_iterable(encoder.encode_pools(streams.pools(texts, sources)))
    with ExitStack() as stack:
        write = stack.enter_context(latents_to(out, format, header.model.dim_latent))
        write_std: Write | None = None
        if std_out is not None:
            write_std = stack.enter_context(latents_to(std_out, "npy", header.model.dim_latent))
        advance = stack.enter_context(console.progress("encoding", "texts", quiet=quiet, beside_data=on_stdout))
        for row, encoding in enumerate(encodings):
            write(encoding.latent_Z if seed is None else encoding.sample(seed, row))
            if write_std is not None:
                write_std(encoding.std_Z)
            advance(row + 1)
    console.note(encoder.note, quiet=quiet)
    console.note(repairs.note, quiet=quiet)


@contextmanager
def latents_to(name: str | None, format: Literal["npy", "jsonl"], width: int) -> Iterator[Write]:
    """A function that writes latents to a file, or to standard output for None or `-`."""
    from gptvae_cli.latent_file import LatentWriter

    with streams.output(name, binary=format == "npy") as stream:
        if format == "npy":
            with LatentWriter(stream, width) as writer:
                yield lambda latent_Z: writer.write(latent_Z[None])
        else:
            rows = count()

            def write(latent_Z: Floats) -> None:
                # NumPy's digits are the fewest that name a float32; JSON's would be those of a float64.
                numbers = ", ".join(map(str, latent_Z))
                stream.write(f'{{"row": {next(rows)}, "latent": [{numbers}]}}\n'.encode())
                stream.flush()

            yield write
