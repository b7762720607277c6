"""`gptvae generate`, through Typer's runner where that is enough and in real processes where it is not."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from typer.testing import CliRunner, Result

from gptvae_cli.checkpoint import load
from gptvae_cli.cli.app import app
from gptvae_cli.config import SampleConfig, Unit
from gptvae_cli.decoding import Request, decode
from tests.cli.conftest import LONGEST, WIDTH, array, make_model
from tests.cli.test_train import assert_fails

pytestmark = pytest.mark.usefixtures("one_thread")

Generate = Callable[..., Result]
LATENTS = 3 * np.random.default_rng(0).standard_normal((6, WIDTH)).astype(np.float32)
TEXTS = ["the quick fox", "", "naïve 日本", "a"]


@pytest.fixture
def generate(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """Runs `gptvae generate` in this process, in a folder with `z.npy` and `texts.txt`."""
    monkeypatch.chdir(tmp_path)
    np.save("z.npy", LATENTS)
    Path("texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")

    def invoke(*options: object, stdin: bytes | None = None, model: str = "line") -> Result:
        arguments = ["generate", "--model", str(models / f"{model}.safetensors"), *map(str, options)]
        return CliRunner().invoke(app, arguments, input=stdin)

    return invoke


def data(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout_bytes.decode("utf-8")


def lines(result: Result) -> list[str]:
    """Split at line feeds alone, as `wc -l` counts; `str.splitlines` knows ten more."""
    text = data(result)
    assert text == "" or text.endswith("\n")
    return text.split("\n")[:-1]


def records(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(result)]


def greedy_texts(models: Path, latents: npt.NDArray[np.float32], *, prompt: str = "", unit: Unit = "line") -> list[str]:
    """What x-transformers decodes from latents when it reads every text again for every token, without a cache."""
    checkpoint = load(models / "line.safetensors", device=torch.device("cpu"))
    rule = checkpoint.tokenizer.constraint(unit)
    texts = []
    for latent_Z in latents:
        request = Request(0, 0, torch.tensor(latent_Z), list(prompt.encode()))
        (ids,) = decode(checkpoint.model, [request], SampleConfig(greedy=True), constraint=rule, cached=False)
        texts.append((prompt.encode() + bytes(ids)).decode("utf-8", "ignore"))
    return texts


# What to write from ---------------------------------------------------------------------------------------------------


def test_a_text_is_the_greedy_decode_of_its_latent(generate: Generate, models: Path) -> None:
    result = generate("--latent", "z.npy", "--greedy")
    assert lines(result) == greedy_texts(models, LATENTS)
    assert result.stderr == "", "nothing is random"
    assert len(set(lines(result))) > 3, "the latent hardly shows"


@pytest.mark.parametrize(
    "values",
    [LATENTS.astype(">f8"), np.asfortranarray(LATENTS), LATENTS[0], LATENTS[:0]],
    ids=["double", "by-column", "one", "none"],
)
def test_latents_come_from_a_pipe_in_every_layout(
    generate: Generate, models: Path, values: npt.NDArray[np.float32]
) -> None:
    expected = greedy_texts(models, values.reshape(-1, WIDTH).astype(np.float32))
    assert lines(generate("--latent", "-", "--greedy", stdin=array(values))) == expected


def test_a_pipe_with_a_name_is_not_waited_for_before_the_model_is_there(models: Path, tmp_path: Path) -> None:
    """As `--latent <(gptvae encode a.txt)` has one: both load torch meanwhile."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    options = ["--latent", str(pipe), "--model", str(models / "line.safetensors")]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptvae_cli", "generate", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        with pipe.open("wb") as stream:
            assert process.stderr is not None
            assert process.stderr.readline().startswith(b"seed ")
            stream.write(array(LATENTS))
        assert process.communicate(timeout=120)[0].count(b"\n") == len(LATENTS)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("option", ["--ref", "--latent"])
