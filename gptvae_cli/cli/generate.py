"""`gptvae generate`: latents to texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptvae_cli.cli import console, flags, streams
from gptvae_cli.cli.encode import Write, latents_to
from gptvae_cli.config import SampleConfig
from gptvae_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from gptvae_cli.decoding import Request
    from gptvae_cli.sampling import Floats

_source = partial(typer.Option, rich_help_panel="What to write from, one of these")
_choice = partial(typer.Option, rich_help_panel="How to choose tokens")
_output = partial(typer.Option, rich_help_panel="Output")

EXAMPLES = """\
gptvae generate --prior 5 --latents-out z.npy
gptvae generate --text "the food was great" -n 3 --temperature 0.7 --guidance 2
gptvae encode a.txt | gptvae generate --latent - --greedy
gptvae generate --ref a.txt --add direction.npy=0.5 --greedy --guidance 2
gptvae generate --ref a.txt --sample --greedy -n 10 --format jsonl | jq -r .text
"""


def generate(
    latent: Annotated[
        str | None, _source(metavar="FILE", help="Latents, .npy or JSON lines; - is standard input.")
    ] = None,
    ref: Annotated[str | None, _source(metavar="FILE", help="Texts to encode; - is standard input.")] = None,
    text: Annotated[str | None, _source(metavar="TEXT", help="A text to encode.")] = None,
    prior: Annotated[int | None, _source(min=1, metavar="N", help="N random latents. [default: 1]")] = None,
    sample: Annotated[
        bool,
        _source("--sample", help="With --ref and --text: a fresh draw of the posterior for every copy, not its mean."),
    ] = False,
    refine: Annotated[
        bool,
        _source(
            "--refine", help="With --ref and --text: fit every latent to its text, which then comes back more closely."
        ),
    ] = False,
    add: Annotated[
        list[str] | None,
        _source(
            metavar="FILE[=W]",
            help="Add W times (once, if left out) the latent in a file to every latent; several are added up.",
        ),
    ] = None,
    copies: Annotated[int, typer.Option("-n", "--copies", min=1, help="Texts from each latent.")] = 1,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What every text begins with.")] = "",
    max_tokens: Annotated[
        int | None, _choice(help="Longest continuation. [default: as long as the model reads]")
    ] = None,
    guidance: Annotated[
        float, _choice(metavar="W", help="Above 1, such as 2, keeps a text closer to its latent, for twice the work.")
    ] = 1.0,
    temperature: Annotated[float, _choice(help="Below 1 is safer, above 1 is wilder.")] = 1.0,
    top_k: Annotated[int | None, _choice(help="Among the k likeliest.")] = None,
    top_p: Annotated[float | None, _choice(help="Among the likeliest that share p of the probability.")] = None,
    min_p: Annotated[float | None, _choice(help="Among those at least p times as likely as the likeliest.")] = None,
    greedy: Annotated[bool, _choice("--greedy", help="Always the likeliest.")] = False,
    stream: Annotated[bool, _output("--stream", help="Print a text while it is written.")] = False,
    latents_out: Annotated[
        str | None, _output(metavar="FILE", help="Also write the latent of every text, a .npy file.")
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
    seed: flags.SeedOption = None,
    quiet: flags.QuietOption = False,
    debug: flags.DebugOption = False,
) -> None:
    """Write texts from latents.

    Latents come from a file, from the posteriors of texts, or, if nothing is said, from the prior. Lines are printed
    as lines; texts of other units have an empty line between them, see also -0 and --format jsonl.
    """
    from gptvae_cli.header import locate_model, read_header
    from gptvae_cli.text import Repairs, of_unit, read_texts, with_field

    config = SampleConfig(
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        greedy=greedy,
        max_tokens=max_tokens,
    )
    directions = _weighed(add or [])
    _check_sources({"--latent": latent, "--ref": ref, "--text": text, "--prior": prior}, sample=sample, refine=refine)
    if field is not None and ref is None:
        raise ConfigError("--field is of the texts of --ref, and there are none", hint="leave it out")
    if (latent, ref, text, prior) == (None, None, None, None) and streams.is_fed():
        console.note("standard input is not read: --ref - takes texts from it, --latent - latents", quiet=quiet)
    if "-" in (latent, ref):
        streams.refuse_terminal_stdin("gptvae generate --latent z.npy")
    if field is not None and ref is not None:
        (ref,) = with_field([ref], field)
    path = locate_model(model)
    header = read_header(path)
    takes_latents = (latent, ref, text, latents_out) != (None, None, None, None) or bool(directions)
    header.require(path, latent=takes_latents, guidance=guidance, refine=refine)
    streams.refuse_stdout("--latents-out", latents_out)
    inputs = [*filter(None, [latent, ref]), *(name for name, _ in directions), str(path)]
    streams.refuse_input("--latents-out", latents_out, inputs)
    data = header.data.overridden(unit=unit, field=field, errors=errors)
    offset_Z = _sum(directions, header.model.dim_latent) if directions else None
    printer = streams.TextWriter(format, data.unit, null=null)
    if stream and format == "jsonl":
        raise ConfigError("--stream and --format jsonl exclude each other", hint="leave one of them out")
    repairs = Repairs()
    with ExitStack() as stack:
        latents: Iterator[list[tuple[int, Floats]]] | None = None
        texts: Iterator[list[str]] | None = None
        if latent is not None:
            from gptvae_cli.latent_file import iter_latents

            stream_in = stack.enter_context(streams.source(latent))
            rows = iter_latents(stream_in, streams.called(latent), width=header.model.dim_latent)
            latents = streams.pools(_begun(rows) if stream_in.seekable() else rows, [latent])
        elif ref is not None:
            texts = streams.pools(read_texts([ref], data, repairs=repairs), [ref])
        elif text is not None:
            texts = iter([[of_unit(text, data.unit)]])
        drawn = sample or not greedy or (latents is None and texts is None)
        if drawn:
            config = replace(config, seed=console.pick_seed(seed, quiet=quiet))

        checkpoint = console.load_model(path, device=device, dtype=dtype, threads=threads, quiet=quiet)
        from gptvae_cli import sampling

        encoder = sampling.Encoder(checkpoint, data.unit, refine=refine)
        total = None
        requests: Iterator[Request | None]
        if latents is not None:
            requests = sampling.numbered(latents, copies)
        elif texts is not None:
            requests = sampling.encoded(encoder.encode_pools(texts), copies, config.seed if sample else None)
        else:
            total = (prior or 1) * copies
            requests = sampling.repeated(sampling.unconditioned(checkpoint, config.seed, prior or 1), copies)
        if offset_Z is not None:
            requests = sampling.shifted(requests, offset_Z)
        write: Write | None = None
        if latents_out is not None:
            write = stack.enter_context(latents_to(latents_out, "npy", header.model.dim_latent))
        names: deque[tuple[int, int]] = deque()
        taken, on_text = _taken(requests, names, write), printer.piece if stream else None
        written = sampling.write(checkpoint, taken, config, unit=data.unit, prompt=prompt, on_text=on_text)
        advance = stack.enter_context(console.progress("writing", "texts", quiet=quiet, total=total, beside_data=True))
        for done, new in enumerate(written):
            row, copy = names.popleft()
            if stream:
                printer.end()
            else:
                printer.write(new, row=row, copy=copy, seed=config.seed if drawn else None)
            advance(done + 1)
    console.note(encoder.note, quiet=quiet)
    console.note(repairs.note, quiet=quiet)


def _weighed(asked: Sequence[str]) -> list[tuple[str, float]]:
    """The files and weights of `FILE=W`, or `FILE` for a weight of 1.

    Raises:
        ConfigError: for a weight that is no number, and for standard input.
    """
    found = []
    for each in asked:
        name, equals, weight = each.rpartition("=")
        if not equals or Path(each).exists():
            name, weight = each, "1"
        if name == "-":
            raise ConfigError("--add needs a file, standard input is for what is written from", hint="name one")
        try:
            found.append((name, float(weight)))
        except ValueError:
            message = f"--add {each} asks for {weight!r} times {name}, which is no number"
            raise ConfigError(message, hint=f"--add {name}=0.5") from None
    return found


def _sum(directions: Sequence[tuple[str, float]], width: int) -> Floats:
    """The weighted sum of the latents in files of one each [Z].

    Raises:
        DataError: for a file that does not hold one latent of this width, and for what is too large for a latent.
    """
    import numpy as np

    from gptvae_cli.latent_file import checked_latents, read_latents

    sum_1Z = np.zeros((1, width))
    for name, weight in directions:
        with streams.source(name) as source:
            latents_NZ = read_latents(source, name, width=width)
        if len(latents_NZ) != 1:
            raise DataError(
                f"{name} holds {len(latents_NZ)} latents, --add takes a file of one",
                hint="numpy.save('direction.npy', these.mean(axis=0) - those.mean(axis=0)) writes one",
            )
        sum_1Z += weight * latents_NZ.astype(np.float64)
    sum_Z: Floats = checked_latents(sum_1Z, "the sum of --add", width=width)[0]
    return sum_Z


def _taken(
    requests: Iterator[Request | None], names: deque[tuple[int, int]], write: Write | None
) -> Iterator[Request | None]:
    """The same requests. As one is taken, its row and copy are put into `names`, and its latent is written."""
    for request in requests:
        if request is not None:
            names.append((request.row, request.copy))
            if write is not None:
                assert request.latent is not None, "the model has a latent"
                write(request.latent.numpy())
        yield request


def _check_sources(sources: dict[str, str | int | None], *, sample: bool, refine: bool) -> None:
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other", hint="leave all but one out")
    for option, asked, does in (
        ("--sample", sample, "draws from the posterior of a text"),
        ("--refine", refine, "fits a latent to its text"),
    ):
        if asked and given not in (["--ref"], ["--text"]):
            raise ConfigError(f"{option} {does}, and there is none", hint="use it with --ref or --text")
    if sample and refine:
        raise ConfigError("--sample draws from posteriors, which --refine leaves alone", hint="leave one of them out")


def _begun(latents: Iterator[tuple[int, Floats]]) -> Iterator[tuple[int, Floats]]:
    """The same latents, the first of which are read now: a bad file is told before torch is loaded, which takes
    seconds. Of a pipe this would wait for the command that writes to it."""
    first = list(islice(latents, 1))
    return chain(first, latents)
