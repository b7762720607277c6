"""The training display, on a terminal that is a string."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from gptvae_cli.cli.display import TrainingDisplay, sparkline
from gptvae_cli.evaluation import Figures
from gptvae_cli.training import StepReport

FIGURES = Figures(
    texts=1000,
    tokens=12_000,
    cross_entropy=31.4,
    cross_entropy_shuffled=48.1,
    cross_entropy_without=39.4,
    kl=15.25,
    mutual_information=6.81,
    active_001=29,
    active_02=17,
    entropy=math.log(1000),
)
REPORT = StepReport(
    step=1234,
    progress=0.25,
    seconds=150.0,
    tokens_per_second=35_678.4,
    texts_per_second=2_950.2,
    learning_rate=1.5e-3,
    beta=0.83,
    cross_entropy_per_token=2.718,
    kl=14.9,
    bag_of_words_per_token=3.1,
    gradient_norm=0.7,
)
HOSTILE = "[red]a[/b] \x1b]0;owned\x07 \x1b[2J \x9b31m b\u202ec\x7f \x00 d\re\nf"

RICH_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\]8;[^\x1b]*\x1b\\")
"""What rich itself sends: colours and movements of the cursor."""


def terminal(width: int = 110, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor")


def pipe() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def last_screen(text: str) -> str:
    """The last panel that was drawn, without rich's own sequences."""
    return RICH_SEQUENCE.sub("", text).rpartition("╭")[2]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "मां बाप का नाम, " * 8,
            "দুইটা সময়ে আসেন " * 8,
            "വണക്കം മലയാളം " * 8,
            "ok 👍🏽👍🏽👍🏽",
            "日本語 " * 30,
            "plain " * 30,
        ),
        *("ि" * 100, "👍🏽" * 30, "👨‍👩‍👧 " * 30, "tab\t" * 30),
    ],
    ids=["Hindi", "Bengali", "Malayalam", "skins", "Japanese", "English", "marks", "many skins", "joined", "tabs"],
)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_takes_it_for(text: str, width: int) -> None:
    """Terminals give room to marks that rich takes for none; a line that breaks is left behind at every refresh. The
    panel is as wide as for any other text, and its edge is where it belongs."""
    console = terminal(width)
    with TrainingDisplay(console, f"gptvae train {text}", 32, quiet=False) as display:
        display.update(replace(REPORT, figures=FIGURES))
        display.show_example(text, text)
    lines = f"╭{last_screen(written(console))}".splitlines()
    assert len(lines) > 8
    assert len(lines[-1]) == width - len("^C")
    for line in lines:
        marks = sum(unicodedata.category(char) == "Mc" for char in line)
        skins = sum("\U0001f3fb" <= char <= "\U0001f3ff" for char in line)
        joined = sum(map(cell_len, line))
        assert max(cell_len(line), joined) + marks + 2 * skins <= width - len("^C"), line
    edge = rf"\x1b\[({width - len('^C')}|{width - len('─^C')})G"  # of a row, and of the title
    assert all(re.search(edge, line) for line in written(console).splitlines() if "ि" in line)


def test_a_terminal_has_room_for_the_echo_of_ctrl_c() -> None:
    """Without it goes to the next line, and the panel that is then drawn leaves the last one's top behind."""
    for reports in ([], [REPORT]):
        console = terminal(80)
        with TrainingDisplay(console, "gptvae train", 32, quiet=False) as display:
            for report in reports:
                display.update(report)
        assert max(map(cell_len, last_screen(written(console)).splitlines()[1:])) == 80 - len("^C")


def test_a_terminal_sees_everything_in_named_units() -> None:
    console = terminal()
    with TrainingDisplay(console, "gptvae train, names-run", 32, quiet=False) as display:
        display.update(replace(REPORT, cross_entropy_per_token=4.0, progress=0.0, seconds=10.0))
        display.update(replace(REPORT, figures=FIGURES))
        display.show_example("a plain text", "a plain test")
        display.update(REPORT)
    screen = last_screen(written(console))
    for part in (
        "gptvae train, names-run",
        "25%",
        "2:30",
        "7:00 left",
        "35,678 tokens/s",
        "2,950 texts/s",
        "step 1,234",
        "lr 1.5e-03",
        "cross-entropy 2.718 nats/token",
        "KL 14.9 nats/text",
        "beta 0.83",
        "46.65 nats/text = cross-entropy 31.40 + KL 15.25",
        "6.81 nats of information",
        "at most 6.9 shows",
        "29 of 32 dimensions active, 17 strongly",
        "right z 31.4",
        "another text's z 48.1",
        "no z 39.4 nats/text",
        "a plain text",
        "a plain test",
    ):
        assert part in screen, part
    assert "█" in screen
    assert "▁" in screen


