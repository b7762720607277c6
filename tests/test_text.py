"""The reading of corpora."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from pyarrow import csv as arrow_csv

from gptvae_cli.config import Errors, TextConfig, Unit
from gptvae_cli.errors import ConfigError, DataError
from gptvae_cli.text import Part, Repairs, read_texts, with_field
from gptvae_cli.tokenizer import pieces


def read(data: bytes, unit: Unit = "line") -> list[str]:
    return list(read_texts([], TextConfig(unit=unit), stdin=io.BytesIO(data)))


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\n\nb\n\n", ["a", "", "b", ""]),
        (b"a\r\nb\rc\n\r\nd\r", ["a", "b", "c", "", "d"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb", ["a", "\ufeffb"]),
        (b"\xef\xbb\xbf", [""]),
        ("a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\0h\n".encode(), ["a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g\0h"]),
        (b" a \t\n", [" a \t"]),
        (b"a" * 10**6 + b"\nb", ["a" * 10**6, "b"]),
    ],
)
def test_only_lf_crlf_and_cr_end_a_line(data: bytes, texts: list[str]) -> None:
    assert read(data) == texts


def test_line_ends_are_found_at_every_place_of_the_buffer() -> None:
    """A CRLF or a character of several bytes may lie across the edge of what is read at once."""
    for length in range(8180, 8200):
        line = "a" * length + "é"
        assert read(f"{line}\r\n中\r\n".encode()) == [line, "中"]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"", []),
        (b"\n\n \n", []),
        (b"a\nb\n\nc", ["a\nb", "c"]),
        (b"\n\na\r\nb\r\n \t\r\n\r\nc\n\n", ["a\nb", "c"]),
        (" a\n\u3000\nb ".encode(), [" a", "b "]),
    ],
)
def test_paragraphs_lie_between_blank_lines(data: bytes, texts: list[str]) -> None:
    assert read(data, "paragraph") == texts


@pytest.mark.parametrize("unit", ["file", "window"])
def test_a_file_is_one_text_without_mark_cr_and_final_newline(unit: Unit, tmp_path: Path) -> None:
    contents = [b"\xef\xbb\xbfa\r\n\r\nb\r\n\r\n", b"", b"c"]
    files = []
    for number, content in enumerate(contents):
        files.append(str(tmp_path / f"{number}"))
        Path(files[-1]).write_bytes(content)
    assert list(read_texts(files, TextConfig(unit=unit))) == ["a\n\nb\n", "", "c"]


def test_sources_are_read_in_order_and_a_dash_is_stdin(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("1\n2")
    (tmp_path / "b").write_text("3\n")
    stdin = io.BytesIO(b"x\ny")
    sources = [str(tmp_path / "b"), "-", str(tmp_path / "a.log")]
    assert list(read_texts(sources, TextConfig(), stdin=stdin)) == ["3", "x", "y", "1", "2"]
    assert not stdin.closed


def test_stdin_is_the_process_own_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb")))
    assert list(read_texts([], TextConfig())) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="stdin: it is closed"):
        read_texts(["-"], TextConfig())


def test_lines_of_a_pipe_are_there_before_its_end() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as stdin, os.fdopen(writer, "wb", buffering=0) as pipe:
        pipe.write(b"first\nsec")
        texts = read_texts([], TextConfig(), stdin=stdin)
        assert next(texts) == "first"
        pipe.write(b"ond\n")
        assert next(texts) == "second"
        pipe.close()
        assert list(texts) == []


def test_reading_lines_takes_constant_memory() -> None:
    """100 MB of lines under a limit of address space that does not hold them."""
    program = """
import io, resource, sys
from gptvae_cli.config import TextConfig
from gptvae_cli.text import read_texts

