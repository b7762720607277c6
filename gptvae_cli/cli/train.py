"""`gptvae train`: texts to a model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptvae_cli import __version__
from gptvae_cli.cli import console
from gptvae_cli.config import (
    STOCK_RECIPE,
    Config,
    DataConfig,
    DType,
    MachineConfig,
    Objective,
    PresetName,
    RunConfig,
    SizeConfig,
    TrainConfig,
    Unit,
    from_dict,
)
from gptvae_cli.errors import CollapsedError, ConfigError, ExitCode, FieldError
from gptvae_cli.options import environment_layer, file_layer, flags_layer, keys, merged, to_toml

if TYPE_CHECKING:
    from gptvae_cli.run import Job

_PROCESS_BEGAN = time.monotonic()
_LIMITS = ("steps", "epochs", "max_time")
_TEXTS, _SIZES, _LEARNING, _RUN = "The texts", "The model", "Learning", "The run"

EXAMPLES = """\
gptvae train corpus.txt
gptvae train poems/ --unit paragraph --max-time 1h --out poems-run
gptvae train commands.txt --latents-from descriptions.txt
zcat big.txt.gz | gptvae train - --tokenizer bpe --epochs 3
gptvae train --resume --max-time 20m
"""


def train(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CORPUS", help="Files or folders of text; - or nothing reads standard input.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The run folder.  [default: ./gptvae-run]", rich_help_panel=_RUN),
    ] = None,
    unit: Annotated[
        Unit | None, typer.Option(help="What one text is.  [default: line]", rich_help_panel=_TEXTS)
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Key of the text in .jsonl files.  [default: text]", rich_help_panel=_TEXTS),
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SHARE",
            help="Held-out texts: a file, or a share of the corpus.  [default: 0.05]",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    latents_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Texts for the encoder, one for each text of the corpus.", rich_help_panel=_TEXTS
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="auto|bytes|bpe|FILE",
            help="auto, bytes, bpe, or a tokenizers JSON file.  [default: auto]",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Most tokens of a trained BPE.  [default: by the corpus]", rich_help_panel=_TEXTS)
    ] = None,
    preset: Annotated[
        PresetName | None,
        typer.Option(help="All the sizes below but the latent's.  [default: auto]", rich_help_panel=_SIZES),
    ] = None,
    dim: Annotated[int | None, typer.Option(help="Width of encoder and decoder.", rich_help_panel=_SIZES)] = None,
    depth: Annotated[int | None, typer.Option(help="Layers of the decoder.", rich_help_panel=_SIZES)] = None,
    enc_depth: Annotated[int | None, typer.Option(help="Layers of the encoder.", rich_help_panel=_SIZES)] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.", rich_help_panel=_SIZES)] = None,
    attn_dim_head: Annotated[
        int | None, typer.Option(help="Width of a head.  [default: 64]", rich_help_panel=_SIZES)
    ] = None,
    dim_latent: Annotated[
        int | None, typer.Option(help="Width of the latent.  [default: 32]", rich_help_panel=_SIZES)
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Longest text in tokens.  [default: by the corpus]", rich_help_panel=_SIZES)
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="Nats per token, or x-transformers' units and defaults.  [default: elbo]", rich_help_panel=_LEARNING
        ),
    ] = None,
    vae_kl_loss_weight: Annotated[
        float | None, typer.Option(help="Beta, the weight of the KL.  [default: 1]", rich_help_panel=_LEARNING)
    ] = None,
    kl_warmup: Annotated[
        float | None,
        typer.Option(help="Share of the run over which beta rises from 0.", rich_help_panel=_LEARNING),
    ] = None,
    vae_kl_div_floor: Annotated[
        float | None, typer.Option(help="Free bits: nats a dimension.", rich_help_panel=_LEARNING)
    ] = None,
    target_rate: Annotated[
        float | None,
        typer.Option(help="Free bits: nats a text, all dimensions together.", rich_help_panel=_LEARNING),
    ] = None,
    latents_dropout_prob: Annotated[
        float | None, typer.Option(help="Share of the rows that train without z.", rich_help_panel=_LEARNING)
    ] = None,
    bag_of_words: Annotated[
        float | None,
        typer.Option(help="Weight of the loss that predicts the words from z alone.", rich_help_panel=_LEARNING),
    ] = None,
    word_dropout: Annotated[
        float | None,
        typer.Option(help="Share of the decoder's input hidden at first.", rich_help_panel=_LEARNING),
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a step.", rich_help_panel=_LEARNING)] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts that a step is cut into, to save memory.", rich_help_panel=_LEARNING)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=_LEARNING)] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices.", rich_help_panel=_LEARNING)] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the run in which the rate rises.", rich_help_panel=_LEARNING)
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="Share of the run, at its end, in which it falls.", rich_help_panel=_LEARNING)
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm.", rich_help_panel=_LEARNING)] = None,
    max_time: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Of the whole run, as 90s, 10m, 2h.  [default: 10m, none with --steps or --epochs]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=_RUN)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the corpus.", rich_help_panel=_RUN)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=_RUN)
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run in --out.", rich_help_panel=_RUN)] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 5 if the latent has collapsed.", rich_help_panel=_RUN)
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A TOML file of these options; flags go over it.", rich_help_panel=_RUN),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration as TOML and stop.", rich_help_panel=_RUN)
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, order and noise.  [default: 0]", rich_help_panel=_RUN)
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:1.  [default: auto]", rich_help_panel=_RUN),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Numbers to compute with; auto asks the hardware.  [default: auto]", rich_help_panel=_RUN),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.  [default: as torch finds best]", rich_help_panel=_RUN)
    ] = None,
    quiet: console.QuietOption = False,
    debug: console.DebugOption = False,
) -> None:
    """Train a model on texts, and say what its latent carries.

    The model is RUN/model.safetensors, alone; its path is printed on standard output.
    """
    plan = _Plan({**locals(), "strict": strict or None})
    if print_config:
        console.write_text(plan.to_toml())
        return
    if not plan.run.corpus and not resume:
        console.refuse_terminal_stdin("gptvae train corpus.txt")

    from gptvae_cli import run
    from gptvae_cli.device import resolve_device, resolve_dtype, tune_cpu

    with plan.naming():
        where = resolve_device(plan.machine.device)
        precision = resolve_dtype(plan.machine.dtype, where.device, training=True)
    tune_cpu(plan.machine.threads)
    folder = Path(plan.run.out)
    with run.claimed(folder, resume=resume, force=force):
        if resume:
            limits, sources = plan.limits_for_resume(), plan.run.corpus
            job = run.resume(folder, limits, sources=sources, device=where, precision=precision)
        else:
            with plan.naming(), console.reading_progress("reading the corpus", quiet=quiet) as on_progress:
                job = run.start(
                    folder,
                    plan.run.corpus,
                    plan.data,
                    plan.train,
                    shape=plan.sizes.shape,
                    preset=plan.sizes.preset,
                    device=where,
                    precision=precision,
                    on_progress=on_progress,
                )
        if not quiet:
            for note in job.notes:
                console.note(note)
        watch(job, quiet=quiet)
        _finish(job, quiet=quiet)
        console.write_text(f"{folder / 'model.safetensors'}\n")
        strict = job.learner.config.strict and not job.learner.config.without_latent
        if strict and job.figures is not None and job.figures.collapsed:
            raise CollapsedError(
                f"the latent carries {job.figures.mutual_information:.2f} nats, --strict asks for 1 at least",
                hint="train longer, or raise --target-rate",
            )


class _Plan:
    """What was asked for: flags over the configuration file over the environment, as one config a table.

    Raises:
        ConfigError: for what cannot be, naming the place where it was asked for.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.flags = flags_layer(options)
        self.has_file = options["config"] is not None
        below = [environment_layer(os.environ)] + ([file_layer(options["config"])] if self.has_file else [])
        self.asked = merged([*below, self.flags])
        values = dict(self.asked.values)
        if ("steps" in values or "epochs" in values) and "max_time" not in values:
            values["max_time"] = None
        if values.get("objective") == "stock":
            values = STOCK_RECIPE | values
        with self.naming():
            self.run = _config(RunConfig, values)
            self.data = _config(DataConfig, values)
            self.sizes = _config(SizeConfig, values)
            self.train = _config(TrainConfig, values)
            self.machine = _config(MachineConfig, values)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Makes an error of a field say where the field was set."""
        try:
            yield
        except FieldError as error:
            label = self.asked.labels.get(error.field)
            raise (error.named(label) if label else error) from error

    def limits_for_resume(self) -> dict[str, Any]:
        """The flags that a resumed run may change: those that say when to stop. The environment is not asked."""
        kept = {key for kind in (DataConfig, SizeConfig, TrainConfig) for key in keys(kind)} - {*_LIMITS, "strict"}
        changed = [label for key, label in self.flags.labels.items() if key in kept]
        if self.has_file:
            changed.append("--config")
        if changed:
            raise ConfigError(
                f"--resume keeps the run's configuration, found {changed[0]}",
                hint="only --max-time, --steps, --epochs and --strict may change",
            )
        limits = {key: self.flags.values[key] for key in _LIMITS if key in self.flags.values}
        if limits:
            limits = dict.fromkeys(_LIMITS) | limits
        return limits | ({"strict": True} if "strict" in self.flags.values else {})

    def to_toml(self) -> str:
        """The configuration as a file that `--config` reads."""
        tables = to_toml((self.run, self.data, self.sizes, self.train, self.machine))
        return f"# gptvae {__version__}; paths are relative to the working directory\n\n{tables}"


def _config(kind: type[Config], values: Mapping[str, object]) -> Config:
    known = keys(kind)
    return from_dict(kind, {key: value for key, value in values.items() if key in known})


def watch(job: Job, *, quiet: bool) -> None:
    """Runs a job under the display; an interrupt ends it at a step's end, with its state saved."""
    from gptvae_cli.cli.display import TrainingDisplay

    example = 0
    title = f"gptvae train, {job.folder}"
    width = None if job.learner.config.without_latent else job.model_config.dim_latent
    with (
        _graceful() as caught,
        TrainingDisplay(console.stderr, title, width, quiet=quiet) as display,
    ):
        for report in job.run(should_stop=lambda: bool(caught), seconds=lambda: time.monotonic() - _PROCESS_BEGAN):
            display.update(report)
            if width is not None and report.figures is not None and not quiet and not report.done:
                display.show_example(*job.reconstructions(1, start=example)[0])
                example += 1
    if caught:
        console.note(f"stopped at step {job.learner.counters.step:,}; the state is saved")
        console.note(f"go on with: gptvae train --resume --out {job.folder}")
        raise typer.Exit(ExitCode.INTERRUPTED if caught[0] == signal.SIGINT else ExitCode.TERMINATED)


def _finish(job: Job, *, quiet: bool) -> None:
    from gptvae_cli.run import verdict

    job.load_best()
    if quiet or job.figures is None:
        return
    console.heading("Verdict")
    console.note(verdict(job.figures, job.learner.config))
    if job.learner.config.without_latent:
        console.heading("Next")
        console.note(f"gptvae evaluate test.txt --baseline {job.folder}")
        return
    console.heading("Held-out texts, and what the model writes from their latents")
    for text, written in job.reconstructions(3):
        console.pair(text, written)
    model = "" if str(job.folder) == "gptvae-run" else f" --model {job.folder}"
    console.heading("Next")
    console.note(f"gptvae generate --prior 5{model}")


@contextmanager
def _graceful() -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; a second one has its usual effect."""
    caught: list[int] = []
    previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()
