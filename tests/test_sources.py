"""Names to files, and files of every packing to the texts in them."""

from __future__ import annotations

import gzip
import io
import os
import random
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from gptvae_cli.config import Errors, TextConfig, Unit
from gptvae_cli.errors import ConfigError, DataError, ExitCode, GPTVAEError
from gptvae_cli.sources import _Zstd, excerpt, expand
from gptvae_cli.text import Repairs, is_plain, read_texts


def read(*files: Path, repairs: Repairs | None = None, **config: Any) -> list[str]:
    return list(read_texts(list(map(str, files)), TextConfig(**config), repairs=repairs))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of texts, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "c.log", "d/a.txt", "d/e/z.txt", "[x].txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


# Patterns -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("*.txt", ["[x].txt", "a.txt", "b.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[bc].*", ["b.txt", "c.log"]),
        ("**/*.txt", ["[x].txt", "a.txt", "b.txt", "d/a.txt", "d/e/z.txt"]),
        ("*", ["[x].txt", "a.txt", "b.txt", "c.log"]),
        ("d/**", ["d/a.txt", "d/e/z.txt"]),
        ("[x].txt", ["[x].txt"]),
    ],
)
def test_a_pattern_stands_for_files_sorted_unless_a_file_has_that_name(
    tree: Path, pattern: str, files: list[str]
) -> None:
    assert expand([pattern]) == files
    assert expand(["c.log", str(tree / pattern)]) == ["c.log", *(str(tree / file) for file in files)]


@pytest.mark.parametrize("pattern", ["*.csv", "d/*.log", "e?", "d*"])
def test_a_pattern_that_matches_no_file_is_named(tree: Path, pattern: str) -> None:
    with pytest.raises(DataError) as caught:
        read_texts([pattern], TextConfig())
    assert caught.value.message == f"no file matches {pattern}"
    assert caught.value.hint


def test_a_file_called_like_standard_input_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_text("of the file")
    assert expand(["*"]) == ["./-"]
    assert list(read_texts(["*"], TextConfig(), stdin=io.BytesIO(b"of stdin"))) == ["of the file"]


# Packings -------------------------------------------------------------------------------------------------------------


def test_zstandard_is_read_as_the_text_within(tmp_path: Path) -> None:
    path, pack = tmp_path / "corpus.TXT.ZST", zstandard.ZstdCompressor().compress
    path.write_bytes(pack(b"\xef\xbb\xbfa\r\nb\nsec") + pack(b"ond\n"))  # two frames, as `cat a.zst b.zst` gives
    assert read(path) == ["a", "b", "second"]
    path = tmp_path / "corpus.jsonl.zst"
    path.write_bytes(pack(b'{"text": "a"}\n'))
    assert read(path) == ["a"]


def test_every_packing_of_a_text_is_that_text(tmp_path: Path) -> None:
    draw = random.Random(0)
    text = "".join(draw.choices("ab é中😀\n\0", k=300_000)).encode()
    packed = {
        "plain.txt": text,
        "gzip.txt.gz": gzip.compress(text),
        "zstd.txt.zst": zstandard.ZstdCompressor().compress(text),
        "streamed.txt.zst": zstandard.ZstdCompressor().compressobj().compress(b""),
    }
    stream = zstandard.ZstdCompressor(level=1).compressobj()  # of no known size
    packed["streamed.txt.zst"] = stream.compress(text) + stream.flush()
    for name, data in packed.items():
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == text.decode().removesuffix("\n").split("\n")


def test_many_frames_do_not_wait_in_memory() -> None:
    """A log that grows by `zstd >> log.zst` has thousands; all that was read ahead was copied for each of them."""
    pack = zstandard.ZstdCompressor().compress
    frames = [f"line {i}\n".encode() for i in range(2000)]
    stream, found = _Zstd(io.BytesIO(b"".join(map(pack, frames)))), b""
    while piece := stream.read(50):
        found += piece
        assert len(stream._frame.unused_data) <= 2**10
    assert found == b"".join(frames)


def test_standard_input_is_read_once() -> None:
    """The second time it would be empty, which is a text, too."""
    with pytest.raises(ConfigError, match="standard input was named twice"):
        expand(["-", "-"])
    assert expand(["-"]) == ["-"]


