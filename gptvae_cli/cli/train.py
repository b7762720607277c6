"""`gptvae train`: texts to a model."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptvae_cli.cli import console
from gptvae_cli.config import STOCK_RECIPE, DataConfig, TrainConfig, from_dict, read_toml, to_dict, to_toml
from gptvae_cli.errors import CollapsedError, ConfigError, ExitCode

if TYPE_CHECKING:
    from gptvae_cli.run import Job

_PROCESS_BEGAN = time.monotonic()
_SAME_WISH_SECONDS = 1.0
_SHAPE = ("dim", "depth", "enc_depth", "heads", "attn_dim_head", "dim_latent", "max_seq_len")
_LIMITS = ("steps", "epochs", "max_time")
_TEXTS, _SIZES, _LEARNING, _RUN = "The texts", "The model", "Learning", "The run"

EXAMPLES = """Examples:

  gptvae train corpus.txt

  gptvae train poems/ --unit paragraph --max-time 1h --out poems-run

  gptvae train commands.txt --latents-from descriptions.txt

  zcat big.txt.gz | gptvae train - --tokenizer bpe --epochs 3

  gptvae train --resume --max-time 20m
"""


def parse_seconds(text: str) -> float:
    """Seconds from `90`, `90s`, `10m`, `2h`, `1h30m` or `1d`.

    Raises:
        ConfigError: for anything else.
    """
    units = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigError(f"max-time is {text!r}, it must be a time such as 90s, 10m or 1h30m")
    return sum(float(number) * units[unit] for number, unit in parts)


def train(
    corpus: Annotated[
        list[str] | None,
        typer.Argument(help="Files or folders of text; - or nothing reads standard input.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.  [default: ./gptvae-run]", rich_help_panel=_RUN)
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(
            help="What one text is: line, paragraph, file or window.  [default: line]", rich_help_panel=_TEXTS
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Key of the text in .jsonl files.  [default: text]", rich_help_panel=_TEXTS)
    ] = None,
    valid: Annotated[
        str | None,
        typer.Option(help="Held-out texts: a file, or a share of the corpus.  [default: 0.05]", rich_help_panel=_TEXTS),
    ] = None,
    latents_from: Annotated[
        str | None,
        typer.Option(help="Texts for the encoder, one for each text of the corpus.", rich_help_panel=_TEXTS),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="auto, bytes, bpe, or a tokenizers JSON file.  [default: auto]", rich_help_panel=_TEXTS),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(help="Most tokens of a trained BPE.  [default: by the corpus]", rich_help_panel=_TEXTS)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Sizes: auto, nano, micro, small, medium or large.  [default: auto]", rich_help_panel=_SIZES),
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
        str | None,
        typer.Option(
            help="elbo (nats per token) or stock (x-transformers' units and defaults).  [default: elbo]",
            rich_help_panel=_LEARNING,
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
        Path | None, typer.Option(help="A TOML file of these options; flags go over it.", rich_help_panel=_RUN)
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the configuration as TOML and stop.", rich_help_panel=_RUN)
    ] = False,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, order and noise.  [default: 0]", rich_help_panel=_RUN)
    ] = None,
    device: console.DeviceOption = "auto",
    dtype: console.DTypeOption = "auto",
    threads: console.ThreadsOption = None,
    quiet: console.QuietOption = False,
    debug: console.DebugOption = False,
) -> None:
    """Train a model on texts, and say what its latent carries.

    The model is RUN/model.safetensors, alone; its path is printed on standard output.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    given["strict"] = strict or None
    if max_time is not None:
        given["max_time"] = parse_seconds(max_time)
    tables = read_toml(config) if config else {}
    plan = _Plan(tables, {name: value for name, value in given.items() if value is not None})
    if print_config:
        typer.echo(plan.to_toml(), nl=False)
        return
    if not plan.corpus and not resume:
        console.refuse_terminal_stdin("gptvae train corpus.txt")

    from gptvae_cli import run
    from gptvae_cli.device import resolve_device, resolve_dtype, tune_cpu

    where = resolve_device(device)
    precision = resolve_dtype(dtype, where.device, training=True)
    tune_cpu(threads)
    folder = plan.out
    with run.claimed(folder, resume=resume, force=force):
        if resume:
            job = run.resume(folder, plan.limits_for_resume(), sources=plan.corpus, device=where, precision=precision)
        else:
            with console.reading_progress("reading the corpus", quiet=quiet) as on_progress:
                job = run.start(
                    folder,
                    plan.corpus,
                    plan.data,
                    plan.train,
                    shape=plan.shape,
                    preset=plan.preset,
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
    """What was asked for, from the configuration file and the flags over it."""

    def __init__(self, tables: dict[str, dict[str, Any]], flags: dict[str, Any]) -> None:
        run = dict(tables.get("run", {}))
        model = dict(tables.get("model", {}))
        data = dict(tables.get("data", {}))
        train = dict(tables.get("train", {}))
        self.flags = flags
        self.corpus: list[str] = [str(source) for source in flags.get("corpus") or run.pop("corpus", [])]
        run.pop("corpus", None)
        self.out = Path(flags.get("out") or run.pop("out", "gptvae-run"))
        run.pop("out", None)
        for table, known in ((run, ()), (model, (*_SHAPE, "preset"))):
            if unknown := [name for name in table if name not in known]:
                raise ConfigError(f"the configuration has no option {unknown[0]!r} there")
        self.preset = str(flags.get("preset", model.pop("preset", "auto")))
        model.pop("preset", None)
        self.shape: dict[str, int] = model | {name: flags[name] for name in _SHAPE if name in flags}
        for name, value in self.shape.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{name} is {value!r}, it must be a whole number")
        self.data = from_dict(DataConfig, data | {n: v for n, v in flags.items() if n in to_dict(DataConfig())})
        asked = train | {name: value for name, value in flags.items() if name in to_dict(TrainConfig())}
        if ("steps" in asked or "epochs" in asked) and "max_time" not in asked:
            asked["max_time"] = None
        recipe = STOCK_RECIPE if asked.get("objective") == "stock" else {}
        self.train = from_dict(TrainConfig, recipe | asked)

    def limits_for_resume(self) -> dict[str, Any]:
        """The flags that a resumed run may change: those that say when to stop."""
        fixed = [*_SHAPE, *to_dict(DataConfig()), *to_dict(TrainConfig()), "preset", "config"]
        if changed := [name for name in fixed if name in self.flags and name not in (*_LIMITS, "strict")]:
            raise ConfigError(
                f"--resume keeps the run's configuration, found --{changed[0].replace('_', '-')}",
                hint="only --max-time, --steps, --epochs and --strict may change",
            )
        limits = {name: self.flags[name] for name in _LIMITS if name in self.flags}
        if limits:
            limits = dict.fromkeys(_LIMITS) | limits
        return limits | ({"strict": True} if "strict" in self.flags else {})

    def to_toml(self) -> str:
        """The configuration as a file that `--config` reads."""
        return to_toml(
            {
                "run": {"corpus": self.corpus or None, "out": str(self.out)},
                "data": to_dict(self.data),
                "model": {"preset": self.preset, **self.shape},
                "train": to_dict(self.train),
            }
        )


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
    """Collects the first SIGINT or SIGTERM instead of dying of it; a later one has its usual effect.

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
        elif time.monotonic() - caught_at >= _SAME_WISH_SECONDS:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()
