"""`gptvae train`: texts to a model."""

from __future__ import annotations

import errno
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptvae_cli.cli import console, flags, streams
from gptvae_cli.config import ConditioningName, DataConfig, DType, Errors, Log, Objective, OnCollapse, PresetName, Unit
from gptvae_cli.errors import CollapsedError, ConfigError, ExitCode
from gptvae_cli.header import DEFAULT_RUN, MODEL_NAME
from gptvae_cli.options import Plan, default_in_words, misspelt

if TYPE_CHECKING:
    from gptvae_cli.run import Job

_PROCESS_BEGAN = time.monotonic()
_SAME_WISH_SECONDS = 1.0
_SHORT = 60
"""Characters of a text that is shown in a command to paste."""

EXAMPLES = """\
gptvae train corpus.txt
gptvae train poems/ --unit paragraph --max-time 1h --out poems-run
gptvae train 'logs/**/*.log.zst' --errors replace
gptvae train commands.txt --latents-from descriptions.txt
zcat big.txt.gz | gptvae train - --tokenizer bpe --epochs 3
gptvae train --resume --max-time 20m
"""


def _option(panel: str, key: str, help: str, metavar: str | None = None, words: Sequence[str] = ()) -> Any:
    """An option that a configuration file may hold, too. Its default is None, which lets the file speak.

    Args:
        words: values to complete beside the names of files.
    """
    return typer.Option(
        help=f"{help} [default: {default_in_words(key)}]",
        metavar=metavar,
        rich_help_panel=panel,
        autocompletion=(lambda: list(words)) if words else None,
    )


_run = partial(_option, "The run")
_texts = partial(_option, "The texts")
_sizes = partial(_option, "The model")
_learning = partial(_option, "Learning")
_machine = partial(_option, flags.COMMON)
_flag = partial(typer.Option, rich_help_panel="The run")


