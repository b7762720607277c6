"""The help of a command, for any width of terminal; Typer's own tables cut names and values on a narrow one.

Typer keeps the classes of contexts and parameters private, so they are `Any` here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text
from typer.core import TyperCommand

_LEFT = 26  # columns of names; longer ones have a line of their own
_NARROW = 60  # columns below which all of them have
_VALUES = {int: "N", float: "X"}


class Command(TyperCommand):
    """A command that shows its help so."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        show(ctx)


def show(ctx: Any, commands: Sequence[Any] = ()) -> None:
    """Prints the help of the context's command on standard output: what it does, its options, and examples."""
    command, console = ctx.command, Console(highlight=False)
    console.print(Text.assemble(("Usage: ", "bold"), " ".join(_usage(ctx))), end="\n\n")
    console.print(Padding(Text(_paragraphs(command.help)), (0, 0, 1, 2)))
    if commands:
        _section(console, "Commands", ((item.name, item.help.partition("\n\n")[0]) for item in commands))
    panels: dict[str, list[Any]] = {}
    for option in command.get_params(ctx):
        default = "Arguments" if option.param_type_name == "argument" else "Options"
        panels.setdefault(option.rich_help_panel or default, []).append(option)
    # What is special to a command comes first, what all commands share last.
    for name in sorted(panels, key=lambda name: (name != "Arguments", name == "Options")):
        _section(console, name, ((_names(option), _described(option)) for option in panels[name]))
    console.print(Text("Examples", style="bold"))
    for example in command.epilog.splitlines():
        console.print(Text(f"  {example}"), soft_wrap=True)  # a line that can be pasted


def _usage(ctx: Any) -> list[str]:
    return [ctx.command_path, *ctx.command.collect_usage_pieces(ctx)]


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


def _section(console: Console, name: str, rows: Iterable[tuple[str, str]]) -> None:
    console.print(Text(name, style="bold"))
    narrow = console.width < _NARROW
    left = 6 if narrow else _LEFT + 4
    for names, text in rows:
        label = Text(f"  {names}", style="cyan")
        lines = list(Text(_paragraphs(text)).wrap(console, max(16, console.width - left - 1)))
        if narrow or len(names) > _LEFT:
            console.print(label, soft_wrap=True)
        else:
            label.pad_right(left - len(label))
            console.print(Text.assemble(label, lines.pop(0)), soft_wrap=True)
        for line in lines:
            console.print(Text(" " * left) + line, soft_wrap=True)
    console.print()


def _names(parameter: Any) -> str:
    kind = parameter.type_descriptor
    if parameter.param_type_name == "argument":
        return f"{parameter.metavar}{'...' if parameter.nargs != 1 else ''}"
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.is_flag:
        return names
    value = parameter.metavar or ("|".join(kind.choices) if kind.is_choice else _VALUES.get(kind.annotation, "TEXT"))
    return f"{names} {value}"


def _described(parameter: Any) -> str:
    default = parameter.default
    if parameter.param_type_name == "argument" or default in (None, "", False):
        return str(parameter.help)
    return f"{parameter.help}  [default: {default}]"
