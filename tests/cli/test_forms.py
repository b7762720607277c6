"""Corpora of every form, and bytes that are not UTF-8, through the commands."""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from typer.testing import CliRunner, Result

from gptvae_cli.cli.app import app
from gptvae_cli.header import read_header
from tests.cli.test_train import NAMES, QUICK, assert_fails

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., Result]


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, in an empty folder, with the tiny line model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTVAE_MODEL", str(models / "line.safetensors"))

    def invoke(*arguments: object, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)

    return invoke


def latents(result: Result) -> list[list[float]]:
    assert result.exit_code == 0, result.stderr
    rows: list[list[float]] = np.load(io.BytesIO(result.stdout_bytes)).tolist()
    return rows


def write_forms(folder: Path, texts: list[str]) -> list[str]:
    """The same texts in files of every form, by their names."""
    plain = "".join(f"{text}\n" for text in texts).encode()
    records = "".join(f'{{"text": "{text}"}}\n' for text in texts).encode()
    pack = zstandard.ZstdCompressor().compress
    files = {
        "lf.txt": plain,
        "crlf.txt": b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"),
        "cr.txt": plain.replace(b"\n", b"\r").removesuffix(b"\r"),
        "a.txt.gz": gzip.compress(plain),
        "b.txt.zst": pack(plain),
        "c.jsonl": records,
        "d.jsonl.gz": gzip.compress(records),
        "e.jsonl.zst": pack(records),
        "g.csv": b"text\n" + b"".join(b'"%b"\n' % text.encode() for text in texts),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    parquet.write_table(pyarrow.table({"text": texts}), folder / "f.parquet")
    return [*files, "f.parquet"]


def test_every_form_of_the_same_texts_has_the_same_latents(run: Run, tmp_path: Path) -> None:
    texts = ["one", "zwei é", "", "三 four"]
    names = write_forms(tmp_path, texts)
    expected = latents(run("encode", stdin="\n".join(texts).encode()))
    assert len({str(row) for row in expected}) == 4
    together = latents(run("encode", *names))
    assert [np.allclose(together[i : i + 4], expected, atol=1e-5) for i in range(0, 40, 4)] == [True] * 10
    assert np.allclose(latents(run("encode", "*.zst")), expected * 2, atol=1e-5)
    assert len(latents(run("encode", "."))) == 36


def test_a_model_learns_from_every_form_and_knows_what_it_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_forms(tmp_path / "data", NAMES)
    (tmp_path / "data" / "last.txt").write_bytes(b"caf\xe9 au lait\n\nna\xefve\n")
    (tmp_path / "valid.txt").write_bytes(b"fa\xe7ade\nplain\n")
    train = ("train", "data", "data/*.zst", "--valid", "valid.txt", "--steps", 2, "--out", "run", *QUICK)
    assert_fails(run(*train), 3, "data/last.txt, line 1: byte 0xe9 is not UTF-8 (byte 4 of the line)", "iconv")
    result = run(*train, "--errors", "replace")
    assert result.exit_code == 0, result.stderr
    assert "3 places are not UTF-8 and became U+FFFD" in result.stderr
    header = read_header(tmp_path / "run" / "model.safetensors")
    assert header.data.errors == "replace"
    assert header.training["corpus"]["texts"] == len(NAMES) * 11 + 2
    assert header.training["corpus"]["empty"] == 1
    assert header.training["corpus"]["replaced"] == 3
    # What was stored is the default of the other commands.
    encoded = run("encode", "valid.txt", "--model", "run")
    assert len(latents(encoded)) == 2
    assert "1 place is not UTF-8" in encoded.stderr
    strict = run("encode", "valid.txt", "--model", "run", "--errors", "strict", "--format", "jsonl")
    assert_fails(strict, 3, "valid.txt, line 1", "0xe7")
    # The same corpus is known again.
    resumed = run("train", "data", "data/*.zst", "--resume", "--steps", 3, "--out", "run")
    assert resumed.exit_code == 0, resumed.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["encode", "bad.txt", "--format", "jsonl"],
        ["generate", "--ref", "bad.txt", "--greedy"],
        ["interpolate", "bad.txt", "bad.txt"],
        ["evaluate", "bad.txt", "good.txt", "--samples", "1"],
    ],
    ids=lambda command: command[0],
)
def test_replaced_bytes_read_as_the_replacement_character(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "good.txt").write_text("one\ntwo\n")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9\0!\n")
    assert_fails(run(*command), 3, "bad.txt, line 1: byte 0xe9 is not UTF-8 (byte 4 of the line)", "--errors replace")
    result = run(*command, "--errors", "replace")
    assert result.exit_code == 0, result.stderr
    count = command.count("bad.txt")
    assert ("1 place is not" if count == 1 else f"{count} places are not") in result.stderr
    assert "not UTF-8" not in run(*command, "--errors", "replace", "--quiet").stderr
    (tmp_path / "bad.txt").write_text("caf\ufffd\0!\n")
    assert run(*command).stdout_bytes == result.stdout_bytes


def test_a_line_of_many_megabytes_is_a_text_like_another(run: Run) -> None:
    """Its latent is that of its beginning, which is all that the model reads."""
    long, short = (latents(run("encode", stdin=b"ab " * length + b"\nx\n")) for length in (3_000_000, 10))
    assert np.allclose(long, short, atol=1e-5)


@pytest.mark.parametrize("command", [["train"], ["encode"], ["evaluate"], ["generate", "--ref"]], ids=" ".join)
def test_a_pattern_without_a_match_is_named(run: Run, command: list[str]) -> None:
    assert_fails(run(*command, "*.txt"), 3, "no file matches *.txt")


def test_a_missing_package_comes_with_the_command_that_installs_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    assert_fails(run("encode", "a.txt.zst"), 1, "needs the package zstandard", "pip install 'gptvae[zstd]'")
