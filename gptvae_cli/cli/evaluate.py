"""`gptvae evaluate`: what a latent is worth, on texts that the model has not seen."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptvae_cli.cli import console
from gptvae_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    from gptvae_cli.evaluation import Report

EXAMPLES = """Examples:

  gptvae evaluate test.txt

  gptvae evaluate test.txt --texts 500 --samples 500 --json | jq .iw_nll

  gptvae train corpus.txt --latents-dropout-prob 1 --out baseline

  gptvae evaluate test.txt --baseline baseline
"""


def evaluate(
    corpus: Annotated[
        list[str] | None, typer.Argument(help="Files or folders of text; - or nothing reads standard input.")
    ] = None,
    texts: Annotated[int, typer.Option(min=2, metavar="N", help="The first N texts.")] = 1000,
    samples: Annotated[int, typer.Option(min=1, metavar="K", help="Latents of a text for its likelihood.")] = 100,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A model to compare with, such as one trained without a latent."),
    ] = None,
    latents_from: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts for the encoder, one for each text of the corpus."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    unit: console.UnitOption = None,
    field: console.FieldOption = None,
    model: console.ModelOption = None,
    device: console.DeviceOption = "auto",
    dtype: console.DTypeOption = "auto",
    threads: console.ThreadsOption = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the latents that are drawn.")] = 0,
    quiet: console.QuietOption = False,
    debug: console.DebugOption = False,
) -> None:
    """Measure a model on texts that it has not seen: likelihood, use of the latent, reconstruction.

    Likelihoods are in nats per text, its end counted. PPL and bits per byte are of the importance-weighted one.
    """
    from gptvae_cli.header import locate_model, read_header
    from gptvae_cli.text import read_texts

    if not corpus or "-" in corpus:
        console.refuse_terminal_stdin("gptvae evaluate test.txt")
    path = locate_model(model)
    header = read_header(path)
    unit = unit or header.data.unit
    field = field or header.data.field
    if header.data.latents_from is not None and latents_from is None:
        raise ConfigError(
            "this model's latents come from other texts than it writes", hint="give those of the corpus: --latents-from"
        )
    lines = list(islice(read_texts(corpus or [], unit=unit, field=field), texts))
    sources = None
    if latents_from is not None:
        sources = list(islice(read_texts([latents_from], unit=unit, field=field), texts))
        if len(sources) != len(lines):
            raise DataError(f"{latents_from} holds {len(sources)} texts, the corpus {len(lines)}; they must be aligned")
    compared = None if baseline is None else locate_model(baseline)
    with console.waiting("loading the model", quiet=quiet):
        from gptvae_cli import sampling
        from gptvae_cli.evaluation import evaluate as evaluate_rows

    def measured(path: Path, sources: list[str] | None) -> Report:
        checkpoint, precision, remark = sampling.open_model(path, device=device, dtype=dtype, threads=threads)
        console.note(remark, quiet=quiet)
        encoder = sampling.Encoder(checkpoint, unit, precision)
        rows = list(islice(encoder.rows(lines), texts))
        read = None if sources is None else list(islice(encoder.rows(sources), texts))
        if len(rows) < 2:
            raise DataError(f"found {len(rows)} text, a model is evaluated on two at least")
        console.note(encoder.note, quiet=quiet)
        with console.progress("measuring", "texts", quiet=quiet, total=len(rows)) as advance:
            return evaluate_rows(
                checkpoint.model,
                checkpoint.tokenizer,
                rows,
                read,
                samples=samples,
                seed=seed,
                precision=precision,
                banned=checkpoint.tokenizer.line_break_ids() if unit == "line" else (),
                on_progress=advance,
            )

    report = measured(path, sources)
    values = report.to_dict()
    if compared is not None:
        other = measured(compared, sources)
        # A model that never learnt what to do with a latent is measured without one.
        nll = other.likelihood.nll if read_header(compared).has_latent else other.figures.cross_entropy_without
        values |= {"baseline_nll": nll, "efficiency": report.efficiency(nll)}
    if as_json:
        console.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    else:
        console.write_text("".join(f"{name:<26}  {value}\n" for name, value in _lines(values)))


def _lines(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values for people."""
    nats = "{:.2f} nats/text".format
    yield (
        "texts",
        f"{values['texts']:,} of {values['tokens']:,} tokens, {values['words']:,} words, {values['bytes']:,} bytes",
    )
    yield (
        "NLL, importance-weighted",
        (
            f"{nats(values['iw_nll'])}"
            f" (standard error {values['iw_standard_error']:.2f}, {values['iw_samples']} samples)"
        ),
    )
    yield (
        "  the same as",
        (
            f"perplexity {values['perplexity_per_token']:.2f} per token, {values['perplexity_per_word']:.1f} per word;"
            f" {values['bits_per_byte']:.3f} bits per byte"
        ),
    )
    yield (
        "NLL, bound",
        (f"{nats(values['nll_bound'])} = cross-entropy {values['cross_entropy']:.2f} + KL {values['kl']:.2f}"),
    )
    if "baseline_nll" in values:
        yield "NLL of the baseline", nats(values["baseline_nll"])
        yield "efficiency", f"{values['efficiency']:.2f} nats saved for a nat of KL"
    yield (
        "information",
        (
            f"{nats(values['mutual_information'])}, {values['information_share']:.0%} of what could be seen"
            f" (the KL, and at most {math.log(values['texts']):.2f} on {values['texts']:,} texts)"
        ),
    )
    yield "active dimensions", f"{values['active_001']}, {values['active_02']} strongly"
    yield (
        "use of z",
        (
            f"cross-entropy {values['cross_entropy']:.2f} with the right z,"
            f" {values['cross_entropy_shuffled']:.2f} with another text's,"
            f" {values['cross_entropy_without']:.2f} with none"
        ),
    )
    back = values["reconstruction"]
    yield "reconstruction", f"{back['token_accuracy']:.1%} of the tokens, {back['exact']:.1%} of the texts whole"
    if values["collapsed"]:
        yield "verdict", "collapsed: the latent carries less than 1 nat"
