"""`gptvae encode`, through Typer's runner where that is enough and in real processes where it is not."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from typer.testing import CliRunner, Result

from gptvae_cli.checkpoint import load, save_model
from gptvae_cli.cli import streams
from gptvae_cli.cli.app import app
from gptvae_cli.objective import cross_entropy_BT
from tests.cli.conftest import LONGEST, WIDTH, make_model
from tests.cli.test_train import assert_fails

pytestmark = pytest.mark.usefixtures("one_thread")

Floats = npt.NDArray[np.float32]
Encode = Callable[..., Result]
TEXTS = ["the quick fox", "", "naïve 日本", "a", "the quick fox"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def encode(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Runs `gptvae encode` in this process."""
    monkeypatch.chdir(tmp_path)

    def invoke(*options: object, stdin: bytes | None = None, model: str = "line") -> Result:
        arguments = ["encode", "--model", str(models / f"{model}.safetensors"), *map(str, options)]
        return CliRunner().invoke(app, arguments, input=stdin)

    return invoke


def array(data: bytes | Path) -> Floats:
    """Read by numpy itself."""
    found: Floats = np.load(io.BytesIO(data) if isinstance(data, bytes) else data, allow_pickle=False)
    assert found.dtype == np.float32
    return found


def latents(result: Result) -> Floats:
    assert result.exit_code == 0, result.stderr
    return array(result.stdout_bytes)


def posteriors(model: Path, texts: Sequence[str], *, ends: bool = True) -> tuple[Floats, Floats]:
    """Means and standard deviations, each text by itself."""
    checkpoint = load(model, device=torch.device("cpu"))
    config = checkpoint.header.model
    means, stds = [], []
    with torch.inference_mode():
        for text in texts:
            tokens = [config.bos_id, *text.encode(), *([config.eos_id] if ends else [])]
            posterior = checkpoint.model.posterior(torch.tensor([tokens]))
            means.append(posterior.mean_BZ[0].numpy())
            stds.append(posterior.log_var_BZ[0].exp().sqrt().numpy())
    return np.stack(means), np.stack(stds)


def test_latents_do_not_go_to_a_terminal_by_its_name(encode: Encode, texts: Path) -> None:
    """Which is a file like any other."""
    leader, follower = pty.openpty()
    try:
        for option in ("--out", "--std-out"):
            others = () if option == "--out" else ("--out", "z.npy")
            result = encode(texts, option, os.ttyname(follower), *others)
            assert_fails(result, 2, os.ttyname(follower), "is a terminal")
        os.set_blocking(leader, False)
        with pytest.raises(BlockingIOError):
            os.read(leader, 1)
    finally:
        os.close(leader)
        os.close(follower)


def test_an_empty_name_is_no_place_for_latents(encode: Encode, texts: Path) -> None:
    assert_fails(encode(texts, "--out", ""), 2, "the name of the file to write is empty")
    assert_fails(CliRunner().invoke(app, ["encode", str(texts), "--model", ""]), 2, "the name of the model is empty")


