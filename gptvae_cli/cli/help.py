"""The help of a command, for any width of terminal; Typer's own tables cut names and values on a narrow one.

Typer keeps the classes of contexts and parameters private, so they are `Any` here.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand

_LEFT = 26  # columns of names; longer ones have a line of their own
_NARROW = 60  # columns below which all of them have
_VALUES = {int: "N", float: "X"}


class Command(TyperCommand):
    """A Typer command whose help `show` prints."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        show(ctx)


def show(ctx: Any, commands: Sequence[Any] = ()) -> None:
    """Prints the help of the context's command on standard output: what it does, its options, and examples."""
    command, console = ctx.command, Console(highlight=False)
    usage = " ".join((ctx.command_path, *command.collect_usage_pieces(ctx)))
    console.print(Text.assemble(("Usage: ", "bold"), usage), soft_wrap=True)
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        console.print(Text("\n" + _wrapped(paragraph, console.width, "  ")), soft_wrap=True)
    if commands:
        _section(console, "Commands", ((item.name, (item.help or "").partition("\n\n")[0]) for item in commands))
    panels: dict[str, list[Any]] = {}
    for parameter in command.get_params(ctx):
        panel = "Arguments" if parameter.param_type_name == "argument" else parameter.rich_help_panel or "Options"
        if parameter.name == "help":  # the last one: it joins what is there
            panel = next(reversed(panels))
        panels.setdefault(panel, []).append(parameter)
    for panel, parameters in panels.items():
        _section(console, panel, ((_names(parameter), described(parameter)) for parameter in parameters))
    console.print(Text("\nExamples", style="bold"))
    for example in command.epilog.splitlines():
        console.print(Text(f"  {example}"), soft_wrap=True)  # on one line, so that it can be pasted


def _section(console: Console, name: str, rows: Iterable[tuple[str, str]]) -> None:
    console.print(Text(f"\n{name}", style="bold"))
    narrow = console.width < _NARROW
    indent = " " * (6 if narrow else _LEFT + 4)
    for names, text in rows:
        label = f"  {names}"
        body = _wrapped(text, console.width, indent)
        if narrow or len(names) > _LEFT:
            body = "\n" + body
        else:
            body = body[len(label) :]
        console.print(Text.assemble((label, "cyan"), body), soft_wrap=True)


def _wrapped(text: str, width: int, indent: str) -> str:
    # A default is kept in one piece, unless it is a long one.
    whole = re.sub(r"\[default: [^] ]*\]", lambda match: match[0].replace(" ", "\xa0"), " ".join(text.split()))
    lines = textwrap.wrap(whole, max(width, 30), initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines).replace("\xa0", " ")


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"{parameter.metavar}{'...' if parameter.nargs != 1 else ''}"
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.is_flag:
        return names
    kind = parameter.type_descriptor
    value = parameter.metavar or ("|".join(kind.choices) if kind.is_choice else _VALUES.get(kind.annotation, "TEXT"))
    return f"{names} {value}"


def described(parameter: Any) -> str:
    """What an option does, and its default, for those whose help does not tell it."""
    default = parameter.default
    if parameter.param_type_name == "argument" or default in (None, "", False):
        return str(parameter.help)
    return f"{parameter.help} [default: {f'{default:g}' if isinstance(default, float) else default}]"
