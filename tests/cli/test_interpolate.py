"""`gptvae interpolate`, through Typer's runner where that is enough and in real processes where it is not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from typer.testing import CliRunner, Result

from gptvae_cli.cli.app import app
from tests.cli.conftest import WIDTH, array
from tests.cli.test_train import assert_fails

pytestmark = pytest.mark.usefixtures("one_thread")

Interpolate = Callable[..., Result]
Floats = npt.NDArray[np.float32]
A, B, C = 3 * np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Interpolate:
    """Runs a command in this process, in a folder with three latents and two texts, alone and together."""
    monkeypatch.chdir(tmp_path)
    for name, values in {"a": A, "b": B, "c": C[None], "abc": np.stack([A, B, C])}.items():
        np.save(f"{name}.npy", values)
    Path("a.txt").write_text("the quick fox\n")
    Path("b.txt").write_text("never\n")
    Path("ab.txt").write_text("the quick fox\nnever\n")

    def invoke(
        *options: object, stdin: bytes | None = None, model: str = "line", command: str = "interpolate"
    ) -> Result:
        arguments = [command, "--model", str(models / f"{model}.safetensors"), *map(str, options)]
        return CliRunner().invoke(app, arguments, input=stdin)

    return invoke


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.stderr
    text = result.stdout_bytes.decode("utf-8")
    assert text.endswith("\n")
    return text.split("\n")[:-1]


def angle(a: Floats, b: Floats) -> float:
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    return math.acos(a64 @ b64 / np.linalg.norm(a64) / np.linalg.norm(b64))


# Points ---------------------------------------------------------------------------------------------------------------


def test_interpolation_endpoints_equal_inputs(run: Interpolate) -> None:
    """The ends are what `generate` makes of the same latents."""
    result = run("a.npy", "b.npy")
    found = lines(result)
    assert len(found) == 7
    assert [found[0], found[-1]] == [
        lines(run("--latent", name, "--greedy", command="generate"))[0] for name in ("a.npy", "b.npy")
    ]
    assert found[0] != found[-1]
    assert result.stderr == "", "nothing is random"


def test_a_point_is_a_text_or_a_latent_in_a_file(run: Interpolate) -> None:
    """Known by what it begins with, whatever its name."""
    np.save("latent.txt.npy", A)
    Path("latent.txt.npy").rename("latent.txt")
    found = lines(run("a.txt", "latent.txt", "c.npy", "--steps", "2"))
    expected = [
        lines(run("--ref", "a.txt", "--greedy", command="generate"))[0],
        *(lines(run("--latent", name, "--greedy", command="generate"))[0] for name in ("a.npy", "c.npy")),
    ]
    assert found == expected


def test_points_that_are_texts_may_be_refined(run: Interpolate) -> None:
    """Latents stay as they are."""
    assert run("ab.txt", "--refine", "--out", "z.npy", command="encode").exit_code == 0
    expected = lines(run("--latent", "z.npy"))
    assert lines(run("a.txt", "b.txt", "--refine")) == expected
    assert (
        lines(run("--from", "the quick fox", "--to", "never", "--refine")) == expected != lines(run("a.txt", "b.txt"))
    )
    np.save("first.npy", np.load("z.npy")[0])
    assert lines(run("first.npy", "b.txt", "--refine")) == expected
    assert_fails(run("a.npy", "b.npy", "--refine"), 2, "--refine fits latents to texts, and there are none")


def test_texts_themselves_are_points(run: Interpolate) -> None:
    expected = lines(run("a.txt", "b.txt"))
    assert lines(run("--from", "the quick fox", "--to", "never")) == expected
    assert lines(run("--from", "", "--to", "never"))[-1] == expected[-1], "an empty text is a text"


@pytest.mark.parametrize("data", [array(A), b"the quick fox\n"], ids=["latent", "text"])
def test_a_point_may_come_from_a_pipe(run: Interpolate, data: bytes) -> None:
    Path("point").write_bytes(data)
    assert lines(run("-", "b.txt", stdin=data)) == lines(run("point", "b.txt"))


def test_points_of_process_substitution_are_read_once(run: Interpolate, models: Path) -> None:
    """A pipe with a name, of which nothing can be looked at and put back."""
    script = f'"{sys.executable}" -m gptvae_cli interpolate <(cat a.npy) <(cat b.txt) --steps 3 --model "$0"'
    process = subprocess.run(
        ["bash", "-c", script, models / "line.safetensors"], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.split("\n")[:-1] == lines(run("a.npy", "b.txt", "--steps", "3"))


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_a_path_leads_through_the_rows_of_latents(run: Interpolate, source: str) -> None:
    expected = lines(run("a.npy", "b.npy", "c.npy", "--steps", "4"))
    assert len(expected) == 2 * 3 + 1, "each point once"
    if source == "file":
        found = run("--latent", "abc.npy", "--steps", "4")
    else:
        found = run("--latent", "-", "--steps", "4", stdin=Path("abc.npy").read_bytes())
    assert lines(found) == expected


def test_a_point_of_a_running_text_is_one_window(run: Interpolate) -> None:
    short = run("--from", "x" * 23, "--to", "two", "--steps", "2", "--format", "jsonl", model="window")
    assert len(lines(short)) == 2
    long = run("--from", "x" * 60, "--to", "two", model="window")
    assert_fails(long, 3, "one window of 24 tokens", "has 3")
    Path("long.txt").write_text("x" * 100_000)
    assert_fails(run("long.txt", "b.txt", model="window"), 3, "one window of 24 tokens", "has 4348")


def test_a_field_is_of_points_in_records(run: Interpolate) -> None:
    Path("a.jsonl").write_text('{"review": "one"}\n')
    assert run("a.jsonl", "b.txt", "--field", "review", "--steps", "2").exit_code == 0
    assert_fails(run("b.txt", "b.txt", "--field", "review"), 2, "--field review", "b.txt is plain text", "JSON lines")
    piped = run("-", "b.txt", "--field", "review", "--steps", "2", stdin=b'{"review": "one"}\n')
    assert piped.stdout == run("a.jsonl", "b.txt", "--field", "review", "--steps", "2").stdout
    assert_fails(run("--from", "a", "--to", "b", "--field", "review"), 2, "--field is of texts in files")


def test_a_point_is_read_as_the_unit_that_was_asked_for(run: Interpolate) -> None:
    Path("two.txt").write_text("one\ntwo\n")
    assert_fails(run("two.txt", "b.txt"), 3, "two.txt", "more than one text", "--from")
    Path("stanzas.txt").write_text("one\n\ntwo\n")
    assert_fails(run("stanzas.txt", "b.txt", model="paragraph"), 3, "more than one text", "--unit file")
    options = ("two.txt", "b.txt", "--steps", "2", "--format", "jsonl")
    as_file = lines(run(*options, "--unit", "file"))
    assert len(as_file) == 2
    assert as_file == lines(run("--from", "one\ntwo", "--to", "never", *options[2:], model="paragraph"))


def test_a_record_is_a_point(run: Interpolate) -> None:
    Path("a.jsonl").write_text('{"text": "the quick fox"}\n')
    assert lines(run("a.jsonl", "b.txt")) == lines(run("a.txt", "b.txt"))
    Path("a.jsonl").write_text('{"content": "the quick fox"}\n')
    assert_fails(run("a.jsonl", "b.txt"), 3, "no field 'text'", "--field")
    assert lines(run("a.jsonl", "b.txt", "--field", "content")) == lines(run("a.txt", "b.txt"))


def test_a_text_that_is_cut_is_told_unless_quiet(run: Interpolate) -> None:
    options = ("--from", "x" * 60, "--to", "a", "--steps", "2")
    assert run(*options).stderr == "1 text is longer than the model's 24 tokens; the beginning was used\n"
    assert run(*options, "-q").stderr == ""


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("ab.txt", ["ab.txt holds more than one text", "--from and --to"]),
        ("abc.npy", ["abc.npy holds more than one latent", "--latent abc.npy"]),
        ("none.npy", ["none.npy holds no latent"]),
        ("empty.txt", ["empty.txt holds no text"]),
        ("nowhere.txt", ["cannot read nowhere.txt", "check the path", "--from TEXT --to TEXT"]),
        (".", ["cannot read ."]),
        ("wide.npy", ["wide.npy", "(9,)", "8 dimensions"]),
        ("nan.npy", ["nan.npy", "not a finite number"]),
        ("latin1.txt", ["latin1.txt, line 1", "0xe9", "iconv"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_point_that_is_not_exactly_one_is_bad_input(run: Interpolate, point: str, words: list[str]) -> None:
    np.save("none.npy", np.zeros((0, WIDTH), np.float32))
    np.save("wide.npy", np.zeros(WIDTH + 1, np.float32))
    np.save("nan.npy", np.full(WIDTH, np.nan, np.float32))
    Path("empty.txt").write_bytes(b"")
    Path("latin1.txt").write_bytes(b"caf\xe9\n")
    assert_fails(run("a.txt", point), 3, *words, hint=False)


def test_one_latent_is_no_path(run: Interpolate) -> None:
    assert_fails(run("--latent", "c.npy"), 3, "c.npy holds 1 latents, a path needs two", hint=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["two points", "found nothing"]),
        (["a.txt"], ["two points", "only a.txt"]),
        (["--from", "a"], ["--from is given alone"]),
        (["--to", "a"], ["--to is given alone"]),
        (["a.txt", "b.txt", "--latent", "abc.npy"], ["one of the three"]),
        (["a.txt", "--from", "a", "--to", "b"], ["one of the three"]),
        (["a.txt", "b.txt", "--steps", "1"], ["--steps"]),
        (["a.txt", "b.txt", "--path", "around"], ["--path", "around", "slerp"]),
        (["a.txt", "b.txt", "--latents-out", "-"], ["--latents-out", "--latents-out FILE"]),
        (["a.txt", "b.txt", "-0", "--format", "jsonl"], ["-0 and --format jsonl"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_a_wrong_option_is_wrong_usage(run: Interpolate, options: list[str], words: list[str]) -> None:
    assert_fails(run(*options), 2, *words, hint=False)


# Paths ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_latents_of_the_path_are_those_of_its_texts(run: Interpolate, steps: int) -> None:
    found = lines(run("a.npy", "b.npy", "--steps", steps, "--latents-out", "path.npy"))
    latents = np.load("path.npy")
    assert (latents.shape, latents.dtype) == ((steps, WIDTH), np.float32)
    assert_array_equal(latents[[0, -1]], np.stack([A, B]))
    assert lines(run("--latent", "path.npy", "--greedy", command="generate")) == found


def test_an_arc_turns_and_stretches_evenly_where_a_line_is_straight(run: Interpolate) -> None:
    def path(*options: str) -> Floats:
        assert run("a.npy", "b.npy", "--steps", "5", "--latents-out", "path.npy", *options).exit_code == 0
        return np.asarray(np.load("path.npy"), np.float32)

    straight, arc = path("--path", "lerp"), path("--path", "slerp")
    for i in range(5):
        w = i / 4
        assert_allclose(straight[i], (1 - w) * A + w * B, atol=1e-5)
        turned = math.sin((1 - w) * angle(A, B)) * A / np.linalg.norm(A)
        turned = turned + math.sin(w * angle(A, B)) * B / np.linalg.norm(B)
        norm = (1 - w) * np.linalg.norm(A) + w * np.linalg.norm(B)
        assert_allclose(arc[i], norm * turned / math.sin(angle(A, B)), atol=1e-5)
    assert_array_equal(arc, path())
    assert np.linalg.norm(straight[2]) < np.linalg.norm(arc[2]) - 0.1


def test_opposite_points_are_joined_by_a_line(run: Interpolate) -> None:
    np.save("opposite.npy", -A)
    assert run("a.npy", "opposite.npy", "--steps", "3", "--latents-out", "path.npy").exit_code == 0
    assert_allclose(np.load("path.npy"), np.stack([A, 0 * A, -A]), atol=1e-5)


def test_what_is_read_is_not_replaced(run: Interpolate, models: Path) -> None:
    """By whatever name, and whatever it is read for."""
    Path("link.npy").symlink_to("b.npy")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    for point in ("a.npy", "b.npy", "link.npy"):
        assert_fails(run("a.npy", "b.npy", "--latents-out", point), 2, f"--latents-out {point} is what is read")
    assert_fails(run("--latent", "abc.npy", "--latents-out", "abc.npy"), 2, "--latents-out abc.npy is what is read")
    model = models / "line.safetensors"
    assert_fails(run("a.npy", "b.npy", "--latents-out", model), 2, f"--latents-out {model} is what is read")
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_a_place_that_cannot_be_written_is_named(run: Interpolate) -> None:
    result = run("a.npy", "b.npy", "--latents-out", "a.txt/path.npy")
    assert_fails(result, 1, "cannot write a.txt/path.npy")


# Output ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["line", "paragraph", "window"])
def test_every_format_holds_the_same_texts(run: Interpolate, model: str) -> None:
    """Lines are lines; other texts have an empty line between them."""
    options = ("--latent", "abc.npy", "--steps", "6")
    records = [json.loads(line) for line in lines(run(*options, "--format", "jsonl", model=model))]
    assert [list(record) for record in records] == [["step", "text"]] * 11
    assert [record["step"] for record in records] == list(range(11))
    texts = [record["text"] for record in records]
    between = "\n" if model == "line" else "\n\n"
    assert run(*options, model=model).stdout_bytes.decode() == between.join(texts) + "\n"
    assert run(*options, "-0", model=model).stdout_bytes.decode() == "".join(f"{text}\0" for text in texts)


def test_a_line_model_prints_one_line_a_step(run: Interpolate) -> None:
    result = run("--latent", "abc.npy", "--steps", "50")
    assert result.stdout_bytes.count(b"\n") == 99
    assert b"\r" not in result.stdout_bytes
    assert b"\r" in run("--latent", "abc.npy", "--steps", "50", "-0", model="paragraph").stdout_bytes


def test_options_of_the_machine_are_taken(run: Interpolate) -> None:
    exact = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
    assert lines(run("a.txt", "b.txt", *exact)) == lines(run("a.txt", "b.txt"))
    options = ("--latent", "abc.npy", "--steps", "30", "--latents-out", "path.npy", "--device", "cpu")
    rounded = run(*options, "--dtype", "bfloat16")
    assert "in bfloat16" in rounded.stderr
    assert lines(rounded) != lines(run(*options))
    generate = ("--latent", "path.npy", "--greedy", "--device", "cpu", "--dtype", "bfloat16")
    assert lines(rounded) == lines(run(*generate, command="generate"))