def test_a_row_is_a_line_at_80_columns_however_large_its_numbers() -> None:
    """Or the panel grows and shrinks by it."""
    grown = replace(
        REPORT, step=999_999, tokens_per_second=1.2e6, texts_per_second=123_456, cross_entropy_per_token=10.5, kl=123
    )
    figures = replace(
        FIGURES,
        cross_entropy=456.78,
        cross_entropy_shuffled=481.0,
        cross_entropy_without=479.0,
        kl=123.4,
        entropy=123.4,
        mutual_information=12.3,
    )
    heights = set()
    for report in (REPORT, grown):
        console = terminal(80)
        with TrainingDisplay(console, "run", 512, quiet=False) as display:
            display.update(replace(report, figures=figures, cross_entropy_per_token=5.0, diagnosis="it is not used"))
            display.update(report)
        heights.add(last_screen(written(console)).count("\n"))
    assert heights == {11}


@pytest.mark.parametrize("width", [50, 80])
@pytest.mark.parametrize("height", [7, 10, 12, 13, 40])
def test_a_short_terminal_keeps_the_rows_that_matter(width: int, height: int) -> None:
    """It kept those at the top, of which speed is one."""
    console = terminal(width, height)
    with TrainingDisplay(console, "run", 32, quiet=False) as display:
        display.update(replace(REPORT, figures=FIGURES))
        display.update(REPORT)
        display.show_example("a plain text", "a plain test")
    shown = f"╭{last_screen(written(console))}".splitlines()
    assert len(shown) <= height
    labels = re.findall(r"^│ (\w+(?: \w+)*) {2}", "\n".join(shown), re.MULTILINE)
    if width == 80:
        expected = ["speed", "training", "held out", "latent", "use of z", "text", "from its z"]
        dropped = {7: ["speed", "training", "text", "from its z"], 10: ["speed"], 12: ["speed"]}.get(height, [])
        assert labels == [label for label in expected if label not in dropped]
    assert "latent" in labels


def test_a_sparkline_shows_its_newest_values_on_a_narrow_terminal() -> None:
    console = terminal(40)
    with TrainingDisplay(console, "run", 32, quiet=False) as display:
        for loss in range(61, 1, -1):
            display.update(replace(REPORT, cross_entropy_per_token=float(loss)))
    assert re.search(r"│ +█+[▇▆▅▄▃▂]+▁+ *│", last_screen(written(console)))


def test_a_terminal_that_becomes_narrower_is_left_no_torn_panel() -> None:
    """It breaks the lines of the last frame in two: the next one has to begin as much higher."""
    console = terminal(100)
    with TrainingDisplay(console, "run", 32, quiet=False) as display:
        display.update(REPORT)
        assert display.live is not None
        display.live.refresh()
        height = last_screen(written(console)).count("\n") + 1
        before = len(written(console))
        console.width = 60
        display.live.refresh()
        assert written(console)[before:].count("\x1b[1A") == 2 * height - 1


def test_the_figures_of_the_last_validation_stay_on_the_screen() -> None:
    console = terminal()
    with TrainingDisplay(console, "run", 32, quiet=False) as display:
        display.update(replace(REPORT, figures=FIGURES))
        display.update(replace(REPORT, step=1300))
    assert "step 1,300" in last_screen(written(console))
    assert "6.81 nats" in last_screen(written(console))


def test_a_terminal_without_a_report_yet_says_so() -> None:
    console = terminal()
    with TrainingDisplay(console, "run", 32, quiet=False):
        pass
    assert "first step" in last_screen(written(console))