@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_a_packed_table_is_not_taken_for_text(tmp_path: Path, errors: Errors) -> None:
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1\n\xff\n"))
    with pytest.raises(DataError, match=r"a\.parquet\.gz is a packed Parquet file"):
        list(read_texts([str(path)], TextConfig(errors=errors)))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda data: b"", "it is empty"),
        (lambda data: b"plain text", "Unknown frame descriptor"),
        (lambda data: data[:-9], "it ends within a frame"),
        (lambda data: data[:3], "it ends within a frame"),
        (lambda data: data + data[:20], "it ends within a frame"),
        (lambda data: data + b"more", "Unknown frame descriptor"),
    ],
    ids=["empty", "plain", "cut", "begun", "second-cut", "followed"],
)
def test_damaged_zstandard_is_bad_input(damage: Callable[[bytes], bytes], found: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.zst"
    path.write_bytes(damage(zstandard.ZstdCompressor().compress(os.urandom(1000).hex().encode())))
    with pytest.raises(DataError, match=rf"corpus\.zst is not Zstandard, or cut or damaged: .*{found}"):
        read(path)


def test_invalid_bytes_of_a_packed_file_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b"a\n\xc3\xa9\xff\n"))
    with pytest.raises(DataError, match=r"corpus\.txt\.zst, line 2: byte 0xff is not UTF-8 \(byte 3 of the line\)"):
        read(path)


# Parquet --------------------------------------------------------------------------------------------------------------

VALUES = ["a\r\nb\n", "", "\ufeff中\0"]
ARRAYS = {
    "string": pyarrow.array(VALUES),
    "large": pyarrow.array(VALUES, pyarrow.large_string()),
    "view": pyarrow.array(VALUES, pyarrow.string_view()),
    "dictionary": pyarrow.array(VALUES).dictionary_encode(),
    "binary": pyarrow.array([value.encode() for value in VALUES]),
    "large-binary": pyarrow.array([value.encode() for value in VALUES], pyarrow.large_binary()),
}


