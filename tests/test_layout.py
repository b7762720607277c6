"""The order of the modules, read from their imports: lower rows never import higher ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import gptvae_cli

PACKAGE = Path(gptvae_cli.__file__).parent

ROWS: list[set[str]] = [
    {
        *("config", "options", "schedule", "sources", "text", "tokenizer", "header", "errors", "noise"),
        *("arrivals", "files", "bleu", "bootstrap", "probe", "machine", "constraint"),
    },
    {"latent", "attention", "products", "snapshot", "tokens", "device"},
    {"fused"},
    {"ingest"},
    {"corpus"},
    {"conditioning"},
    {"engines"},
    {"healing"},
    {"decoding"},
    {"continuation"},
    {"model"},
    {"objective"},
    {"checkpoint", "data", "latent_file"},
    {"evaluation", "refinement"},
    {"doctor", "learner"},
    {"training", "sampling", "log", "hub", "folder"},
    {"sizing"},
    {"run"},
    {"api"},
    {"measuring", "baseline"},
    {"report"},
    {"cli.console", "cli.flags"},
    {"cli.streams", "cli.display", "cli.table", "cli.help"},
    {"cli commands"},
    {"cli.app"},
]
"""From the bottom to the top. Those of a row may know each other's names, but nothing may go in circles."""

LIGHT = (
    *("config", "options", "schedule", "sources", "text", "tokenizer", "header", "errors", "files"),
    *("machine", "arrivals"),
)
HEAVY = {"torch", "numpy", "x_transformers", "einops", "safetensors", "tokenizers", "pyarrow", "zstandard"}


class Import(NamedTuple):
    """`module` is `gptvae_cli.model` or `torch.nn`; `at_start` when importing the importer runs it."""

    module: str
    at_start: bool


def modules() -> list[str]:
    """Every module of the package by its dotted name inside it, but for those that only mark or start a package."""
    names = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(".".join(name.parts) for name in names if name.name not in ("__init__", "__main__"))


@cache
def imports(module: str) -> tuple[Import, ...]:
    """What a module imports at run time: all but what stands under `if TYPE_CHECKING`."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    return tuple(found(tree, at_start=True))


def found(node: ast.AST, *, at_start: bool) -> Iterator[Import]:
    match node:
        case ast.Import():
            yield from (Import(alias.name, at_start) for alias in node.names)
        case ast.ImportFrom():
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            # `from gptvae_cli import noise` names a module, `from gptvae_cli.noise import stream` what is in one.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(inner if is_module(inner) else str(node.module), at_start)
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            for statement in node.orelse:
                yield from found(statement, at_start=at_start)
        case _:
            inside = not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from found(child, at_start=at_start and inside)


def is_module(dotted: str) -> bool:
    top, _, inner = dotted.partition(".")
    return top == "gptvae_cli" and inner in modules()


def our_imports(module: str) -> set[str]:
    return {name.removeprefix("gptvae_cli.") for name, _ in imports(module) if is_module(name)}


def libraries(module: str, *, at_start_only: bool = False) -> set[str]:
    return {name.partition(".")[0] for name, at_start in imports(module) if at_start or not at_start_only}


def row_of(module: str) -> int:
    if module.startswith("cli.") and not any(module in row for row in ROWS):
        module = "cli commands"
    return next((number for number, row in enumerate(ROWS) if module in row), -1)


@pytest.fixture(params=modules())
def module(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_every_module_has_a_row(module: str) -> None:
    """A module that is in none is held by nothing here. `utils` will never have one."""
    assert row_of(module) >= 0, f"{module} is new: say in ROWS where it stands"
    assert "util" not in module


def test_lower_rows_never_import_higher_ones(module: str) -> None:
    higher = {other for other in our_imports(module) if row_of(other) > row_of(module)}
    assert not higher, f"{module} imports {sorted(higher)}, which stand above it"


def test_nothing_is_imported_in_circles(module: str) -> None:
    seen: set[str] = set()
    waiting = our_imports(module)
    while waiting:
        other = waiting.pop()
        assert other != module, f"{module} comes back to itself"
        if other not in seen:
            seen.add(other)
            waiting |= our_imports(other)


def test_only_the_command_line_knows_the_terminal(module: str) -> None:
    """And it takes Click's names from Typer, which brings its own copy."""
    assert "click" not in libraries(module)
    if not module.startswith("cli."):
        assert not libraries(module) & {"typer", "rich"}


def test_only_the_model_knows_x_transformers(module: str) -> None:
    if module != "model":
        assert "x_transformers" not in libraries(module)


@pytest.mark.parametrize("module", ["__init__", "cli.__init__"])
def test_importing_the_package_imports_nothing_else(module: str) -> None:
    assert {name for name, at_start in imports(module) if at_start} <= {"__future__", "typing"}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_start(module: str) -> None:
    assert not libraries(module, at_start_only=True) & HEAVY
    assert not libraries(module) & {"torch", "x_transformers"}


@pytest.mark.parametrize("module", ["noise", "latent_file"])
def test_noise_and_latent_files_need_numpy_alone(module: str) -> None:
    """`gptvae generate` checks a latent file before it pays for torch."""
    assert libraries(module) & HEAVY == {"numpy"}
    assert not our_imports(module) - {"errors", "config", "sources"}


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("cli.")])
def test_commands_import_nothing_heavy_before_they_run(module: str) -> None:
    """`--help` and usage errors load all of `cli`; torch alone would cost them seconds."""
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        other = waiting.pop()
        seen.add(other)
        heavy = libraries(other, at_start_only=True) & HEAVY
        assert not heavy, f"{module} loads {other}, which loads {sorted(heavy)}"
        at_start = {name.removeprefix("gptvae_cli.") for name, now in imports(other) if now and is_module(name)}
        waiting |= at_start - seen


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", {("torch.nn", True)}),
        ("from gptvae_cli import noise, __version__", {("gptvae_cli.noise", True), ("gptvae_cli", True)}),
        ("from gptvae_cli.noise import stream", {("gptvae_cli.noise", True)}),
        ("def f():\n    import rich", {("rich", False)}),
        ("class A:\n    import rich\n    def f(self):\n        import torch", {("rich", True), ("torch", False)}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy", {("numpy", True)}),
        ("try:\n    import torch\nexcept ImportError:\n    pass", {("torch", True)}),
        ("if x:\n    import torch", {("torch", True)}),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, expected: set[tuple[str, bool]]) -> None:
    """The reader of imports itself: a rule that sees nothing holds nothing."""
    assert {tuple(item) for item in found(ast.parse(source), at_start=True)} == expected
