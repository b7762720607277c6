"""`gptvae`: the commands, and the one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from contextlib import redirect_stdout, suppress
from itertools import zip_longest
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from gptvae_cli import __version__
from gptvae_cli.cli import console, demo, encode, evaluate, flags, generate, help, info, interpolate, streams, train
from gptvae_cli.config import did_you_mean
from gptvae_cli.errors import ConfigError, ExitCode, GPTVAEError

EXAMPLES = """\
gptvae demo
gptvae train corpus.txt
gptvae encode ref.txt > z.npy
gptvae generate --latent z.npy
gptvae interpolate a.txt b.txt
gptvae encode - < a.txt | gptvae generate --latent -
"""

ELSEWHERE = {
    "sample": "generate",
    "decode": "generate",
    "--batch-size": "--batch-tokens",
    "--learning-rate": "--lr",
    "--latent-dim": "--dim-latent",
    "--latent-size": "--dim-latent",
    "--n": "--copies",
    "--num-samples": "--copies",
    "--output": "--out",
    "--time": "--max-time",
}
"""Names that other programs have for commands and options, and ours."""


class _Commands(TyperGroup):
    """The group of commands. Both the console script and Typer's test runner enter by `main`."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Runs a command and exits; renders what is wrong with the command line itself."""
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
            # Not at shutdown, where Python would report a closed pipe itself.
            sys.stdout.flush()
        except typer.TyperException as problem:
            given = args[0] if args else options.get("args")
            code = _show_usage_error(problem, sys.argv[1:] if given is None else list(given))
        except (BrokenPipeError, SystemExit) as problem:
            # Typer and Rich end the process with 1 when they meet a closed pipe.
            if isinstance(problem, SystemExit) and not isinstance(problem.__context__, BrokenPipeError):
                raise
            console.discard(sys.stdout)
            code = ExitCode.CLOSED_PIPE
        except OSError as problem:
            code = _show_error(problem)
        sys.exit(code or ExitCode.DONE)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        help.show(ctx, list(self.commands.values()))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`gptvae help train` is `gptvae train --help`."""
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The commands, and `help`, which is none of them."""
        found = super().shell_complete(ctx, incomplete)
        if "help".startswith(incomplete):
            item = type(super().shell_complete(ctx, "")[0])  # Typer keeps its name private
            found.append(item("help", help="Show how a command is used."))
        return found

    def invoke(self, ctx: Any) -> Any:
        """Runs a command, and renders the errors that it meets. (`ctx` is of a class that Typer keeps private.)"""
        try:
            return super().invoke(ctx)
        except (typer.TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as problem:
            if ctx.meta.get(flags.DEBUG_KEY):
                console.stderr.out(console.sanitize("".join(traceback.format_exception(problem))), end="")
            if isinstance(problem, streams.NothingToReadError):
                self._show_help(ctx)
            if isinstance(problem, ConfigError) and problem.hint is None:
                problem.hint = f"gptvae {ctx.invoked_subcommand} --help"
            raise typer.Exit(_show_error(problem)) from problem

    def _show_help(self, ctx: typer.Context) -> None:
        """The help of the command that was called, on stderr: stdout may be a file that waits for data."""
        name = str(ctx.invoked_subcommand)
        command = self.get_command(ctx, name)
        assert command is not None
        with redirect_stdout(sys.stderr), suppress(typer.Exit):
            command.make_context(name, ["--help"], parent=ctx)


def _show_error(problem: Exception) -> int:
    match problem:
        case GPTVAEError():
            console.error(problem.message, problem.hint)
            return problem.exit_code
        case OSError():
            console.discard(sys.stdout)  # or flushing it at shutdown would fail once more
            where = problem.filename or "input or output"
            console.error(f"{where}: {problem.strerror or problem}", None)
        case _ if _is_out_of_memory(problem):
            hint = "training takes less with a smaller --batch-tokens; a GPU may be another program's too: --device cpu"
            console.error("out of memory", hint)
        case RuntimeError() if "CUDA" in str(problem):
            what = str(problem).partition("\n")[0]
            console.error(
                f"the GPU failed: {what}", "train --resume goes on from the last saved state; or --device cpu"
            )
        case _:
            what = f"{type(problem).__name__}: {problem}".partition("\n")[0]
            console.error(f"this should not have happened: {what}", "run it again with --debug and report it")
    return ExitCode.FAILURE


def _is_out_of_memory(problem: Exception) -> bool:
    """Torch has an error of its own for a GPU's memory, if it is the one to miss it, and none for a CPU's."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    said = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(problem, RuntimeError) and any(words in str(problem) for words in said)


def _show_usage_error(problem: typer.TyperException, arguments: list[str]) -> int:
    """In the look of the other errors: Typer's own messages are sentences in a box."""
    # The formatted message would repeat the possibilities.
    said = problem.message if hasattr(problem, "possibilities") else problem.format_message()
    message, _, guess = f"{said[:1].lower()}{said[1:]}".partition(" Did you mean ")
    parameter = getattr(problem, "param", None)
    found, name = _value_of(parameter, arguments)
    context = getattr(problem, "ctx", None)
    command = context.command_path if context else " ".join(["gptvae", *arguments[:1]])
    possible = _meant(problem, arguments) or re.findall(r"'([^']+)'", guess)
    hint = f"did you mean {' or '.join(sorted(possible))}?" if possible else None
    if command == "gptvae generate" and "extra argument" in message:
        hint = (
            "--ref FILE takes texts, --text one text, --latent FILE latents, --prior a number of random ones:"
            " gptvae generate --help"
        )
    if parameter is not None and found is not None:
        choices = parameter.type_descriptor.choices
        allowed = f"one of {', '.join(choices)}" if choices else _allowed(problem.message)
        message = f"{name} is {found!r}, it must be {allowed}"
        hint = did_you_mean(found, choices) if choices else None
    console.error(" ".join(message.split()).removesuffix("."), hint or f"{command} --help")
    return problem.exit_code


def _meant(problem: typer.TyperException, arguments: list[str]) -> list[str]:
    """Our names that an option or command, which there is not, may stand for."""
    context, unknown = getattr(problem, "ctx", None), getattr(problem, "option_name", "")
    if not unknown:
        name = next(iter(arguments), "")
        return [ELSEWHERE[name]] if context and context.command_path == "gptvae" and name in ELSEWHERE else []
    known = [option for parameter in context.command.params for option in parameter.opts] if context else []
    if ELSEWHERE.get(unknown) in known:
        return [ELSEWHERE[unknown]]
    likely = getattr(problem, "possibilities", None) or []
    return [option for option in known if option.startswith(unknown)] or list(likely)


def _allowed(message: str) -> str:
    """What an option takes, out of pydantic's `Input should be a valid integer, unable to ...`, or of our own words."""
    return message.removeprefix("Value error, ").removeprefix("Input should be ").partition(", unable to")[0]


def _value_of(parameter: Any, arguments: list[str]) -> tuple[str | None, str]:
    """What was given for an option, and under which name: Typer says what it expected, but not what it found."""
    # Of an option that is given twice, the last one counts.
    for argument, following in reversed(list(zip_longest(arguments, arguments[1:]))):
        for option in getattr(parameter, "opts", ()):
            if argument == option:
                return following, option
            if argument.startswith(f"{option}="):
                return argument.partition("=")[2], option
    variable = str(getattr(parameter, "envvar", None))
    return os.environ.get(variable), variable


app = typer.Typer(
    name="gptvae",
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EXAMPLES,
)
app.command(cls=help.Command, epilog=demo.EXAMPLES)(demo.demo)
app.command(cls=help.Command, epilog=train.EXAMPLES)(train.train)
app.command(cls=help.Command, epilog=encode.EXAMPLES)(encode.encode)
app.command(cls=help.Command, epilog=generate.EXAMPLES)(generate.generate)
app.command(cls=help.Command, epilog=interpolate.EXAMPLES)(interpolate.interpolate)
app.command(cls=help.Command, epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command(cls=help.Command, epilog=info.EXAMPLES)(info.info)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"gptvae {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def gptvae(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train a GPT with a latent on your text, and use that latent: encode, generate, interpolate."""
    if ctx.invoked_subcommand is None:
        ctx.get_help()  # which prints it, too


def main() -> None:
    """The console script."""
    if sys.stdout is None:
        console.error("standard output is closed", "send it somewhere: > FILE")
        sys.exit(ExitCode.FAILURE)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _terminate)
    # Threads that wait for each other spin, by libgomp's default for so long that training beside a busy process is
    # several times slower than with this (`tests/benchmarks/speed/`). It is read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    app(prog_name="gptvae")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    # An exception, so that unfinished files are removed on the way out.
    sys.exit(ExitCode(128 + number))