class Endless(io.RawIOBase):
    left = 100 * 2**20
    def readable(self): return True
    def readinto(self, into):
        count = min(len(into), self.left)
        into[:count] = (b"a" * 1023 + b"\\n")[:count] * (count // 1024) + b"b" * (count % 1024)
        self.left -= count
        return count

resource.setrlimit(resource.RLIMIT_AS, (80 * 2**20, 80 * 2**20))
stdin = io.BufferedReader(Endless(), 65536)
print(sum(len(text) for text in read_texts([], TextConfig(), stdin=stdin)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", f"{100 * 1024 * 1023}\n")


def test_a_folder_gives_its_texts_sorted_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("3")
    (tmp_path / "B.TXT").write_text("1")
    (tmp_path / "a.jsonl").write_text('{"text": "2"}')
    (tmp_path / "sub" / "deep" / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "5"}'))
    (tmp_path / "sub" / "a.txt.gz").write_bytes(gzip.compress(b"4"))
    (tmp_path / "notes.md").write_text("no")
    (tmp_path / "data.gz").write_bytes(b"no")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    assert list(read_texts([str(tmp_path)], TextConfig())) == ["1", "2", "3", "4", "5"]


def test_what_a_link_in_a_folder_no_longer_leads_to_is_told(tmp_path: Path) -> None:
    """A disk that is not mounted would otherwise be texts fewer."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("nowhere/b.txt")
    with pytest.raises(DataError, match=r"cannot read .*b\.txt: No such file"):
        list(read_texts([str(tmp_path)], TextConfig()))


def test_missing_sources_are_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.txt: No such file"):
        read_texts(["-", str(tmp_path / "none.txt")], TextConfig(), stdin=io.BytesIO(b"a"))
    with pytest.raises(DataError, match="no texts in the folder") as caught:
        read_texts([str(tmp_path)], TextConfig())
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        list(read_texts([str(tmp_path / "a.txt")], TextConfig()))
    (tmp_path / "sub").mkdir(mode=0)
    with pytest.raises(DataError, match="Permission denied"):
        read_texts([str(tmp_path)], TextConfig())
    (tmp_path / "sub").chmod(0o700)


@pytest.mark.parametrize("unit", get_args(Unit))
@pytest.mark.parametrize(
    ("data", "line", "byte"),
    [
        (b"\xff", 1, 0xFF),
        (b"a\nb\nc\xff\n", 3, 0xFF),
        (b"a\r\nb\rcaf\xe9", 3, 0xE9),
        (b"a\n" * 9000 + b"\x80", 9001, 0x80),
        (b"a\n\xed\xa0\x80", 2, 0xED),
        (b"a\n\xc0\x80", 2, 0xC0),
        (b"a\n\xe4\xb8", 2, 0xE4),
        (b"\xef\xbb", 1, 0xEF),
    ],
)
def test_bytes_that_are_not_utf8_are_named(unit: Unit, data: bytes, line: int, byte: int, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"corpus\.txt, line {line}: byte 0x{byte:02x} is not UTF-8") as caught:
        list(read_texts([str(path)], TextConfig(unit=unit)))
    assert (caught.value.hint and "iconv -f latin1" in caught.value.hint) or line == 1


@pytest.mark.parametrize("unit", get_args(Unit))
def test_a_document_is_not_taken_for_text_in_another_encoding(unit: Unit, tmp_path: Path) -> None:
    """As of a word processor, which is an archive, or a PDF."""
    archive, pdf = tmp_path / "poems.docx", tmp_path / "poems.pdf"
    with ZipFile(archive, "w", ZIP_DEFLATED) as document:
        document.writestr("word/document.xml", "<w:t>shall I compare thee</w:t>" * 100)
    pdf.write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n")
    for path in (archive, pdf):
        with pytest.raises(DataError, match="is not UTF-8") as caught:
            list(read_texts([str(path)], TextConfig(unit=unit)))
        assert caught.value.hint is not None
        assert caught.value.hint.startswith("convert it, e.g. pandoc -t plain or pdftotext")


def split(text: str) -> list[str]:
    """The lines of a text, by another way than the reader's."""
    lines = re.split("\r\n|\r|\n", text.removeprefix("\ufeff"))
    return lines[:-1] if lines[-1] == "" else lines


def spoilt() -> Iterator[bytes]:
    """A text with bytes that are not UTF-8 at every place: within characters, line ends and the mark, at the edges
    of the file and, with a long line in front, of what is read at once."""
    text = "\ufeffé\r\n中\r😀\0\n\ufffdz".encode()
    for bad in (b"\xff", b"\x80", b"\xc3", b"\xe4\xb8", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5"):
        for place in range(len(text) + 1):
            yield text[:place] + bad + text[place:]
    for length in (*range(8180, 8196), *range(65_528, 65_540)):
        yield b"a" * length + "é\r\n中".encode() + b"\xf0\x9f\x98"


def test_bytes_that_are_not_utf8_are_where_pythons_decoder_finds_them() -> None:
    for data in spoilt():
        with pytest.raises(UnicodeDecodeError) as reference:
            data.decode("utf-8")
        before = data[: reference.value.start]
        lines = re.split(rb"\r\n|\r|\n", before)
        for unit in get_args(Unit):
            with pytest.raises(DataError) as caught:
                read(data, unit)
            assert caught.value.message == (
                f"stdin, line {len(lines)}: byte 0x{data[len(before)]:02x} is not UTF-8"
                f" (byte {len(lines[-1]) + 1} of the line)"
            )


def test_replacing_gives_what_pythons_decoder_gives_and_counts_it() -> None:
    for data in spoilt():
        text, repairs = data.decode("utf-8", "replace"), Repairs()
        texts = read_texts([], TextConfig(errors="replace"), repairs=repairs, stdin=io.BytesIO(data))
        assert list(texts) == split(text)
        assert repairs.count == text.count("\ufffd") - data.count("\ufffd".encode()) > 0
        whole = Repairs()
        texts = read_texts([], TextConfig(unit="file", errors="replace"), repairs=whole, stdin=io.BytesIO(data))
        assert list(texts) == ["\n".join(split(text))]
        assert whole == repairs


def test_repairs_are_told_only_where_there_were_some() -> None:
    assert Repairs().note is None
    assert Repairs(1).note == "1 place is not UTF-8 and became U+FFFD"
    assert Repairs(1000).note == "1,000 places are not UTF-8 and became U+FFFD"


def test_the_second_of_two_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\nb\xc3")
    (tmp_path / "b.txt").write_bytes(b"\xa9\n")
    (tmp_path / "c.txt").write_bytes(b"c\n")
    b, c = (str(tmp_path / name) for name in ("b.txt", "c.txt"))
    with pytest.raises(DataError, match=r"b\.txt, line 1: byte 0xa9"):
        list(read_texts([c, b], TextConfig()))
    texts = read_texts([str(tmp_path)], TextConfig(errors="replace"))
    assert list(texts) == ["a", "b\ufffd", "\ufffd", "c"], "two files do not make a character"


LONG = {
    "lines": "".join(f"{i} {'é中😀'[i % 3] * (i % 90)}\r\n" for i in range(5000)) + "\n",
    "words": "the cat sat on the mat " * 10_000,
    "one word": "x" * 200_000 + "\n",
    "as long as a part": "y" * 2**16 + "\n",
    "a character longer": "y" * (2**16 + 1) + "\n",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_running_text_comes_in_the_parts_that_it_is_tokenised_in(tmp_path: Path, text: str, ending: str) -> None:
    """Each but the last says that more follows; and a text that is empty is one."""
    files = [tmp_path / f"{name}.{ending}" for name in ("long", "empty", "short")]
    whole = text.replace("\r\n", "\n").removesuffix("\n")
    for file, data in zip(files, (text, "", "short"), strict=True):
        # Of records there may be many; here it is lines.
        records = (json.dumps({"text": line}) + "\n" for line in data.splitlines(keepends=True))
        file.write_bytes((data if ending == "txt" else "".join(records)).encode())
    if ending == "jsonl":
        whole = "\n\n".join(whole.split("\n"))
    names = list(map(str, files))
    parts = list(read_texts(names, TextConfig(unit="window")))
    assert parts == [*pieces(whole), "", "short"]
    assert "".join(parts[:-2]) == whole
    assert [type(part) for part in parts] == [Part] * (len(parts) - 3) + [str] * 3
    if ending == "txt":
        files_whole = list(read_texts(names, TextConfig(unit="file")))
        assert files_whole == [whole, "", "short"], "only windows have parts"


@pytest.mark.parametrize("packing", [gzip, lzma, bz2], ids=lambda module: str(module.__name__))
@pytest.mark.parametrize("errors", ["strict", "replace"])
def test_a_packed_file_under_another_name_is_told_from_text(tmp_path: Path, packing: Any, errors: Errors) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(packing.compress("".join(f"{i} times, {i * i} in all\n" for i in range(999)).encode()))
    with pytest.raises(DataError, match="is packed, by its first bytes") as caught:
        list(read_texts([str(file)], TextConfig(errors=errors)))
    command = str(caught.value.hint).partition(" -dc <")[0].removeprefix("unpack it: ")
    assert command == {"gzip": "gzip", "lzma": "xz", "bz2": "bzip2"}[packing.__name__]
    file.write_bytes(b"BZh, a text \xff\n")
    assert list(read_texts([str(file)], TextConfig(errors="replace"))) == ["BZh, a text \ufffd"]


@pytest.mark.parametrize("name", ["a.ndjson", "a.tsv", "a.JSONL"])
def test_records_have_other_endings_too(tmp_path: Path, name: str) -> None:
    records = "text\tmore\none\t1\ntwo\t2\n" if name == "a.tsv" else '{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_text(records)
    assert list(read_texts([str(tmp_path / name)], TextConfig())) == ["one", "two"]


def test_a_field_is_of_records(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.csv.gz"):
        (tmp_path / name).touch()
    names = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv.gz")]
    for sources in (names, names[1:], names[2:]):
        assert with_field(sources, "review") == sources
    with pytest.raises(ConfigError, match=r"--field review .* and .*a\.txt is plain text"):
        with_field(names[:1], "review")


@pytest.mark.parametrize("sources", [[], ["-"]])
def test_standard_input_is_json_lines_where_a_field_is_named(sources: list[str], tmp_path: Path) -> None:
    lines = b'{"review": "one\\ntwo", "text": 3}\n\n{"review": ""}\n'
    read = with_field(sources, "review")
    config = TextConfig(field="review", unit="paragraph")
    assert list(read_texts(read, config, stdin=io.BytesIO(lines))) == ["one\ntwo", ""]
    with pytest.raises(DataError, match="stdin, line 1 is not JSON"):
        list(read_texts(read, config, stdin=io.BytesIO(b"plain\n")))
    (tmp_path / "-.jsonl").write_text('{"review": "a file"}\n')
    assert list(read_texts([str(tmp_path)], config)) == ["a file"]


@pytest.mark.parametrize(
    ("line", "noted"),
    [
        ('{"text": "one"}', True),
        ('{"text": 1}', False),
        ('{"other": "one"}', False),
        ("{text}", False),
        ('["text"]', False),
        ("{" * 5000, False),
        ("", False),
    ],
)
def test_json_lines_that_are_read_as_they_stand_are_told_of(line: str, noted: bool, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"{line}\nsecond\n")
    for source, name in (("-", "stdin"), (str(tmp_path / "a"), str(tmp_path / "a"))):
        repairs = Repairs()
        stdin = io.BytesIO(f"{line}\nsecond\n".encode())
        assert list(read_texts([source], TextConfig(), repairs=repairs, stdin=stdin)) == [line, "second"]
        note = f"{name} looks like JSON lines and was read as plain text, see --field"
        assert repairs.note == (note if noted else None)


@pytest.mark.parametrize("unit", get_args(Unit))
def test_every_character_but_line_ends_is_text(unit: Unit) -> None:
    text = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x200B, 0x2028, 0x202E, 0xFEFF, 0xFFFF]))
    text = "a" + text.replace("\n", "").replace("\r", "")
    assert read(text.encode() * 2, unit) == [text * 2]


def test_lines_before_an_invalid_byte_are_texts() -> None:
    texts = read_texts([], TextConfig(), stdin=io.BytesIO(b"a\nb\n\xff"))
    assert [next(texts), next(texts)] == ["a", "b"]
    with pytest.raises(DataError, match=r"^stdin, line 3: byte 0xff"):
        next(texts)


def test_utf16_gets_its_own_hint() -> None:
    with pytest.raises(DataError) as caught:
        read("text\n".encode("utf-16"))
    assert caught.value.hint and "utf-16" in caught.value.hint


def read_jsonl(tmp_path: Path, data: str, unit: Unit = "line", field: str = "text") -> list[str]:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(data.encode())
    return list(read_texts([str(path)], TextConfig(unit=unit, field=field)))


RECORDS = (
    '\ufeff{"text": "a\\r\\nb\\n\\nc\\n", "id": 1}\r\n\n  \n{"id": 2, "text": ""}\n{"text": "\\u2028\\ud83d\\ude00"}'
)


@pytest.mark.parametrize(
    ("unit", "texts"),
    [
        ("line", ["a b  c", "", "\u2028😀"]),
        ("paragraph", ["a\nb\n\nc", "", "\u2028😀"]),
        ("file", ["a\nb\n\nc", "", "\u2028😀"]),
        ("window", ["a\nb\n\nc\n\n\n\n\u2028😀"]),
    ],
)
def test_a_record_is_a_text_of_every_unit_but_window(unit: Unit, texts: list[str], tmp_path: Path) -> None:
    assert read_jsonl(tmp_path, RECORDS, unit) == texts


def test_another_field_and_a_packed_file(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path, '{"body": "a", "text": 1}', field="body") == ["a"]
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert list(read_texts([str(path)], TextConfig())) == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ("[1]", "is a list, expected an object"),
        ("3", "is a number, expected an object"),
        ('{"text": 3}', "the field 'text' is a number, expected a string"),
        ('{"text": null}', "the field 'text' is null"),
        ('{"text": true}', "the field 'text' is true or false"),
        ('{"text": {}}', "the field 'text' is an object"),
        ('{"body": "a"}', "has no field 'text'"),
        ('{"text": "a"', "is not JSON: .* at column 13"),
        ("plain", "is not JSON"),
        ("[" * 100_000, "is not JSON that can be read"),
        ('{"text": ' + "1" * 5000 + "}", "is not JSON that can be read"),
        ('{"text": "\\ud800"}', r"\\ud800 is a lone surrogate"),
    ],
)
def test_a_broken_record_is_named_with_its_line(record: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"corpus\.jsonl, line 2:? {found}") as caught:
        read_jsonl(tmp_path, f'{{"text": "fine"}}\n{record}\n')
    assert len(caught.value.message.splitlines()) == 1


def test_half_a_surrogate_pair_is_named_or_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "\\ud83d\\ude00 ab\\ude00\\ud83dc"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 1: \\ude00 is a lone .* \(character 5 of the text\)") as caught:
        list(read_texts([str(path)], TextConfig()))
    assert caught.value.hint == "--errors replace puts U+FFFD there"
    repairs = Repairs()
    texts = read_texts([str(path)], TextConfig(errors="replace"), repairs=repairs)
    assert list(texts) == ["😀 ab\ufffd\ufffdc", "\ufffd"]
    assert repairs.count == 3


def test_a_missing_field_comes_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_jsonl(tmp_path, '{"id": 1, "body\\u001b": ""}')
    assert caught.value.hint == "--field names it; this line has 'id', 'body\\x1b'"


def read_csv(tmp_path: Path, data: str | bytes, *, repairs: Repairs | None = None, **config: Any) -> list[str]:
    path = tmp_path / "corpus.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_texts([str(path)], TextConfig(**config), repairs=repairs))


CELLS = ["plain", 'a "word", quoted', "two\nlines", "", " spaces ", "semi;colon\tand tab", "\u2028😀", '"', "'", "last"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_is_read_as_arrow_reads_it(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL)
        writer.writerows([["id", "review", "stars"], *([i, cell, 5] for i, cell in enumerate(CELLS))])
    form = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    expected = arrow_csv.read_csv(path, parse_options=form)["review"].to_pylist()
    assert list(read_texts([str(path)], TextConfig(unit="file", field="review"))) == expected == CELLS
    one_line = [cell.replace("\n", " ") for cell in CELLS]
    assert list(read_texts([str(path)], TextConfig(field="review"))) == one_line
    packed = tmp_path / "d.csv.GZ"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_texts([str(packed)], TextConfig(field="review"))) == one_line


def test_blank_lines_of_csv_are_no_rows_and_an_empty_file_has_none(tmp_path: Path) -> None:
    assert read_csv(tmp_path, 'text\r\n\r\na\r\n"b\r\n\r\nc"\r\n\r\n', unit="paragraph") == ["a", "b\n\nc"]
    assert read_csv(tmp_path, "") == []
    assert read_csv(tmp_path, "id,text") == []


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("id,body\n1,a", r"corpus\.csv has no column 'text'"),
        ("id,text\n1,a\n\n2", r"corpus\.csv, line 4 has 1 cells, the first line has 2"),
        ("text\nyes, and no", r"corpus\.csv, line 2 has 2 cells, the first line has 1"),
        ('id,text\n1,"a\nb"\n2,"c"d\n', r"corpus\.csv, line 4 is not CSV: "),
        ('id,text\n1,"a\nb\nc', r"corpus\.csv, line 2 is not CSV: unexpected end of data"),
        ('id,text\n1,"' + "a\n" * (2**23 + 1), r"corpus\.csv, line 2 is not CSV: field larger than"),
        (b"id,text\n1,\xff", r"corpus\.csv, line 2: byte 0xff is not UTF-8 \(byte 3 of the line\)"),
    ],
)
def test_what_is_not_csv_is_named_with_its_line(data: str | bytes, found: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=found) as caught:
        read_csv(tmp_path, data)
    assert caught.value.hint and len(caught.value.message.splitlines()) == 1