def train(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(metavar="CORPUS", help="Files, folders or patterns of text; - or nothing reads stdin."),
    ] = None,
    out: Annotated[str | None, _run("out", "The run folder.", "FOLDER")] = None,
    max_time: Annotated[
        str | None, _run("max_time", "In all, a resumed run's earlier parts too: 90s, 10m, 2h.", "TIME")
    ] = None,
    steps: Annotated[int | None, _run("steps", "Optimizer steps.")] = None,
    epochs: Annotated[float | None, _run("epochs", "Passes over the corpus.")] = None,
    resume: Annotated[bool, _flag("--resume", help="Go on with the run in --out.")] = False,
    force: Annotated[
        bool, _flag("--force", help="Replace the run in --out, once the new corpus has been read.")
    ] = False,
    log: Annotated[Log | None, _run("log", "Also write RUN/tensorboard, for TensorBoard.")] = None,
    on_collapse: Annotated[
        OnCollapse | None, _run("on_collapse", "A latent that is not being used: change the run, or say so.")
    ] = None,
    strict: Annotated[bool | None, _flag("--strict", help="Exit with 5 if the latent is not being used.")] = None,
    config: Annotated[Path | None, _flag(metavar="FILE", help="A TOML file of these options.")] = None,
    print_config: Annotated[bool, _flag("--print-config", help="Print such a file, and stop.")] = False,
    unit: Annotated[Unit | None, _texts("unit", "What one text is.")] = None,
    field: Annotated[
        str | None,
        _texts("field", "Key of the text in .jsonl, .csv and .parquet files; stdin is then JSON lines.", "KEY"),
    ] = None,
    errors: Annotated[Errors | None, _texts("errors", "Bytes that are not UTF-8 are an error, or U+FFFD.")] = None,
    valid: Annotated[
        str | None, _texts("valid", "Held-out texts: a file, or a share of the corpus.", "FILE|SHARE")
    ] = None,
    latents_from: Annotated[
        str | None, _texts("latents_from", "Texts for the encoder, one for each text of the corpus.", "FILE")
    ] = None,
    tokenizer: Annotated[
        str | None,
        _texts(
            "tokenizer",
            "bpe is trained on the corpus; FILE is a tokenizer.json.",
            "auto|bytes|bpe|FILE",
            ("auto", "bytes", "bpe"),
        ),
    ] = None,
    vocab_size: Annotated[int | None, _texts("vocab_size", "Tokens of a trained BPE, at most.")] = None,
    preset: Annotated[PresetName | None, _sizes("preset", "Width, depths and heads under one name.")] = None,
    dim: Annotated[int | None, _sizes("dim", "Width of encoder and decoder.")] = None,
    depth: Annotated[int | None, _sizes("depth", "Layers of the decoder.")] = None,
    enc_depth: Annotated[int | None, _sizes("enc_depth", "Layers of the encoder.")] = None,
    heads: Annotated[int | None, _sizes("heads", "Attention heads.")] = None,
    attn_dim_head: Annotated[int | None, _sizes("attn_dim_head", "Width of a head.")] = None,
    dim_latent: Annotated[int | None, _sizes("dim_latent", "Width of the latent.")] = None,
    max_seq_len: Annotated[int | None, _sizes("max_seq_len", "Longest text in tokens.")] = None,
    conditioning: Annotated[
        ConditioningName | None, _sizes("conditioning", "The latent is a token, or is added to BOS.")
    ] = None,
    objective: Annotated[
        Objective | None, _learning("objective", "The ELBO, or x-transformers' loss and defaults.")
    ] = None,
    vae_kl_loss_weight: Annotated[float | None, _learning("vae_kl_loss_weight", "Beta, the weight of the KL.")] = None,
    kl_warmup: Annotated[float | None, _learning("kl_warmup", "Share of the run over which beta rises from 0.")] = None,
    target_rate: Annotated[
        float | None, _learning("target_rate", "Free bits: nats per text that the latent may carry.")
    ] = None,
    vae_kl_div_floor: Annotated[float | None, _learning("vae_kl_div_floor", "Free bits: nats per dimension.")] = None,
    latents_dropout_prob: Annotated[
        float | None, _learning("latents_dropout_prob", "Share of the texts that train without z; more at first.")
    ] = None,
    bag_of_words: Annotated[
        float | None, _learning("bag_of_words", "Weight of the loss that predicts the words from z alone.")
    ] = None,
    word_dropout: Annotated[
        float | None, _learning("word_dropout", "Share of the decoder's input hidden at first.")
    ] = None,
    dropout: Annotated[float | None, _learning("dropout", "Of the decoder; it grows with the epochs.")] = None,
    batch_tokens: Annotated[int | None, _learning("batch_tokens", "Tokens of a step.")] = None,
    accumulate: Annotated[int | None, _learning("accumulate", "Parts that a step is cut into, to save memory.")] = None,
    lr: Annotated[float | None, _learning("lr", "Peak learning rate.")] = None,
    warmup: Annotated[float | None, _learning("warmup", "Share of the run in which the rate rises.")] = None,
    decay: Annotated[float | None, _learning("decay", "Share of the run, at its end, in which it falls.")] = None,
    weight_decay: Annotated[float | None, _learning("weight_decay", "Weight decay of the weight matrices.")] = None,
    clip: Annotated[float | None, _learning("clip", "Largest gradient norm.")] = None,
    seed: Annotated[int | None, _machine("seed", "Seed of weights, order and noise.")] = None,
    device: Annotated[str | None, _machine("device", "auto, cpu, cuda or cuda:1.", "DEVICE", flags.DEVICES)] = None,
    dtype: Annotated[DType | None, _machine("dtype", "Numbers to compute with; auto takes the faster ones.")] = None,
    threads: Annotated[int | None, _machine("threads", "CPU threads.")] = None,
    quiet: flags.QuietOption = False,
    debug: flags.DebugOption = False,
) -> None:
    """Train a model on texts, and say what its latent carries.

    The model is RUN/model.safetensors, alone; its path is printed on standard output.

    Options with a default can also stand in a TOML file or in the environment, as GPTVAE_DIM for --dim. Flags override
    the file, the file overrides the environment.
    """
    plan = Plan(locals(), os.environ)
    if resume and force:
        raise ConfigError("--resume goes on with a run, --force replaces it, both were given", hint="leave one out")
    if os.environ.get("WORLD_SIZE", "1") != "1":  # as torchrun sets it
        raise ConfigError("several processes cannot train one model yet", hint="gptvae train, without torchrun")
    for remark in misspelt(os.environ):
        console.note(remark, quiet=quiet)
    if print_config:
        streams.write_text(plan.to_toml())
        return
    corpus = plan.run.corpus or ([] if resume else ["-"])
    named = [*corpus, plan.data.valid, plan.data.latents_from]
    if named.count("-") > 1:
        hint = "name files; without CORPUS it is the corpus"
        raise ConfigError("standard input was named twice, and can be read once", hint=hint)
    if "-" in named:
        streams.refuse_terminal_stdin("gptvae train corpus.txt")

    with console.waiting("getting ready", quiet=quiet):
        from gptvae_cli import run
        from gptvae_cli.device import resolve_device, resolve_dtype, tune_cpu
        from gptvae_cli.doctor import advice, diagnosis
        from gptvae_cli.folder import claimed
        from gptvae_cli.sources import expand
        from gptvae_cli.text import with_field

        with plan.naming():
            where = resolve_device(plan.machine.device)
            tune_cpu(plan.machine.threads)
            precision = resolve_dtype(plan.machine.dtype, where.device, training=True)
    if not resume:
        expand(plan.run.corpus)  # before a run that is there is spoken of: a name may be mistyped
        if "field" in plan.flags.values or plan.data.field != DataConfig().field:
            beside = [*filter(None, [plan.data.valid_file, plan.data.latents_from])]
            corpus = with_field([*corpus, *beside], plan.data.field)[: len(corpus)]
    folder = Path(plan.run.out)
    with claimed(folder, resume=resume, force=force):
        if resume:
            limits, sources = plan.limits_for_resume(), plan.run.corpus
            job = run.resume(folder, limits, sources=sources, device=where, precision=precision)
        else:
            reading = console.progress("reading the corpus", "characters", quiet=quiet)
            with plan.naming(), reading as on_progress:
                job = run.start(
                    folder,
                    corpus,
                    plan.data,
                    plan.train,
                    sizes=plan.sizes,
                    device=where,
                    precision=precision,
                    on_progress=on_progress,
                )
        for note in job.notes:
            console.note(note, quiet=quiet)
        watch(job, quiet=quiet)
        _finish(job, plan.run.corpus, quiet=quiet)
        streams.write_text(f"{folder / MODEL_NAME}\n")
        strict = job.learner.config.strict and not job.learner.config.without_latent
        if strict and job.figures is not None and (wrong := diagnosis(job.figures, job.learner.config)) is not None:
            what_to_do = advice(job.figures, job.learner.config, job.learner.counters.step)
            raise CollapsedError(f"{wrong}, and --strict was given", hint=what_to_do)


