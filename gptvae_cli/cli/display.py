"""The training display: a panel that a person likes to watch, or plain lines where nobody watches."""

from __future__ import annotations

import time
import unicodedata
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from types import TracebackType
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from gptvae_cli.cli.console import PLAIN_SECONDS, sanitize, writable

if TYPE_CHECKING:
    from gptvae_cli.evaluation import Figures
    from gptvae_cli.training import StepReport

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_ECHO = len("^C")
"""Cells that are left free at the right: a terminal writes this there, on the line below if there is no room."""
_BESIDE = len("│ from its z   │")
"""Cells of a row that are not its value's."""


class TrainingDisplay:
    """Shows reports as they come, on stderr.

    Args:
        dim_latent: width of the latent; None for a model that learns without one.
    """

    def __init__(self, console: Console, title: str, dim_latent: int | None, *, quiet: bool) -> None:
        self.console, self.title, self.dim_latent, self.quiet = console, title, dim_latent, quiet
        self.report: StepReport | None = None
        self.figures: Figures | None = None
        self.diagnosis: str | None = None
        self.example: tuple[str, str] | None = None
        self.losses: list[float] = []
        self.began: tuple[float, float] | None = None
        """Seconds and progress of the first report: what a session is as fast as."""
        self.last_line = time.monotonic()
        self.live: Live | None = None
        if console.is_interactive and not quiet:
            self.live = _Live(self._panel(), console=console, refresh_per_second=4, redirect_stdout=False)

    def __enter__(self) -> TrainingDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.update(self._panel(), refresh=True)
            self.live.stop()

    def update(self, report: StepReport) -> None:
        """Shows a report."""
        self.report = report
        self.began = self.began or (report.seconds, report.progress)
        if report.figures is not None:
            self.figures, self.diagnosis = report.figures, report.diagnosis
        self.losses.append(report.cross_entropy_per_token)
        if self.live:
            self.live.update(self._panel())
        elif not self.quiet and (report.figures is not None or time.monotonic() - self.last_line > PLAIN_SECONDS):
            self.last_line = time.monotonic()
            self.console.print(Text(_plain_line(report, self.dim_latent)), soft_wrap=True)

    def show_example(self, text: str, reconstruction: str) -> None:
        """Shows a held-out text beside what the model makes of its latent."""
        self.example = text, reconstruction
        if self.live:
            self.live.update(self._panel())

    def _panel(self) -> RenderableType:
        report = self.report
        if report is None:
            return self._framed(Text("the first step is on its way", style="dim"))
        assert self.began is not None
        seconds, progress = report.seconds - self.began[0], report.progress - self.began[1]
        left = seconds / progress * (1 - report.progress) if progress > 0.01 else None
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(justify="right", no_wrap=True)
        remaining = "" if left is None or report.done else f", {_clock(left)} left"
        head.add_row(
            ProgressBar(total=1.0, completed=report.progress),
            Text(f"{report.progress:4.0%}  {_clock(report.seconds)}{remaining}", style="bold"),
        )
        rows = list(self._rows(report))
        while True:
            body = Table.grid(padding=(0, 2))
            body.add_column(style="cyan", no_wrap=True)
            body.add_column()
            for _, label, value in rows:
                body.add_row(label, value)
            panel = self._framed(Group(head, Text(), body), border_style="blue")
            if not rows or len(self.console.render_lines(panel)) <= self.console.height:
                return panel
            least = min(weight for weight, _, _ in rows)
            rows = [row for row in rows if row[0] > least]

    def _rows(self, report: StepReport) -> Iterator[tuple[int, str, str | Text]]:
        """The weight of a row, the least of which go first where a terminal is short, its label and value."""
        yield (
            0,
            "speed",
            f"step {report.step:,}  {report.tokens_per_second:,.0f} tokens/s  {report.texts_per_second:,.0f} texts/s"
            f"  lr {report.learning_rate:.1e}",
        )
        yield (
            4,
            "training",
            f"cross-entropy {report.cross_entropy_per_token:.3f} nats/token  KL {report.kl:.1f} nats/text"
            f"  beta {report.beta:.2f}",
        )
        blocks = _ASCII_BLOCKS if self.console.options.ascii_only else _BLOCKS
        room = max(1, min(60, self._width() - _BESIDE))
        yield 1, "", Text(sparkline(self.losses, room, blocks), style="green")
        if self.figures is not None:
            yield from _figures(self.figures, self.dim_latent, is_used=self.diagnosis is None)
        if self.example is not None:
            for label, text in zip(("text", "from its z"), self.example, strict=True):
                yield 3, label, self._one_line(text)

    def _width(self) -> int:
        return self.console.width - _ECHO

    def _framed(self, content: RenderableType, border_style: str = "none") -> _Frame:
        # A Text, because a string is parsed for markup, and a folder may be called "[/b]".
        title, width = self._one_line(self.title), self._width()
        return _Frame(Panel(content, title=title, title_align="left", border_style=border_style, width=width))

    def _one_line(self, text: str) -> Text:
        """As much of a text as fits beside its label on every terminal."""
        room, encoding = self._width() - _BESIDE, self.console.encoding
        line = writable(sanitize(text).replace("\n", " ").replace("\t", " "), encoding)
        ends = list(accumulate(map(_cells, line)))
        if ends and ends[-1] > room:
            dots = "…" if encoding.startswith("utf") else "..."
            line = line[: bisect(ends, room - len(dots))] + dots
        return Text(line, no_wrap=True, overflow="crop")