def test_bytes_that_are_not_utf8_are_replaced_in_csv_too(tmp_path: Path) -> None:
    repairs = Repairs()
    assert read_csv(tmp_path, b"text\n\xff", errors="replace", repairs=repairs) == ["\ufffd"]
    assert repairs.count == 1


def test_gzip_is_read_as_the_text_within(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfa\r\nb\n"))
    assert list(read_texts([str(path)], TextConfig())) == ["a", "b"]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"plain text", lambda data: data[:-9], lambda data: data + b"more"],
    ids=["empty", "plain", "cut", "followed"],
)
def test_damaged_gzip_is_bad_input(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "corpus.gz"
    path.write_bytes(damage(gzip.compress(os.urandom(1000).hex().encode())))
    with pytest.raises(DataError, match=r"corpus\.gz is not gzip, or cut or damaged"):
        list(read_texts([str(path)], TextConfig()))


def test_gzip_with_any_byte_flipped_is_read_or_bad_input(tmp_path: Path) -> None:
    path, data = tmp_path / "corpus.gz", gzip.compress(b"some text\nand more of it\n" * 3, mtime=0)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            assert list(read_texts([str(path)], TextConfig()))
        except DataError as error:
            assert "corpus.gz" in error.message


def test_reading_may_stop_early(tmp_path: Path) -> None:
    """`head` does; nothing may be left open (warnings are errors here) and stdin not be closed."""
    path, stdin = tmp_path / "a.txt", io.BytesIO(b"a\n\nb\n\nc")
    path.write_text("a\n\nb\n\nc")
    units: list[Unit] = ["line", "paragraph"]
    for unit in units:
        assert next(read_texts([str(path)], TextConfig(unit=unit))) == "a"
        stdin.seek(0)
        assert next(read_texts([], TextConfig(unit=unit), stdin=stdin)) == "a"
        assert not stdin.closed