def test_a_line_of_a_pipe_is_answered_before_the_next_is_sent(models: Path, option: str) -> None:
    """Or a program that talks to it, as by the `coproc` of a shell, waits for ever. All are the same texts."""
    inputs = ["one", "two", "three"] if option == "--ref" else [json.dumps(each.tolist()) for each in LATENTS[:3]]
    options = [option, "-", "--greedy", "-n", "2", "--threads", "1", "--model", str(models / "line.safetensors")]
    command = [sys.executable, "-m", "gptvae_cli", "generate", *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    answers = []
    try:
        for line in inputs:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answers += [process.stdout.readline(), process.stdout.readline()]
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    together = subprocess.run(command, input="".join(f"{line}\n" for line in inputs), capture_output=True, text=True)
    assert "".join(answers) == together.stdout


def test_some_lines_of_many_are_written_as_among_all(generate: Generate) -> None:
    """By the noise of their rows, which are printed: so they can be put beside what they came from."""
    encoded = [{"row": row, "latent": latent.tolist()} for row, latent in enumerate(LATENTS)]
    Path("all.jsonl").write_text("".join(json.dumps(each) + "\n" for each in encoded))
    Path("some.jsonl").write_text("".join(json.dumps(each) + "\n" for each in encoded[4:1:-2]))
    options = ["-n", "2", "--seed", "3", "--format", "jsonl"]
    among_all, alone = (records(generate("--latent", name, *options)) for name in ("all.jsonl", "some.jsonl"))
    assert alone == [each for row in (4, 2) for each in among_all if each["row"] == row]
    assert [(each["row"], each["copy"]) for each in alone] == [(4, 0), (4, 1), (2, 0), (2, 1)]


def test_a_reference_is_written_from_its_mean(generate: Generate, models: Path) -> None:
    """An empty text is a reference, too."""
    encoded = CliRunner().invoke(app, ["encode", "texts.txt", "--model", str(models / "line.safetensors")])
    expected = lines(generate("--latent", "-", "--greedy", stdin=encoded.stdout_bytes))
    assert len(expected) == len(TEXTS)
    assert lines(generate("--ref", "texts.txt", "--greedy")) == expected
    assert lines(generate("--ref", "-", "--greedy", stdin=Path("texts.txt").read_bytes())) == expected
    assert [lines(generate("--text", text, "--greedy"))[0] for text in TEXTS] == expected


def test_a_reference_may_be_written_from_what_encode_refines(generate: Generate, models: Path) -> None:
    arguments = ["encode", "texts.txt", "--refine", "--out", "refined.npy", "--model", str(models / "line.safetensors")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    expected = lines(generate("--latent", "refined.npy", "--greedy"))
    assert lines(generate("--ref", "texts.txt", "--refine", "--greedy")) == expected
    assert lines(generate("--text", TEXTS[0], "--refine", "--greedy")) == expected[:1]
    assert expected != lines(generate("--ref", "texts.txt", "--greedy"))


def test_a_reference_may_be_a_record_or_of_another_unit(generate: Generate) -> None:
    Path("a.jsonl").write_text('{"text": "no", "review": "one"}\n{"text": "no", "review": "two"}\n')
    assert lines(generate("--ref", "a.jsonl", "--field", "review", "--greedy")) == lines(
        generate("--ref", "-", "--greedy", stdin=b"one\ntwo\n")
    )
    assert len(records(generate("--ref", "texts.txt", "--unit", "file", "--greedy", "--format", "jsonl"))) == 1
    windows = generate("--text", "x" * 50, "--greedy", "--format", "jsonl", model="window")
    assert len(records(windows)) == 3, "a latent for each of its windows"


def test_a_reference_that_is_cut_is_told_unless_quiet(generate: Generate) -> None:
    note = "1 text is longer than the model's 24 tokens; the beginning was used\n"
    assert generate("--text", "x" * 99, "--greedy").stderr == note
    assert generate("--text", "x" * 99, "--greedy", "-q").stderr == ""


def test_the_prior_is_the_default_and_one_text(generate: Generate) -> None:
    assert lines(generate("--seed", "1")) == lines(generate("--prior", "1", "--seed", "1"))


def test_a_text_of_the_prior_does_not_depend_on_how_many_there_are(generate: Generate) -> None:
    many = lines(generate("--prior", "100", "--seed", "1"))
    assert len(many) == 100
    assert many[:3] == lines(generate("--prior", "3", "--seed", "1"))
    assert many != lines(generate("--prior", "100", "--seed", "2"))
    assert len(set(many)) > 50


def test_the_prior_differs_by_its_latents_even_when_greedy(generate: Generate) -> None:
    """Which are random, so the seed is told."""
    result = generate("--prior", "30", "--greedy")
    assert len(set(lines(result))) > 3
    assert result.stderr.startswith("seed ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--latent", "z.npy", "--text", "a"], ["--latent and --text exclude each other"]),
        (["--ref", "texts.txt", "--prior", "2"], ["--ref and --prior exclude each other"]),
        (["--sample"], ["--sample", "--ref or --text"]),
        (["--sample", "--latent", "z.npy"], ["--sample", "--ref or --text"]),
        (["--refine"], ["--refine fits a latent to its text", "--ref or --text"]),
        (["--refine", "--latent", "z.npy"], ["--refine", "--ref or --text"]),
        (["--refine", "--sample", "--text", "a"], ["--sample", "--refine", "leave one of them out"]),
        (["--stream", "--format", "jsonl"], ["--stream and --format jsonl exclude each other"]),
        (["-0", "--format", "jsonl"], ["-0 and --format jsonl exclude each other"]),
        (["--prompt", "a\nb"], ["prompt", "line break", "--unit paragraph"]),
        (["--prior", "0"], ["--prior"]),
        (["-n", "0"], ["-n is '0'"]),
        (["--max-tokens", "0"], ["max", "tokens", "0"]),
        (["--temperature", "0"], ["temperature", "0", "--greedy"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-k", "0"], ["top", "k", "0"]),
        (["--top-p", "1.5"], ["top", "p", "1.5"]),
        (["--min-p", "0"], ["min", "p", "0"]),
        (["--seed", "9223372036854775808"], ["--seed"]),
        (["--format", "xml"], ["--format", "xml", "jsonl"]),
        (["a.txt"], ["a.txt"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_a_wrong_option_is_wrong_usage(generate: Generate, options: list[str], words: list[str]) -> None:
    assert_fails(generate(*options), 2, *words, hint=False)


# Seeds and copies -----------------------------------------------------------------------------------------------------


def test_a_seed_that_was_picked_is_told_and_gives_the_same_again(generate: Generate) -> None:
    picked = generate("--prior", "20")
    told = re.fullmatch(r"seed (\d+); --seed \1 gives the same again\n", picked.stderr)
    assert told, picked.stderr
    again = generate("--prior", "20", "--seed", told[1])
    assert (lines(again), again.stderr) == (lines(picked), "")
    assert generate("--prior", "20", "-q").stderr == ""


def test_copies_of_a_latent_follow_each_other(generate: Generate) -> None:
    found = records(generate("--latent", "z.npy", "-n", "3", "--seed", "1", "--format", "jsonl"))
    assert [(record["row"], record["copy"]) for record in found] == [
        (row, copy) for row in range(6) for copy in range(3)
    ]
    assert len({record["text"] for record in found}) > 9
    single = lines(generate("--latent", "z.npy", "--seed", "1"))
    assert [record["text"] for record in found[::3]] == single, "the first copy is the one that there is without others"
    assert len(set(lines(generate("--latent", "z.npy", "--copies", "3", "--greedy")))) <= 6


def test_a_sample_is_a_fresh_latent_for_every_copy(generate: Generate) -> None:
    """Greedy, so that nothing but the latents can differ."""
    options = ("--ref", "texts.txt", "-n", "8", "--greedy")
    means, drawn = lines(generate(*options)), lines(generate(*options, "--sample", "--seed", "3"))
    assert [len(set(means[i : i + 8])) for i in range(0, 32, 8)] == [1] * 4
    assert all(len(set(drawn[i : i + 8])) > 1 for i in range(0, 32, 8))
    assert drawn == lines(generate(*options, "--sample", "--seed", "3"))
    assert drawn != lines(generate(*options, "--sample", "--seed", "4"))
    assert generate(*options, "--sample").stderr.startswith("seed ")


def test_a_drawn_reference_is_the_sample_that_encode_gives(generate: Generate, models: Path) -> None:
    options = ["--sample", "--seed", "3", "--model", str(models / "line.safetensors")]
    encoded = CliRunner().invoke(app, ["encode", "texts.txt", *options])
    assert lines(generate("--latent", "-", "--greedy", stdin=encoded.stdout_bytes)) == lines(
        generate("--ref", "texts.txt", "--greedy", "--sample", "--seed", "3")
    )


# How to choose tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"], ["--temperature", "1e-6"]],
    ids=lambda options: options[0],
)
def test_every_filter_at_its_narrowest_is_greedy(generate: Generate, options: list[str]) -> None:
    def written(*more: str) -> list[str]:
        return lines(generate("--latent", "z.npy", "--seed", "2", *more))

    assert written(*options) == written("--greedy")
    assert written("--top-k", "1000", "--top-p", "1", "--min-p", "1e-9", "--temperature", "1") == written()
    assert written() != written("--greedy")


def test_a_higher_temperature_is_wilder(generate: Generate) -> None:
    def kinds(temperature: float) -> int:
        texts = lines(generate("--prior", "100", "--seed", "1", "--temperature", temperature))
        return len(set("".join(texts)))

    assert kinds(0.2) < kinds(1) < kinds(3)


def test_max_tokens_cuts_the_same_text_short(generate: Generate) -> None:
    def written(*options: str) -> list[str]:
        return [
            record["text"]
            for record in records(generate("--prior", "50", "--seed", "1", "--format", "jsonl", *options))
        ]

    whole, short, long = written(), written("--max-tokens", "3"), written("--max-tokens", "60")
    assert max(len(text.encode()) for text in short) == 3
    assert max(len(text.encode()) for text in whole) == LONGEST - 1, "by default no longer than what the model reads"
    assert LONGEST < max(len(text.encode()) for text in long) <= 60
    for cut, text, longer in zip(short, whole, long, strict=True):
        assert text.startswith(cut)
        assert longer.startswith(text)
    assert not any("\ufffd" in text for text in (*short, *whole, *long)), "none ends within a character"


@pytest.mark.parametrize("prompt", ["ab", "日é", "x" * 60], ids=["short", "wide", "long"])
def test_a_text_is_its_prompt_and_a_continuation(generate: Generate, models: Path, prompt: str) -> None:
    found = lines(generate("--latent", "z.npy", "--prompt", prompt, "--greedy"))
    assert found == greedy_texts(models, LATENTS, prompt=prompt)
    assert all(text.startswith(prompt) for text in found)
    assert any(text != prompt for text in found)


# Output ---------------------------------------------------------------------------------------------------------------


def test_the_lines_are_as_many_as_the_texts(generate: Generate) -> None:
    """Empty ones included, and at a temperature where line breaks are as likely as letters."""
    result = generate("--prior", "300", "--seed", "1", "--temperature", "30", "--max-tokens", "90")
    assert result.stdout_bytes.count(b"\n") == 300
    assert b"\r" not in result.stdout_bytes
    empty = generate("--prior", "300", "--seed", "1", "--max-tokens", "1")
    assert empty.stdout_bytes.count(b"\n") == 300
    assert "" in lines(empty)


@pytest.mark.parametrize(("model", "options"), [("paragraph", []), ("line", ["--unit", "paragraph"]), ("window", [])])
def test_paragraphs_have_an_empty_line_between_them(generate: Generate, model: str, options: list[str]) -> None:
    arguments = ("--prior", "60", "--seed", "1", "--temperature", "3", *options)
    texts = [record["text"] for record in records(generate(*arguments, "--format", "jsonl", model=model))]
    assert any("\n" in text for text in texts)
    assert data(generate(*arguments, model=model)) == "\n\n".join(texts) + "\n"


@pytest.mark.parametrize("model", ["line", "paragraph"])
@pytest.mark.parametrize("option", ["-0", "--null"])
def test_null_ends_every_text(generate: Generate, model: str, option: str) -> None:
    """And stands nowhere else, though a model of bytes writes it within a text, too."""
    arguments = ("--prior", "30", "--seed", "1")
    texts = [record["text"] for record in records(generate(*arguments, "--format", "jsonl", model=model))]
    assert any("\0" in text for text in texts)
    ended = data(generate(*arguments, option, model=model))
    assert ended == "".join(text.replace("\0", "") + "\0" for text in texts)


def test_a_record_says_how_its_text_was_made(generate: Generate) -> None:
    result = generate("--prior", "40", "-n", "2", "--format", "jsonl", "--temperature", "9")
    found = records(result)
    seed = int(re.findall(r"seed (\d+);", result.stderr)[0])
    assert [set(record) for record in found] == [{"row", "copy", "seed", "text"}] * 80
    assert {record["seed"] for record in found} == {seed}
    again = lines(generate("--prior", "40", "-n", "2", "--temperature", "9", "--seed", seed))
    assert [record["text"] for record in found] == again
    greedily = records(generate("--text", "a", "--greedy", "--format", "jsonl"))
    assert [set(record) for record in greedily] == [{"row", "copy", "text"}], "no seed had a part in it"
    for options in (["--prior", "1"], ["--text", "a", "--sample"]):
        (drawn,) = records(generate(*options, "--greedy", "--seed", "5", "--format", "jsonl"))
        assert drawn["seed"] == 5, "the latent was drawn"


def test_a_line_break_in_an_argument_is_what_it_is_in_a_record(generate: Generate) -> None:
    """A model of lines has seen none; JSON lines have a space there."""
    Path("a.jsonl").write_text(json.dumps({"text": "one\r\ntwo\nthree\n"}) + "\n")
    written = [
        lines(generate(*source, "--greedy"))
        for source in (["--text", "one\r\ntwo\nthree\n"], ["--text", "one two three"], ["--ref", "a.jsonl"])
    ]
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("model", ["line", "paragraph"])
@pytest.mark.parametrize(
    "options",
    [
        ["--prior", "20"],
        ["--prior", "20", "-0"],
        ["--text", "naïve", "-n", "3", "--sample"],
        ["--latent", "z.npy", "--prompt", "日é"],
        ["--latent", "z.npy", "--max-tokens", "70"],
    ],
    ids=" ".join,
)
def test_a_stream_is_the_same_text(generate: Generate, model: str, options: list[str]) -> None:
    arguments = (*options, "--seed", "1", "--temperature", "3")
    assert data(generate(*arguments, "--stream", model=model)) == data(generate(*arguments, model=model))


def test_a_stream_shows_its_first_piece_before_the_text_is_done(generate: Generate, models: Path) -> None:
    """And ends with its reader: the text goes round in circles and would have a hundred million tokens."""
    np.save("many.npy", many := 3 * np.random.default_rng(1).standard_normal((200, WIDTH), dtype=np.float32))
    texts = lines(generate("--latent", "many.npy", "--greedy", "--max-tokens", "500"))
    lengths = [len(text.encode()) for text in texts]
    assert max(lengths) > 400
    np.save("endless.npy", many[np.argmax(lengths)])
    options = ["--latent", "endless.npy", "--greedy", "--max-tokens", "100000000", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptvae_cli", "generate", "--stream", *options, "--model", models / "line.safetensors"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)
        assert ready, "it waits for the end"
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("source", [["--prior", "3"], ["--ref", "texts.txt", "--sample"], ["--latent", "z.npy"]])
def test_directions_are_added_to_every_latent(generate: Generate, source: list[str]) -> None:
    one, other = np.random.default_rng(5).standard_normal((2, WIDTH))
    np.save("one.npy", one)
    np.save("a=b.npy", other.astype("f4")[None])
    options = (*source, "-n", "2", "--seed", "1", "--greedy", "--latents-out")
    lines(generate(*options, "plain.npy"))
    texts = lines(generate(*options, "moved.npy", "--add", "one.npy=-1.5", "--add", "a=b.npy", "--add", "a=b.npy=0.25"))
    moved = np.load("moved.npy")
    np.testing.assert_allclose(moved, np.load("plain.npy") - 1.5 * one + 1.25 * other, atol=1e-5)
    assert lines(generate("--latent", "moved.npy", "--greedy")) == texts


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ("z.npy", 3, ["z.npy holds", "latents, --add takes a file of one"]),
        ("wide.npy", 3, ["the shape (9,)"]),
        ("one.npy=much", 2, ["asks for 'much' times one.npy, which is no number", "--add one.npy=0.5"]),
        ("one.npy=nan", 3, ["the sum of --add", "not a finite number"]),
        ("one.npy=1e30", 3, ["the sum of --add", "too large for a latent"]),
        ("none.npy=2", 3, ["cannot read none.npy"]),
        ("-=2", 2, ["--add needs a file"]),
    ],
)
def test_a_direction_that_cannot_be_added_is_told_of(
    generate: Generate, asked: str, code: int, words: list[str]
) -> None:
    np.save("one.npy", np.ones(WIDTH))
    np.save("wide.npy", np.ones(WIDTH + 1))
    assert_fails(generate("--prior", "1", "--add", asked), code, *words)


def test_a_direction_is_not_replaced(generate: Generate) -> None:
    np.save("one.npy", np.ones(WIDTH))
    result = generate("--prior", "1", "--add", "one.npy=2", "--latents-out", "one.npy")
    assert_fails(result, 2, "--latents-out one.npy is what is read")


@pytest.mark.parametrize("source", [["--prior", "3"], ["--ref", "texts.txt", "--sample"], ["--latent", "z.npy"]])
def test_the_latent_of_every_text_may_be_kept(generate: Generate, source: list[str]) -> None:
    """Of those that are drawn nothing else tells."""
    options = (*source, "-n", "2", "--seed", "1", "--greedy")
    texts = lines(generate(*options, "--latents-out", "kept.npy"))
    kept = np.load("kept.npy")
    assert kept.shape == (len(texts), WIDTH)
    assert lines(generate("--latent", "kept.npy", "--greedy")) == texts == lines(generate(*options))
    alike = np.array_equal(kept[::2], kept[1::2])
    assert alike == ("--sample" not in source), "a copy has a draw of its own"


def test_latents_are_kept_in_a_file_that_is_not_read(generate: Generate, models: Path, baseline: Path) -> None:
    assert_fails(generate("--latents-out", "-"), 2, "--latents-out")
    for file in ("z.npy", str(models / "line.safetensors")):
        assert_fails(generate("--latent", "z.npy", "--latents-out", file), 2, f"--latents-out {file} is what is read")
    without = CliRunner().invoke(app, ["generate", "--model", str(baseline), "--latents-out", "kept.npy"])
    assert_fails(without, 3, "has no latent")


# Model and machine ----------------------------------------------------------------------------------------------------


def test_options_of_the_machine_are_taken(generate: Generate, models: Path) -> None:
    expected = lines(generate("--latent", "z.npy", "--greedy"))
    exact = ("--device", "cpu", "--dtype", "float32", "--threads", "1")
    assert lines(generate("--latent", "z.npy", "--greedy", *exact)) == expected
    np.save("many.npy", np.concatenate([LATENTS, -LATENTS, 2 * LATENTS, LATENTS[:, ::-1]]))
    many = ("--latent", "many.npy", "--greedy", "--device", "cpu")
    rounded = generate(*many, "--dtype", "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        found = load(models / "line.safetensors", device=torch.device("cpu"))
        requests = [Request(row, 0, torch.tensor(z_Z.copy())) for row, z_Z in enumerate(np.load("many.npy"))]
        rule = found.tokenizer.constraint("line")
        written = [*decode(found.model, requests, SampleConfig(greedy=True), constraint=rule)]
    assert lines(rounded) == [bytes(ids).decode("utf-8", "ignore") for ids in written]
    assert lines(rounded) != lines(generate(*many)), "they are other texts"
    assert "in bfloat16" in rounded.stderr


def test_a_text_that_is_not_unicode_is_bad_input(generate: Generate) -> None:
    """Bytes of an argument that are not UTF-8 become lone surrogates."""
    for options in (["--text", "a\udcff"], ["--prompt", "a\udcff"]):
        assert_fails(generate(*options, "--greedy", "-q"), 3, "U+DCFF", "not valid Unicode")


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (LATENTS[:, :-1], ["(6, 7)", "8 dimensions"]),
        (np.full((1, WIDTH), np.nan, np.float32), ["row 0", "not a finite number"]),
        (LATENTS.astype(int), ["integers", "astype"]),
    ],
    ids=["width", "nan", "integers"],
)
def test_latents_of_a_pipe_are_checked_like_those_of_a_file(
    generate: Generate, latents: npt.NDArray[Any], words: Sequence[str]
) -> None:
    Path("bad.npy").write_bytes(array(latents))
    assert_fails(generate("--latent", "bad.npy", "--greedy"), 3, "bad.npy", *words)
    assert_fails(generate("--latent", "-", "--greedy", stdin=array(latents)), 3, *words)


# A model without a latent ---------------------------------------------------------------------------------------------


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return make_model(tmp_path / "baseline.safetensors", train={"latents_dropout_prob": 1.0})


@pytest.mark.parametrize(
    "arguments",
    [
        ["encode", "texts.txt"],
        ["generate", "--latent", "z.npy"],
        ["generate", "--ref", "texts.txt", "--sample"],
        ["generate", "--text", ""],
        ["generate", "--prior", "1", "--guidance", "2"],
        ["generate", "--prior", "1", "--add", "z.npy"],
        ["interpolate", "--from", "a", "--to", "b"],
    ],
    ids=" ".join,
)
def test_a_baseline_takes_and_gives_no_latents(generate: Generate, baseline: Path, arguments: list[str]) -> None:
    """Its encoder is as random as it began, and its decoder has never seen a latent: both would give nonsense."""
    result = CliRunner().invoke(app, [*arguments, "--model", str(baseline)])
    assert_fails(result, 3, f"{baseline} has no latent", "--latents-dropout-prob 1", "gptvae generate --prior N")


@pytest.mark.parametrize("arguments", [["generate", "--text", "a"], ["interpolate", "--from", "a", "--to", "b"]])
def test_a_decoder_that_always_had_a_latent_cannot_be_guided(
    generate: Generate, tmp_path: Path, arguments: list[str]
) -> None:
    path = make_model(tmp_path / "always.safetensors", train={"latents_dropout_prob": 0.0})
    result = CliRunner().invoke(app, [*arguments, "--guidance", "2", "--model", str(path)])
    assert_fails(result, 3, "--latents-dropout-prob was 0")
    assert CliRunner().invoke(app, [*arguments, "--guidance", "1", "--model", str(path)]).exit_code == 0


def test_a_baseline_writes_texts_without_a_latent(generate: Generate, baseline: Path) -> None:
    """What x-transformers decodes where no embedding is put in front."""
    arguments = ["generate", "--model", str(baseline)]
    result = CliRunner().invoke(app, [*arguments, "--prior", "2", "--prompt", "a", "--greedy"])
    checkpoint = load(baseline, device=torch.device("cpu"))
    request = Request(0, 0, None, list(b"a"))
    rule = checkpoint.tokenizer.constraint("line")
    (ids,) = decode(checkpoint.model, [request], SampleConfig(greedy=True), constraint=rule, cached=False)
    assert lines(result) == 2 * ["a" + bytes(ids).decode("utf-8", "ignore")]
    drawn = lines(CliRunner().invoke(app, [*arguments, "--prior", "3", "-n", "2", "--seed", "1"]))
    assert len(set(drawn)) == 6, "each has token noise of its own"
    assert lines(CliRunner().invoke(app, [*arguments, "--seed", "1"])) == drawn[:1]


def test_texts_that_are_not_read_are_told_of(models: Path, tmp_path: Path) -> None:
    """Every other command reads standard input where nothing is named."""
    command = [sys.executable, "-m", "gptvae_cli", "generate", "--model", str(models / "line.safetensors")]
    piped = subprocess.run([*command, "--seed", "1"], input=b"a text\n", capture_output=True, check=True)
    assert b"standard input is not read: --ref - takes texts from it" in piped.stderr
    asked = subprocess.run([*command, "--prior", "1", "--seed", "1"], input=b"a\n", capture_output=True, check=True)
    assert b"standard input" not in asked.stderr
    assert asked.stdout == piped.stdout


def test_a_field_is_of_texts_in_records(generate: Generate) -> None:
    assert_fails(generate("--prior", "1", "--field", "review"), 2, "--field is of the texts of --ref")
    assert_fails(generate("--ref", "texts.txt", "--field", "review"), 2, "texts.txt is plain text", "JSON lines")
    records = b'{"review": "one\\ntwo"}\n{"review": "b"}\n'
    expected = lines(generate("--ref", "-", "--greedy", stdin=b"one two\nb\n"))
    assert lines(generate("--ref", "-", "--field", "review", "--greedy", stdin=records)) == expected