def watch(job: Job, *, quiet: bool, began: float = _PROCESS_BEGAN) -> None:
    """Runs a job under the display; an interrupt ends it at a step's end, with its state saved.

    Args:
        began: when the time of the run began to count, of `time.monotonic`.
    """
    from gptvae_cli.cli.display import TrainingDisplay

    config = job.learner.config
    width = None if config.without_latent else job.model_config.dim_latent
    examples, well = itertools.count(), True
    with (
        _graceful() as caught,
        _clock(began) as seconds,
        TrainingDisplay(console.stderr, f"gptvae train, {job.folder}", width, quiet=quiet) as display,
    ):
        for report in job.run(should_stop=lambda: bool(caught), seconds=seconds):
            try:
                display.update(report)
                if report.figures is None or report.done:
                    continue
                if report.diagnosis is not None and (well or report.treatment is not None):
                    early = ", which is usual while beta rises" if report.beta < config.vae_kl_loss_weight else ""
                    console.note(f"at {report.progress:.0%}: {report.diagnosis}{early}", quiet=quiet)
                if report.treatment is not None:
                    console.note(f"so {report.treatment}", quiet=quiet)
                if report.diagnosis is None and not well:
                    console.note(f"at {report.progress:.0%}: the latent is being used", quiet=quiet)
                well = report.diagnosis is None
                if width is not None and not quiet:
                    display.show_example(*job.reconstructions(1, start=next(examples))[0])
            except SystemExit as ended:  # Rich's, where nobody reads its messages any more
                if not isinstance(ended.__context__, BrokenPipeError):
                    raise
                caught.append(signal.SIGPIPE)
            except OSError as error:
                if error.errno == errno.EIO:
                    streams.forget_terminal()  # as SIGHUP is about to say
                else:  # such as a full disk, on which only the messages are
                    console.discard(sys.stderr)
    if caught:
        console.note(f"stopped at step {job.learner.counters.step:,}; the state is saved")
        console.command(f"go on with: gptvae train --resume --out {shlex.quote(str(job.folder))}")
        raise typer.Exit(ExitCode(128 + caught[0]))