def test_latents_that_are_no_numbers_are_the_models_fault(texts: Path, tmp_path: Path) -> None:
    """Its weights are finite, and what they make of a text is not."""
    path = make_model(tmp_path / "huge.safetensors")
    found = load(path, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in found.model.to_latent_mean_log_variance.parameters():
            parameter.fill_(3e38)
    save_model(path, found.model, found.header)
    result = CliRunner().invoke(app, ["encode", str(texts), "--model", str(path), "--format", "jsonl"])
    assert_fails(result, 3, "not a finite number", hint=False)


# Latents --------------------------------------------------------------------------------------------------------------


def test_row_i_is_the_posterior_mean_of_text_i(encode: Encode, texts: Path, models: Path) -> None:
    """Empty texts are kept, or rows would move up."""
    result = encode(texts)
    found = latents(result)
    assert found.shape == (len(TEXTS), WIDTH)
    assert_allclose(found, posteriors(models / "line.safetensors", TEXTS)[0], atol=1e-5, rtol=1e-5)
    assert result.stderr == ""


def test_files_and_folders_are_encoded_in_the_order_that_was_given(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name, text in {"z.txt": "one", "a.txt": "two", "folder/b.txt": "four", "folder/a.txt": "three"}.items():
        (tmp_path / name).write_text(f"{text}\n")
    with gzip.open(tmp_path / "folder" / "c.txt.gz", "wt") as packed:
        packed.write("five\n")
    found = latents(encode("z.txt", "a.txt", "folder", "-", stdin=b"six\n"))
    assert_allclose(found, latents(encode(stdin=b"one\ntwo\nthree\nfour\nfive\nsix\n")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("argument", [[], ["-"]], ids=["nothing", "dash"])
def test_standard_input_is_read(encode: Encode, texts: Path, argument: list[str]) -> None:
    found = latents(encode(*argument, stdin=texts.read_bytes()))
    assert_allclose(found, latents(encode(texts)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unit", ["line", "paragraph", "window"])
def test_no_texts_are_no_rows_of_the_right_width(encode: Encode, unit: str) -> None:
    expected = (1, WIDTH) if unit == "window" else (0, WIDTH)  # an empty file is an empty running text
    assert latents(encode(stdin=b"", model=unit)).shape == expected


def test_a_record_field_is_the_text(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "review": "one"}\n{"text": "no", "review": "two"}\n')
    assert_allclose(
        latents(encode("a.jsonl", "--field", "review")), latents(encode(stdin=b"one\ntwo\n")), atol=1e-5, rtol=1e-5
    )
    piped = encode("--field", "review", stdin=(tmp_path / "a.jsonl").read_bytes())
    assert_allclose(latents(piped), latents(encode("a.jsonl", "--field", "review")), atol=1e-5, rtol=1e-5)
    assert_fails(encode("a.jsonl", "--field", "title", "--format", "jsonl"), 3, "a.jsonl, line 1", "title", "'review'")


@pytest.mark.parametrize(
    ("model", "unit", "rows"),
    [
        ("line", None, ["one", "", "two", "three"]),
        ("paragraph", None, ["one", "two\nthree"]),
        ("line", "paragraph", ["one", "two\nthree"]),
        ("line", "file", ["one\n\ntwo\nthree"]),
        ("paragraph", "line", ["one", "", "two", "three"]),
    ],
)
def test_the_unit_is_the_models_unless_told_otherwise(
    encode: Encode, models: Path, model: str, unit: str | None, rows: list[str]
) -> None:
    options = [] if unit is None else ["--unit", unit]
    found = latents(encode(*options, stdin=b"one\n\ntwo\nthree\n", model=model))
    assert_allclose(found, posteriors(models / "line.safetensors", rows)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "options"), [("window", []), ("line", ["--unit", "window"])])
def test_a_running_text_has_a_row_for_every_window(
    encode: Encode, models: Path, model: str, options: list[str]
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(2 * LONGEST + 5))
    windows = [text[i : i + LONGEST - 1] for i in range(0, len(text), LONGEST - 1)]
    result = encode(*options, stdin=text.encode(), model=model)
    expected, _ = posteriors(models / "window.safetensors", windows, ends=False)
    assert_allclose(latents(result), expected, atol=1e-5, rtol=1e-5)
    assert result.stderr == "", "nothing was cut off"


def test_what_is_cut_off_is_counted_unless_quiet(encode: Encode) -> None:
    long = b"x" * 100 + b"\nshort\n" + b"y" * 100
    result = encode(stdin=long)
    assert result.stderr == "2 texts are longer than the model's 24 tokens; the beginning was used\n"
    assert latents(result).shape == (3, WIDTH)
    assert encode("-q", stdin=long).stderr == encode("--quiet", stdin=long).stderr == ""


# Draws and deviations -------------------------------------------------------------------------------------------------


def test_deviations_go_to_a_file_of_their_own(encode: Encode, texts: Path, models: Path, tmp_path: Path) -> None:
    means = latents(encode(texts, "--std-out", "std.npy"))
    expected_means, expected_stds = posteriors(models / "line.safetensors", TEXTS)
    assert_allclose(means, expected_means, atol=1e-5, rtol=1e-5)
    assert_allclose(array(tmp_path / "std.npy"), expected_stds, atol=1e-5, rtol=1e-5)
    assert encode("--std-out", "none.npy", stdin=b"").exit_code == 0
    assert array(tmp_path / "none.npy").shape == (0, WIDTH)


def test_a_draw_is_standard_normal_around_its_mean(encode: Encode, tmp_path: Path) -> None:
    lines = b"".join(b"%d\n" % i for i in range(1000))
    means = latents(encode("--std-out", "std.npy", stdin=lines))
    draws = latents(encode("--sample", "--seed", "3", stdin=lines))
    scores = (draws - means) / array(tmp_path / "std.npy")
    # Five standard errors.
    assert abs(scores.mean()) < 5 / scores.size**0.5
    assert abs(scores.var() - 1) < 5 * (2 / scores.size) ** 0.5


def test_a_draw_is_named_by_its_seed_and_its_row(encode: Encode, texts: Path) -> None:
    first = encode(texts, "--sample", "--seed", "1")
    assert first.stderr == "", "a seed that was given needs no telling"
    assert_array_equal(latents(first), latents(encode(texts, "--sample", "--seed", "1")))
    assert np.abs(latents(first) - latents(encode(texts, "--sample", "--seed", "2"))).min() > 0
    assert np.abs(latents(first) - latents(encode(texts))).min() > 0
    assert np.abs(latents(first)[0] - latents(first)[4]).min() > 0, "equal texts have draws of their own"
    fewer = encode("--sample", "--seed", "1", stdin="\n".join(TEXTS[:2]).encode() + b"\n")
    assert_allclose(latents(fewer), latents(first)[:2], atol=1e-5, rtol=1e-5)


def test_a_latent_may_be_fitted_to_its_text(encode: Encode, texts: Path, models: Path, tmp_path: Path) -> None:
    """From which the text is then likelier than from the mean; the deviations stay those of the posterior."""
    refined = latents(encode(texts, "--refine", "--std-out", tmp_path / "std.npy"))
    means, stds = posteriors(models / "line.safetensors", TEXTS)
    assert_allclose(array(tmp_path / "std.npy"), stds, atol=1e-5, rtol=1e-5)
    assert_array_equal(refined[0], refined[4])
    checkpoint = load(models / "line.safetensors", device=torch.device("cpu"))
    config = checkpoint.header.model
    for text, *both in zip(TEXTS, means, refined, strict=True):
        tokens_1T = torch.tensor([[config.bos_id, *text.encode(), config.eos_id]])
        with torch.no_grad():
            mean_nats, nats = (
                cross_entropy_BT(checkpoint.model, tokens_1T, torch.tensor(latent_Z[None])).sum() for latent_Z in both
            )
        assert nats < mean_nats
    assert np.linalg.norm(refined, axis=1).max() <= max(WIDTH**0.5, np.linalg.norm(means, axis=1).max()) + 1e-4
    windows = latents(encode(texts, "--refine", model="window"))
    assert windows.shape == latents(encode(texts, model="window")).shape
    assert not np.allclose(windows, latents(encode(texts, model="window")), atol=1e-2)


def test_what_is_not_written_is_no_guide_for_its_latent(encode: Encode, texts: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "aligned.safetensors", latents_from="train.txt")
    aligned = encode(texts, "--refine", model=str(tmp_path / "aligned"))
    assert_fails(aligned, 3, "writes other texts than it encodes")
    make_model(tmp_path / "alone.safetensors", train={"latents_dropout_prob": 1.0})
    assert_fails(encode(texts, "--refine", model=str(tmp_path / "alone")), 3, "has no latent")
    assert_fails(encode(texts, "--refine", "--sample"), 2, "--sample draws from posteriors, which --refine leaves")


def test_a_decoder_that_always_had_a_latent_is_asked_without_guidance(
    encode: Encode, texts: Path, models: Path, tmp_path: Path
) -> None:
    make_model(tmp_path / "always.safetensors", train={"latents_dropout_prob": 0.0})
    refined = latents(encode(texts, "--refine", model=str(tmp_path / "always")))
    assert not np.allclose(refined, latents(encode(texts, "--refine")), atol=1e-2)
    assert not np.allclose(refined, latents(encode(texts)), atol=1e-2)


def test_a_seed_that_was_picked_is_told_and_gives_the_same_again(encode: Encode, texts: Path) -> None:
    picked = encode(texts, "--sample")
    told = re.fullmatch(r"seed (\d+); --seed \1 gives the same again\n", picked.stderr)
    assert told, picked.stderr
    assert_array_equal(latents(picked), latents(encode(texts, "--sample", "--seed", told[1])))
    assert encode(texts, "--sample").stderr != picked.stderr
    assert encode(texts, "--sample", "-q").stderr == ""


# Where they go --------------------------------------------------------------------------------------------------------


def test_an_output_file_holds_the_same_bytes(encode: Encode, texts: Path, tmp_path: Path) -> None:
    result = encode(texts, "--out", "z.npy")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "z.npy").read_bytes() == encode(texts).stdout_bytes == encode(texts, "--out", "-").stdout_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", "z.npy"], "no unfinished file is left"


def test_a_failure_leaves_the_old_output_as_it_was(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "z.npy").write_bytes(b"old")
    (tmp_path / "bad.txt").write_bytes(b"fine\nna\xefve\n")
    assert_fails(encode("bad.txt", "--out", "z.npy", "--std-out", "s.npy"), 3, "bad.txt, line 2", "0xef", "iconv")
    assert (tmp_path / "z.npy").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "z.npy"]


@pytest.mark.parametrize("option", ["--out", "--std-out"])
def test_a_place_that_cannot_be_written_is_named(encode: Encode, texts: Path, option: str) -> None:
    other = "--std-out" if option == "--out" else "--out"
    assert_fails(encode(texts, option, "texts.txt/z.npy", other, "other.npy"), 1, "cannot write texts.txt/z.npy")
    assert not (texts.parent / "other.npy").exists()


def test_deviations_do_not_mix_with_latents(encode: Encode, texts: Path, tmp_path: Path) -> None:
    assert_fails(encode(texts, "--std-out", "-"), 2, "--std-out", "--std-out FILE")
    assert_fails(encode(texts, "--out", "z.npy", "--std-out", "./z.npy"), 2, "--std-out", "--out")
    assert not (tmp_path / "z.npy").exists()


def test_json_lines_hold_exactly_the_same_numbers(encode: Encode, texts: Path, tmp_path: Path) -> None:
    result = encode(texts, "--format", "jsonl")
    records: list[Any] = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(record) for record in records] == [["row", "latent"]] * len(TEXTS)
    assert [record["row"] for record in records] == list(range(len(TEXTS)))
    assert_array_equal(np.array([record["latent"] for record in records], np.float32), latents(encode(texts)))
    assert encode(texts, "--out", "z.jsonl").stdout == "", "by its ending"
    assert (tmp_path / "z.jsonl").read_bytes() == result.stdout_bytes
    assert encode("--format", "jsonl", stdin=b"").stdout == ""


@pytest.mark.parametrize("option", ["--out", "--std-out"])
def test_what_is_read_is_not_replaced(encode: Encode, texts: Path, models: Path, tmp_path: Path, option: str) -> None:
    """By whatever name: directly, through a link, as one of a folder."""
    (tmp_path / "link").symlink_to(texts)
    before = texts.read_bytes()
    others = [] if option == "--out" else ["--out", "z.npy"]
    for source, target in ((texts, texts), (texts, "link"), ("link", texts), (texts.parent, texts)):
        assert_fails(encode(source, option, target, *others), 2, option, "is what is read")
    assert texts.read_bytes() == before
    shutil.copy(models / "line.safetensors", tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    options = (option, "model.safetensors", *others, "--model")
    for name in ("model.safetensors", tmp_path):
        result = CliRunner().invoke(app, ["encode", str(texts), *map(str, options), str(name)])
        assert_fails(result, 2, option, "is what is read")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_latents_come_back_from_json_lines(encode: Encode, texts: Path, models: Path) -> None:
    assert encode(texts, "--format", "jsonl", "--out", "z.jsonl").exit_code == 0
    assert encode(texts, "--out", "z.npy").exit_code == 0
    arguments = ["generate", "--greedy", "--model", str(models / "line.safetensors"), "--latent"]
    written = [CliRunner().invoke(app, [*arguments, name]) for name in ("z.jsonl", "z.npy")]
    assert written[0].exit_code == 0, written[0].stderr
    assert written[0].stdout == written[1].stdout


def test_json_lines_start_before_the_input_ends(models: Path) -> None:
    arguments = ["encode", "--format", "jsonl", "--model", str(models / "line.safetensors")]
    process = subprocess.Popen(
        [sys.executable, "-m", "gptvae_cli", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for text in (b"one", b"two"):
        process.stdin.write(text + b"\n")
        process.stdin.flush()
        assert len(json.loads(process.stdout.readline())["latent"]) == WIDTH
    process.stdin.write(b"three\nfour\n")
    process.stdin.close()
    assert process.stdout.read().count(b"\n") == 2
    process.stdout.close()
    assert process.wait(timeout=60) == 0


def test_only_what_is_in_files_is_there_already(tmp_path: Path, texts: Path) -> None:
    """Texts of pipes are encoded as they come, those of files always with the same others."""
    os.mkfifo(tmp_path / "pipe")
    for names, expected in (((texts, texts), True), ((texts, "pipe"), False), ((texts, "missing"), False)):
        pools = streams.pools(["one"], [str(tmp_path / name) for name in names])
        assert (pools.__name__ == "in_pools") == expected  # type: ignore[attr-defined]
    program = "from gptvae_cli.cli.streams import pools; print(pools([], ['-']).__name__)"
    for command, found in (('"$0" -c "$1" < "$2"', b"in_pools"), ('true | "$0" -c "$1"', b"as_they_come")):
        shell = ["sh", "-c", command, sys.executable, program, str(texts)]
        assert subprocess.run(shell, capture_output=True, check=True).stdout.strip() == found


def test_a_pipe_is_a_whole_file(models: Path, texts: Path, encode: Encode) -> None:
    """Where the number of texts comes first, though nobody knows it yet."""
    arguments = ["encode", "--model", str(models / "line.safetensors"), "--threads", "1"]
    process = subprocess.run(
        [sys.executable, "-m", "gptvae_cli", *arguments], input=texts.read_bytes(), capture_output=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert_allclose(array(process.stdout), latents(encode(texts)), atol=1e-5, rtol=1e-5)


# Model and machine ----------------------------------------------------------------------------------------------------


def test_a_model_is_a_file_or_a_run_or_where_the_environment_says(
    models: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPTVAE_MODEL", raising=False)
    line, paragraph = models / "line.safetensors", models / "paragraph.safetensors"

    def rows(*options: object) -> int:
        return len(latents(CliRunner().invoke(app, ["encode", *map(str, options), str(texts)])))

    assert_fails(CliRunner().invoke(app, ["encode", str(texts)]), 3, "no model in ./gptvae-run", "gptvae train")
    (tmp_path / "gptvae-run").mkdir()
    (tmp_path / "gptvae-run" / "model.safetensors").symlink_to(line)
    assert rows() == 5
    monkeypatch.setenv("GPTVAE_MODEL", str(paragraph))
    assert rows() == 2, "as paragraphs"
    assert rows("--model", "gptvae-run") == rows("--model", line) == 5, "what is asked for comes first"


def test_options_of_the_machine_are_taken(encode: Encode, texts: Path) -> None:
    exact = encode(texts, "--device", "cpu", "--dtype", "float32", "--threads", "1")
    assert_array_equal(latents(exact), latents(encode(texts)))
    rounded = encode(texts, "--device", "cpu", "--dtype", "bfloat16")
    assert "computing on cpu, asked for; in bfloat16" in rounded.stderr
    assert np.abs(latents(rounded) - latents(exact)).max() > 0


def test_latents_in_the_place_of_texts_are_called_so(encode: Encode, texts: Path) -> None:
    assert encode(texts, "--out", "z.npy").exit_code == 0
    assert_fails(encode("z.npy", "--out", "new.npy"), 3, "z.npy holds latents, not texts", "gptvae generate --latent")
    piped = encode("--out", "new.npy", stdin=Path("z.npy").read_bytes())
    assert_fails(piped, 3, "holds latents, not texts", "gptvae generate --latent")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "csv"], ["--format", "csv", "jsonl"]),
        (["--unit", "word"], ["--unit", "word", "paragraph"]),
        (["--device", "tpu"], ["device", "tpu", "cuda"]),
        (["--dtype", "float8"], ["--dtype", "float8", "bfloat16"]),
        (["--threads", "0"], ["--threads", "greater than or equal to 1"]),
        (["--seed", "-1"], ["--seed", "greater than or equal to 0"]),
        (["--out"], ["--out"]),
        (["--samples"], ["--samples", "--sample"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_wrong_option_is_wrong_usage(encode: Encode, texts: Path, options: list[str], words: list[str]) -> None:
    assert_fails(encode(texts, *options), 2, *words, hint=False)
