"""`gptvae evaluate`: what a latent is worth, on texts that the model has not seen."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptvae_cli.cli import console, flags, streams
from gptvae_cli.cli.table import table
from gptvae_cli.config import SampleConfig, TextConfig
from gptvae_cli.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    from gptvae_cli.config import Unit
    from gptvae_cli.header import ModelHeader

EXAMPLES = """\
gptvae evaluate test.txt
gptvae evaluate corpus.txt --held-out
gptvae evaluate test.txt --with-baseline
gptvae evaluate test.txt --labels test.labels.txt
gptvae evaluate test.txt --texts 0 --json | jq .nll_nats_per_text
gptvae evaluate test.txt --texts 0 --per-text scores.jsonl
"""


def evaluate(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(metavar="CORPUS", help="Files, folders or patterns of text; - or nothing reads stdin."),
    ] = None,
    texts: Annotated[int, typer.Option(min=0, metavar="N", help="The first N texts; 0 takes all.")] = 1000,
    samples: Annotated[int, typer.Option(min=1, metavar="K", help="Latents of a text for its likelihood.")] = 100,
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Of the corpus that the model learnt from, only the texts that it did not."),
    ] = False,
    with_baseline: Annotated[
        bool,
        typer.Option(
            "--with-baseline",
            help="Compare with the same decoder without a latent: trains it into RUN/baseline, for as long as the"
            " model was trained, unless it is there.",
        ),
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(metavar="PATH", help="A model to compare with, such as one trained without a latent.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(metavar="W", help="Of the reconstruction, as generate --greedy takes it.")
    ] = 1.0,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Reconstruct from latents that are fitted to the texts, as generate --refine."),
    ] = False,
    labels: Annotated[
        str | None, typer.Option(metavar="FILE", help="One label a line, for each text: how well z tells them apart.")
    ] = None,
    label_field: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="Of the label in tables and JSON lines, as --field is of the text. [default: --field]"
        ),
    ] = None,
    latents_from: Annotated[
        str | None, typer.Option(metavar="FILE", help="Texts for the encoder, one for each text of the corpus.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one JSON object.")] = False,
    per_text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the figures of every text, one JSON object a line.")
    ] = None,
    unit: flags.UnitOption = None,
    field: flags.FieldOption = None,
    errors: flags.ErrorsOption = None,
    model: flags.ModelOption = None,
    device: flags.DeviceOption = "auto",
    dtype: flags.DTypeOption = "auto",
    threads: flags.ThreadsOption = None,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**63 - 1,
            envvar="GPTVAE_SEED",
            help="Seed of the latents that are drawn. [default: 0]",
            rich_help_panel=flags.COMMON,
        ),
    ] = 0,
    quiet: flags.QuietOption = False,
    debug: flags.DebugOption = False,
) -> None:
    """Measure a model on texts that it has not seen: likelihood, use of the latent, reconstruction.

    Likelihoods are importance-weighted, in nats per text, its end counted. Intervals are 95 % over the texts.
    """
    from gptvae_cli.header import locate_model, read_header
    from gptvae_cli.sources import expand
    from gptvae_cli.text import Repairs, read_texts, with_field

    read = corpus or ["-"]
    if field is not None:
        read = with_field([*read, *filter(None, [labels, latents_from])], field)[: len(read)]
    if label_field is not None:
        if labels is None:
            raise ConfigError("--label-field is of --labels, and there are none", hint="leave it out")
        with_field([labels], label_field, "--label-field")
    if not corpus or "-" in corpus:
        streams.refuse_terminal_stdin("gptvae evaluate test.txt")
    streams.refuse_stdout("--per-text", per_text)
    path = locate_model(model)
    header = read_header(path)
    data = header.data.overridden(unit=unit, field=field, errors=errors)
    if with_baseline and baseline is not None:
        raise ConfigError("--baseline and --with-baseline exclude each other", hint="leave one of them out")
    paths, headers = [path], [header]
    if baseline is not None:
        paths.append(locate_model(baseline))
        headers.append(read_header(paths[1]))
        own, other = (each.data.unit for each in headers)
        if (own == "window") != (other == "window"):
            units = f"{paths[1]} was trained on texts of unit {other}, {path} on {own}"
            console.note(f"{units}: one of them knows no end of a text", quiet=quiet)
    _check(headers, data.unit, texts, labels=labels, latents_from=latents_from)
    for name, each in zip(paths, headers, strict=True):
        if each is header or each.has_latent:  # a baseline reconstructs nothing
            each.require(name, latent=False, guidance=SampleConfig(guidance=guidance).guidance, refine=refine)
    wanted = _held_out(path, header, data.unit) if held_out else None
    files = expand(read)
    if not held_out:
        console.note(_learnt_from(path, header, files), quiet=quiet)
    streams.refuse_input("--per-text", per_text, [*files, *filter(None, [labels, latents_from]), *map(str, paths)])
    repairs = Repairs()
    selected = _Selected(read_texts(files, data, repairs=repairs), wanted)
    lines: Iterable[str] = selected
    sources = names = None
    if labels is not None or latents_from is not None:
        lines = selected.first(texts)
        if latents_from is not None:
            sources = selected.aligned(latents_from, read_texts([latents_from], data, repairs=repairs), "texts")
        if labels is not None:
            from gptvae_cli.probe import require_classes, require_scikit_learn

            require_scikit_learn()
            marked = TextConfig(field=label_field or data.field, errors=errors or "strict")
            names = selected.aligned(labels, read_texts([labels], marked, labels=True), "labels")
            require_classes(names)  # which more may be wrong with, as the texts that bear them will tell
    if with_baseline:
        paths.append(_train_baseline(path, header, device=device, dtype=dtype, threads=threads, quiet=quiet))
    models = [
        console.load_model(each, device=device, dtype=dtype, threads=threads, quiet=quiet or each is not path)
        for each in paths
    ]
    from gptvae_cli.measuring import measured_together
    from gptvae_cli.report import report

    with ExitStack() as stack:
        # Before hours of measuring: it may not be writable.
        scores = None if per_text is None else stack.enter_context(streams.output(per_text))
        with console.progress("measuring", "texts", quiet=quiet, total=texts or None) as advance:
            gathered, cut, remarks = measured_together(
                models,
                lines,
                sources,
                unit=data.unit,
                most=texts or None,
                samples=samples,
                guidance=guidance,
                refine=refine,
                seed=seed,
                on_progress=advance,
            )
        if gathered[0].texts < 2:
            found_texts = "one text" if gathered[0].texts else "no texts"
            raise DataError(f"found {found_texts}, a model is evaluated on two at least")
        for remark in (*remarks, repairs.note):
            console.note(remark, quiet=quiet)
        if scores is not None:
            for figures in gathered[0].per_text():
                if held_out:
                    figures["row"] = selected.places[int(figures["row"])]
                scores.write(f"{json.dumps(figures)}\n".encode())
    # The figures of texts are in their file by now, whatever is wrong with the labels or the baseline.
    with console.waiting("resampling the texts" if names is None else "training the probes", quiet=quiet):
        found = report(*gathered, labels=names, samples=samples, seed=seed)
    about = {
        "model": str(path),
        "corpus": corpus or ["-"],
        "unit": data.unit,
        "held_out": held_out,
        "latents_from": latents_from,
        "guidance": guidance,
        "refine": refine,
        "labels": labels,
        "baseline": str(paths[1]) if len(paths) > 1 else None,
        "texts_cut": cut,
    }
    if as_json:
        streams.write_text(json.dumps(about | found.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        streams.write_text("".join(f"{line}\n" for line in table(about, found)))


def _check(
    headers: Sequence[ModelHeader], unit: Unit, texts: int, *, labels: str | None, latents_from: str | None
) -> None:
    """Raises a `ConfigError` for options that do not go together; the headers are of the model and its baseline."""
    header = headers[0]
    if texts == 1:
        raise ConfigError("texts is 1, it must be 2 at least, or 0 for all of them")
    for option, file in (("--labels", labels), ("--latents-from", latents_from)):
        if file is not None and unit == "window":
            raise ConfigError(f"{option} is of texts, and --unit window cuts texts into windows")
    for name, each in zip(("this model", "the baseline"), headers, strict=False):
        if each.reads_other_texts and latents_from is None:
            raise ConfigError(
                f"the latents of {name} come from other texts than it writes",
                hint="give those of the corpus: --latents-from",
            )
    if latents_from is not None and not any(each.reads_other_texts for each in headers):
        raise ConfigError("--latents-from is for a model that was trained with it", hint="leave it out")
    if "-" in (labels, latents_from):
        raise ConfigError("--labels and --latents-from need a file, standard input is for the corpus")
    if labels is not None and not header.has_latent:
        raise ConfigError("--labels are read off latents, and this model was trained without one")


def _held_out(path: Path, header: ModelHeader, unit: Unit) -> Callable[[str], bool]:
    """Which texts of its corpus a model did not learn from.

    Raises:
        ConfigError: where they are not a share of the corpus, or texts are something else now.
        CheckpointError: where the model does not say.
    """
    from gptvae_cli.ingest import is_held_out

    share, corpus = header.data.valid_share, header.training.get("corpus")
    if header.data.unit == "window":
        raise ConfigError(
            "--held-out is of texts, and of a running text it is the end that was held out",
            hint="put some of it into a file of its own: train with --valid FILE, and evaluate FILE",
        )
    if unit != header.data.unit:
        raise ConfigError(f"a text is a {unit} here, and --held-out is of the {header.data.unit}s that were read")
    if share is None:
        raise ConfigError(
            f"--held-out is of the corpus, and {path} was trained with --valid {header.data.valid}",
            hint=f"evaluate that: gptvae evaluate {shlex.quote(header.data.valid)}",
        )
    salt = corpus.get("salt") if isinstance(corpus, dict) else None
    if type(salt) is not int or not 0 <= salt < 256:
        raise CheckpointError(
            f"{path} does not say which texts were held out", hint="leave --held-out out, and name other texts"
        )
    return lambda text: text != "" and is_held_out(text.encode("utf-8"), share, salt)


def _learnt_from(path: Path, header: ModelHeader, files: Sequence[str]) -> str | None:
    """A note where the files are those that a model was trained on, as the run folder around it tells."""
    from gptvae_cli.corpus import Corpus
    from gptvae_cli.header import CACHE_NAME

    cache = path.parent / CACHE_NAME
    if not cache.is_dir() or Corpus.recall(cache, files, header.data) is None:
        return None
    held_out = header.data.valid_share is not None and header.data.unit != "window"
    instead = "--held-out takes the others alone" if held_out else "name others"
    return f"the model learnt from most of these texts, which makes its figures too good; {instead}"


class _Selected(Iterator[str]):
    """The texts of a corpus that are measured, all unless told otherwise. `places` are theirs in the corpus.

    They are read once: they may come from a pipe.
    """

    def __init__(self, texts: Iterator[str], wanted: Callable[[str], bool] | None) -> None:
        self.texts, self.wanted = texts, wanted
        self.places: list[int] = []
        self.count = 0

    def __next__(self) -> str:
        for text in self.texts:
            self.count += 1
            if self.wanted is None or self.wanted(text):
                self.places.append(self.count - 1)
                return text
        raise StopIteration

    def first(self, most: int) -> list[str]:
        """The first of them, all for 0; the rest of the corpus is counted."""
        kept = list(islice(self, most or None))
        self.count += sum(1 for _ in self.texts)
        return kept

    def aligned(self, name: str, lines: Iterator[str], things: str) -> list[str]:
        """What a file holds for each of the first texts.

        Raises:
            DataError: where it holds more or fewer than there are texts in the whole corpus.
        """
        wanted, kept, found = set(self.places), [], 0
        for line in lines:
            if found in wanted:
                kept.append(line)
            found += 1
        if found != self.count:
            raise DataError(
                f"{name} holds {found:,} {things}, the corpus {self.count:,} texts; they must be aligned",
                hint="one for every text of the corpus, in the same order; an empty line counts",
            )
        return kept


def _train_baseline(
    path: Path, header: ModelHeader, *, device: str, dtype: Any, threads: int | None, quiet: bool
) -> Path:
    """The baseline of a model, trained unless it was before."""
    with console.waiting("loading the model", quiet=quiet):
        from gptvae_cli.baseline import Baseline
        from gptvae_cli.cli.train import watch
        from gptvae_cli.device import resolve_device, resolve_dtype, tune_cpu
        from gptvae_cli.header import read_header

    found = Baseline(path, header)
    if found.finished():
        console.note(f"the baseline is {found.folder}, trained before", quiet=quiet)
        console.note(found.unlike(read_header(found.path).training), quiet=quiet)
        return found.path
    where = resolve_device(device)
    usual, own = tune_cpu(threads), threads
    # As the model was trained, unless something else is asked for.
    if header.training.get("device") == where.device.type:
        own = threads or found.threads
        dtype = found.precision if dtype == "auto" else dtype
    precision = resolve_dtype(dtype, where.device, training=True)
    now = {"device": where.device.type, "precision": precision.name, "threads": tune_cpu(own)}
    console.note(f"training a baseline without a latent, in {found.folder}", quiet=quiet)
    console.note(found.unlike(now), quiet=quiet)
    with found.training(where, precision) as job:
        watch(job, quiet=quiet, began=time.monotonic())
    tune_cpu(usual)
    return found.path