def _finish(job: Job, sources: Sequence[str], *, quiet: bool) -> None:
    from gptvae_cli.doctor import advice, decline, verdict

    kept = job.load_best()
    if quiet or job.figures is None:
        return
    console.heading("Verdict")
    console.note(verdict(job.figures, job.learner.config))
    worse = None
    if job.last_figures not in (None, job.figures):
        steps = f"step {kept.training['steps']:,} of {job.learner.counters.step:,}"
        worse = decline(job.figures, job.last_figures, job.learner.config, job.epochs)
        console.note(f"that is the model of {steps}, the best on held-out texts{f'; {worse}' if worse else ''}")
    if worse is None:
        console.note(advice(job.figures, job.learner.config, job.learner.counters.step))
    if job.learner.config.without_latent:
        console.heading("Next")
        console.command(f"gptvae evaluate test.txt --baseline {shlex.quote(str(job.folder))}")
        return
    console.heading("Held-out texts, and what the model writes from their latents")
    pairs = job.reconstructions(3)
    for text, written in pairs:
        console.pair(text, written)
    found_without = job.folder == Path(DEFAULT_RUN) and not os.environ.get("GPTVAE_MODEL")
    model = "" if found_without else f" --model {shlex.quote(str(job.folder))}"
    console.heading("Next")
    console.command(f"gptvae generate --prior 5{model}")
    ends = list(dict.fromkeys(text for text, _ in pairs if text.isprintable() and 0 < len(text) <= _SHORT))[:2]
    if len(ends) == 2 and job.data.latents_from is None:
        start, end = map(shlex.quote, ends)
        console.command(f"gptvae interpolate --from {start} --to {end} --refine{model}")
    if texts := _held_out(job, sources):
        console.command(f"gptvae evaluate {shlex.join(texts)}{model}")


def _held_out(job: Job, sources: Sequence[str]) -> list[str]:
    """How `evaluate` is told of the held-out texts; nothing where that is not possible, or not in a line."""
    data = job.data
    if data.valid_file is not None:
        return [data.valid_file]
    if data.unit == "window" or len(sources) != 1 or sources == ["-"] or len(job.valid) < 2:
        return []
    beside = [] if data.latents_from is None else ["--latents-from", data.latents_from]
    return [*sources, "--held-out", *beside]


@contextmanager
def _clock(began: float) -> Iterator[Callable[[], float]]:
    """Seconds since a run began, but for those in which the process was stopped, by Ctrl-Z or a scheduler."""
    looked = time.monotonic()

    def seconds() -> float:
        nonlocal looked
        looked = time.monotonic()
        return looked - began

    def go_on(number: int, frame: FrameType | None) -> None:
        nonlocal began
        began += time.monotonic() - looked

    previous = signal.signal(signal.SIGCONT, go_on)
    try:
        yield seconds
    finally:
        signal.signal(signal.SIGCONT, previous)


@contextmanager
def _graceful() -> Iterator[list[int]]:
    """Collects the first SIGINT, SIGTERM or SIGHUP instead of dying of it; a later one has its usual effect.

    One that comes within a second is the same wish: a key is pressed twice, and a wrapper such as `timeout` or
    `uv run` passes on what the terminal has already sent to all of its processes.
    """
    caught: list[int] = []
    caught_at = 0.0
    previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        nonlocal caught_at
        if not caught:
            caught.append(number)
            caught_at = time.monotonic()
            if number == signal.SIGHUP:
                streams.forget_terminal()
        elif time.monotonic() - caught_at >= _SAME_WISH_SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            previous[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()