def test_texts_reach_the_terminal_without_control_characters() -> None:
    """Neither rich's markup nor what a terminal would obey: a corpus is other people's text."""
    console = terminal(width=200)
    with TrainingDisplay(console, f"run {HOSTILE}", 32, quiet=False) as display:
        display.update(REPORT)
        display.show_example(HOSTILE, HOSTILE[::-1])
    output = written(console)
    for sequence in ("\x1b]0;", "\x1b[2J"):
        assert sequence not in output
    rest = RICH_SEQUENCE.sub("", output)
    assert set(re.findall(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", rest)) <= {"\n", "\r"}
    screen = last_screen(output)
    assert "\r" not in screen, "between frames rich returns to the start of the line, within one the text would"
    assert screen.count("[red]a[/b]") == 2, "in the title and in the text, as it stands"


def test_long_texts_take_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def height(text: str) -> int:
        console = terminal(width=80)
        with TrainingDisplay(console, "run", 32, quiet=False) as display:
            display.update(REPORT)
            display.show_example(text, text)
        return last_screen(written(console)).count("\n")

    assert height("word " * 500) == height("word") == height("a\nb\nc")


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "café 中" * 20, "caf\\xe9 \\u4e2d" * 3),
        ("latin-1", "café 中" * 20, "café \\u4e2d" * 5),
        ("utf-8", "café 中", "café 中 "),
    ],
    ids=["ASCII", "Latin-1", "UTF-8"],
)
def test_a_terminal_that_is_not_utf8_gets_what_it_can_show(encoding: str, text: str, shown: str) -> None:
    """Measured as the stream spells it: a line that is longer breaks, and is left behind at every refresh."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding, errors="backslashreplace", write_through=True)
    console = Console(file=screen, force_terminal=True, width=80, height=40, color_system=None)
    with TrainingDisplay(console, f"run {text}", 32, quiet=False) as display:
        for loss in (9.0, 8, 7, 6, 5, 4, 3, 2):
            display.update(replace(REPORT, cross_entropy_per_token=loss, figures=FIGURES))
        display.show_example(text, text)
    assert isinstance(screen.buffer, io.BytesIO)
    lines = RICH_SEQUENCE.sub("", screen.buffer.getvalue().decode(encoding)).splitlines()
    assert {cell_len(line) for line in lines if line} == {78}
    assert any(("█▇▆▅▄▃▂▁" if encoding == "utf-8" else "@#*+=-:.") in line for line in lines)
    for label in ("run", "text       ", "from its z "):
        assert any(f" {label} {shown}" in line for line in lines)


def test_a_pipe_gets_a_plain_line_for_each_validation() -> None:
    """And none for the reports between, which come twice a second."""
    console = pipe()
    with TrainingDisplay(console, "run [/b]", 32, quiet=False) as display:
        for _ in range(5):
            display.update(REPORT)
        display.update(replace(REPORT, figures=FIGURES, progress=0.5))
        display.show_example("text", "reconstruction")
        display.update(REPORT)
    assert written(console).splitlines() == [
        " 50% 2:30 step 1,234 35,678 tokens/s cross-entropy 2.718 nats/token KL 14.9 nats/text"
        " | held out: 46.65 nats/text (cross-entropy 31.40 + KL 15.25; with another text's z 48.10),"
        " information 6.81 nats, active 29/32"
    ]


def test_a_pipe_gets_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    console = pipe()
    now = [0.0]
    monkeypatch.setattr("gptvae_cli.cli.display.time.monotonic", lambda: now[0])
    with TrainingDisplay(console, "run", 32, quiet=False) as display:
        for second in range(100):
            now[0] = float(second)
            display.update(replace(REPORT, step=second))
    assert [line.split()[3] for line in written(console).splitlines()] == ["31", "62", "93"]


@pytest.mark.parametrize("make", [terminal, pipe])
def test_quiet_prints_nothing(make: type[Console]) -> None:
    console = make()
    with TrainingDisplay(console, "run", 32, quiet=True) as display:
        display.update(replace(REPORT, figures=FIGURES))
        display.show_example("text", "reconstruction")
    assert written(console) == ""


def test_the_screen_is_given_back_when_training_fails() -> None:
    console = terminal()
    with pytest.raises(KeyError), TrainingDisplay(console, "run", 32, quiet=False) as display:
        display.update(REPORT)
        raise KeyError
    assert written(console).rpartition("\x1b[?25")[2].startswith("h"), "the cursor is shown again"


@pytest.mark.parametrize(
    ("information", "diagnosis", "colour", "word"),
    [
        (0.5, "it is not used", "1;31", "not used"),
        (5.0, "it is not used", "1;31", "not used"),
        (0.7, None, "1;33", "carries little"),
        (3.01, None, "1;32", "used"),
    ],
    ids=["red", "red, though it carries much", "yellow", "green"],
)
def test_a_latent_that_is_not_used_is_red_and_called_so(
    information: float, diagnosis: str | None, colour: str, word: str
) -> None:
    """As the run says: of a target rate of 1, 0.7 nats are enough. A word says it to those who see no colours."""
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system="standard")
    with TrainingDisplay(console, "run", 32, quiet=False) as display:
        found = replace(FIGURES, mutual_information=information)
        display.update(replace(REPORT, figures=found, diagnosis=diagnosis))
        display.update(REPORT)  # no look of its own
    said = f"{word}: {information:.2f} nats of information"
    assert f"\x1b[{colour}m{said}\x1b[0m (at most 6.9 shows)" in written(console)


@pytest.mark.parametrize(
    ("seconds", "clock"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01")]
)
def test_times_read_as_a_clock(seconds: float, clock: str) -> None:
    console = pipe()
    with TrainingDisplay(console, "run", 32, quiet=False) as display:
        display.update(replace(REPORT, seconds=seconds, figures=FIGURES))
    assert written(console).split()[1] == clock


# Sparkline ------------------------------------------------------------------------------------------------------------


def test_a_sparkline_spans_the_blocks_from_lowest_to_highest() -> None:
    assert sparkline([0.0, 1, 2, 3, 4, 5, 6, 7], 60) == "▁▂▃▄▅▆▇█"
    assert sparkline([7.0, 0, 7], 60) == "█▁█"


def test_a_sparkline_of_too_little_or_nothing_new_is_flat() -> None:
    assert sparkline([], 60) == ""
    assert sparkline([1.0], 60) == ""
    assert sparkline([2.0, 2.0, 2.0], 60) == "▁▁▁"


@pytest.mark.parametrize("count", [2, 59, 60, 61, 119, 121, 400])
def test_a_sparkline_fits_its_width_and_keeps_the_ends(count: int) -> None:
    """Of a falling curve the first block is the highest and the last one the lowest, however long it is."""
    line = sparkline(range(count, 0, -1), 60)
    assert len(line) == min(count, 60)
    assert (line[0], line[-1]) == ("█", "▁")
    assert list(line) == sorted(line, reverse=True)