class _Live(Live):
    """A live display that finds its last frame again where the terminal has become narrower since, and has broken each
    of its lines into several."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        with self._lock:
            shape, width = self._live_render._shape, self.console.width
            if shape is not None and shape[0] > width:
                self._live_render._shape = width, shape[1] * -(-shape[0] // width)
            return super().process_renderables(renderables)


class _Frame:
    """A panel whose right edge is in its column on every terminal. One that gives a text more cells than Rich counts
    would break a line in two, and leave a copy of it behind at every refresh."""

    def __init__(self, panel: Panel) -> None:
        self.panel = panel

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in console.render_lines(self.panel, options, pad=False):
            wider = sum(sum(map(_cells, segment.text)) - cell_len(segment.text) for segment in line)
            if wider > 0:
                *line, edge = line
                column = Segment.get_line_length(line)
                kept = Segment.adjust_line_length(line, column - wider)
                line = [*kept, Control.move_to_column(column).segment, edge]
            yield from [*line, Segment.line()]


def _cells(char: str) -> int:
    """The most cells that a character takes on some terminal: Rich counts none for marks that take room in some
    scripts, skins, or what makes an emoji of a character."""
    is_mark, is_skin = unicodedata.category(char) == "Mc", "\U0001f3fb" <= char <= "\U0001f3ff"
    return max(cell_len(char), is_mark, 2 * is_skin, char == "\ufe0f")


def _figures(figures: Figures, dim_latent: int | None, *, is_used: bool) -> Iterator[tuple[int, str, str | Text]]:
    if dim_latent is None:
        yield 6, "held out", f"{figures.cross_entropy_without:.2f} nats/text, without a latent"
        return
    ceiling = min(figures.kl, figures.entropy)
    told, style = ("used", "green") if figures.mutual_information > 3 else ("carries little", "yellow")
    if not is_used:
        told, style = "not used", "red"
    carried = Text.assemble(
        (f"{told}: {figures.mutual_information:.2f} nats of information", f"bold {style}"),
        f" (at most {ceiling:.1f} shows)",
    )
    yield (
        6,
        "held out",
        f"{figures.nll_bound:.2f} nats/text = cross-entropy {figures.cross_entropy:.2f} + KL {figures.kl:.2f}",
    )
    yield 7, "latent", carried
    yield 2, "", f"{figures.active_001} of {dim_latent} dimensions active, {figures.active_02} strongly"
    yield (
        5,
        "use of z",
        f"right z {figures.cross_entropy:.1f}  another text's z {figures.cross_entropy_shuffled:.1f}"
        f"  no z {figures.cross_entropy_without:.1f} nats/text",
    )


def _plain_line(report: StepReport, dim_latent: int | None) -> str:
    line = (
        f"{report.progress:4.0%} {_clock(report.seconds)} step {report.step:,}"
        f" {report.tokens_per_second:,.0f} tokens/s cross-entropy {report.cross_entropy_per_token:.3f} nats/token"
        f" KL {report.kl:.1f} nats/text"
    )
    figures = report.figures
    if figures is not None and dim_latent is None:
        line += f" | held out: {figures.cross_entropy_without:.2f} nats/text, without a latent"
    elif figures is not None:
        line += (
            f" | held out: {figures.nll_bound:.2f} nats/text (cross-entropy {figures.cross_entropy:.2f}"
            f" + KL {figures.kl:.2f}; with another text's z {figures.cross_entropy_shuffled:.2f}),"
            f" information {figures.mutual_information:.2f} nats,"
            f" active {figures.active_001}/{dim_latent}"
        )
    return line


def sparkline(values: Sequence[float], width: int, blocks: str = _BLOCKS) -> str:
    """The course of a series in one line of characters, newest at the right."""
    if len(values) < 2:
        return ""
    ends = [i * len(values) // width for i in range(width + 1)] if len(values) > width else range(len(values) + 1)
    means = [sum(values[i:j]) / (j - i) for i, j in pairwise(ends)]
    low, high = min(means), max(means)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0
    return "".join(blocks[round((value - low) * scale)] for value in means)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