def write_parquet(path: Path, column: Any, name: str = "text", **options: Any) -> Path:
    table = pyarrow.table({"id": pyarrow.array(range(len(column))), name: column})
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_row_is_a_text_whatever_strings_are_stored_as(array: Any, size: int, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", array, row_group_size=size)
    texts = {unit: read(path, unit=unit) for unit in get_args(Unit)}
    assert texts["line"] == ["a b", "", "\ufeff中\0"]
    assert texts["paragraph"] == texts["file"] == ["a\nb", "", "\ufeff中\0"]
    assert texts["window"] == ["a\nb\n\n\n\n\ufeff中\0"]


def test_many_rows_come_in_order(tmp_path: Path) -> None:
    values = [f"text {i}" for i in range(3000)]
    path = write_parquet(tmp_path / "c.parquet", pyarrow.array(values), name="a.b", row_group_size=700)
    assert read(path, field="a.b") == values


@pytest.mark.parametrize(
    ("column", "field", "message"),
    [
        (pyarrow.array(["a"]), "body", "c.parquet has no column 'body'"),
        (pyarrow.array([1]), "text", "c.parquet: the column 'text' is of int64, expected strings"),
        (pyarrow.array([["a"]]), "text", "the column 'text' is of list"),
        (pyarrow.array(["a", None]), "text", "c.parquet, row 2: the column 'text' is null, expected a string"),
    ],
    ids=["missing", "number", "list", "null"],
)
def test_a_column_that_holds_no_texts_is_named(column: Any, field: str, message: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", column)
    with pytest.raises(DataError) as caught:
        read(path, field=field)
    assert message in caught.value.message
    if "no column" in message:
        assert caught.value.hint == "--field names it; this file has 'id', 'text'"


def test_strings_that_are_not_utf8_are_named_or_replaced(tmp_path: Path) -> None:
    """Arrow believes a file that says it holds UTF-8."""
    column = pyarrow.array([b"fine", b"\xc3\xa9a\xff\xe4\xb8"]).view(pyarrow.string())
    path = write_parquet(tmp_path / "c.parquet", column)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message == f"{path}, row 2: byte 0xff is not UTF-8 (byte 4 of the text)"
    assert caught.value.hint == "--errors replace puts U+FFFD there"
    repairs = Repairs()
    assert read(path, errors="replace", repairs=repairs) == ["fine", "éa\ufffd\ufffd"]
    assert repairs.count == 2


def test_damaged_parquet_is_read_or_bad_input_of_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", pyarrow.array([f"text {i}" for i in range(50)]))
    data, draw = path.read_bytes(), random.Random(0)
    damaged = [b"", b"text", data[:-1], data[: len(data) // 2], data[4:]]
    for _ in range(100):
        place = draw.randrange(len(data))
        damaged.append(data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            read(path, errors="replace")
        except DataError as error:
            refused += 1
            assert "c.parquet" in error.message
            assert len(error.message.splitlines()) == 1
    assert refused >= 5


# Extras and folders ---------------------------------------------------------------------------------------------------


def test_an_excerpt_is_of_whole_lines_from_all_files(tmp_path: Path) -> None:
    files = []
    for name, count in (("a", 3000), ("b", 10), ("c", 5000)):
        files.append(str(tmp_path / f"{name}.txt"))
        Path(files[-1]).write_text("".join(f"{name} {i:06} é\n" for i in range(count)))
    lines = [line for file in files for line in Path(file).read_text().splitlines()]
    found = excerpt(files, 20_000).decode().splitlines()
    assert set(found) <= set(lines)
    assert 10_000 < sum(len(line.encode()) + 1 for line in found) <= 20_000
    places = [lines.index(line) for line in found]
    assert places == sorted(places)
    assert max(b - a for a, b in pairwise(places)) < len(lines) / 32
    assert excerpt([files[1]], 10**6).decode().splitlines()[:10] == lines[3000:3010], "small files are read whole"
    (tmp_path / "long.txt").write_bytes(b"x" * 10_000)
    assert len(excerpt([str(tmp_path / "long.txt")], 6400)) == 64 * 101, "a line without end"


@pytest.mark.parametrize("name", ["a.txt", "A.LOG", "b", "c.txt.jsonl.txt"])
def test_text_as_it_is_is_plain(name: str) -> None:
    assert is_plain(name)
    assert not any(
        is_plain(name + end) for end in (".gz", ".zst", ".jsonl", ".csv", ".parquet", ".jsonl.gz", ".CSV.ZST")
    )


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("a.txt.zst", "zstandard", "zstd"), ("b.parquet", "pyarrow", "parquet")]
)
def test_a_missing_package_is_told_before_anything_is_read(
    name: str, package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(GPTVAEError) as caught:
            read_texts(["-", str(source)], TextConfig(), stdin=io.BytesIO(b"a"))
        assert caught.value.message == f"reading {tmp_path / name} needs the package {package}, which is not installed"
        assert caught.value.hint == f"pip install 'gptvae[{extra}]'"
        assert caught.value.exit_code == ExitCode.FAILURE


@pytest.mark.parametrize("beside", ["model.safetensors", "state.safetensors"])
def test_the_log_of_a_run_in_a_folder_is_no_text(tmp_path: Path, beside: str) -> None:
    """Of `gptvae train .`, whose run is `./gptvae-run`. A file of that name elsewhere is the user's."""
    run = tmp_path / "gptvae-run"
    run.mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"text": "mine"}\n')
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "notes.txt").write_text("mine too\n")
    (run / beside).touch()
    assert read(tmp_path) == ["mine too", "mine"]


def test_hidden_files_are_no_texts_unless_they_are_named(tmp_path: Path) -> None:
    """macOS writes a binary `._a.txt` beside `a.txt` on foreign disks."""
    (tmp_path / ".trash").mkdir()
    for name in ("a.txt", "._a.txt", ".trash/b.txt"):
        (tmp_path / name).write_text("text\n")
    assert expand([str(tmp_path)]) == [str(tmp_path / "a.txt")]
    assert expand([str(tmp_path / "._a.txt")]) == [str(tmp_path / "._a.txt")]
    assert expand([str(tmp_path / ".trash")]) == [str(tmp_path / ".trash/b.txt")]


def test_a_folder_gives_every_form_sorted(tmp_path: Path) -> None:
    pack = zstandard.ZstdCompressor().compress
    write_parquet(tmp_path / "3.parquet", pyarrow.array(["c"]))
    (tmp_path / "1.jsonl.zst").write_bytes(pack(b'{"text": "a"}'))
    (tmp_path / "2.txt.zst").write_bytes(pack(b"b"))
    (tmp_path / "4.txt").write_text("d")
    (tmp_path / "5.zst").write_bytes(b"no text by its name")
    assert read(tmp_path) == ["a", "b", "c", "d"]
