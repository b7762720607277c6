"""The reading of texts: what a text is in files of any form, and what becomes of bytes that are not UTF-8.

Nothing here loads torch or numpy.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import BinaryIO, TextIO

from gptvae_cli.config import TextConfig, Unit
from gptvae_cli.errors import ConfigError, DataError
from gptvae_cli.sources import STDIN, STDIN_RECORDS, ending, expand, is_packed, is_stdin, opened, reading_errors
from gptvae_cli.tokenizer import PIECE_CHARS, SURROGATE, pieces

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_PACKED = {
    "gzip": re.compile("\x1f\udc8b"),
    "xz": re.compile("\udcfd7zXZ"),
    "bzip2": re.compile("BZh[1-9]1AY&SY"),
    "zstd": re.compile(r"\(\udcb5/\udcfd"),
}
"""The first bytes of what these programs pack."""
_BINARY = re.compile("[\0-\x08\x0e-\x1a\x1c-\x1f]|^%[\udc80-\udcff]{4}", re.MULTILINE)
"""What no text in another encoding has, but .docx, .epub and other archives; and the second line of a .pdf."""
_STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
"""Arrow's types that may hold text; files of some programs do not say that their bytes are strings."""
_PARQUET_ROWS, _PARQUET_BUFFER = 64, 2**20
"""How many rows, and how many bytes of a column, are taken from a Parquet file at a time."""
_PLAIN = "plain lines go through stdin: < FILE"
_LONGEST_CELL = 2**24
"""Characters of a cell of CSV: a quote that nothing closes would take in all that follows."""


class Part(str):
    """A piece of a running text, whose rest follows."""

    __slots__ = ()


@dataclass
class Repairs:
    """Counts the U+FFFD that were put in the place of what is not valid Unicode; and what was read as it stands, though
    it looks like JSON lines."""

    count: int = 0
    records: str | None = None

    @property
    def note(self) -> str | None:
        """What people should know about the texts so far."""
        notes = []
        if self.records is not None:
            notes.append(f"{self.records} looks like JSON lines and was read as plain text, see --field")
        if self.count > 0:
            places = "1 place is" if self.count == 1 else f"{self.count:,} places are"
            notes.append(f"{places} not UTF-8 and became U+FFFD")
        return "; ".join(notes) or None


def read_texts(
    sources: Sequence[str],
    config: TextConfig,
    *,
    repairs: Repairs | None = None,
    stdin: BinaryIO | None = None,
    labels: bool = False,
) -> Iterator[str]:
    r"""The texts of files, folders, patterns and stdin, in order; see `sources.expand` for what a name stands for.

    A file is UTF-8 text whatever its ending, except `.jsonl` and `.ndjson` (one JSON object a line), `.csv` and `.tsv`
    (whose first row names the columns), `.parquet`, and `.gz` and `.zst` around all but the last. LF, CRLF and CR end a
    line and nothing else does; they are LF within a text. A byte order mark at the start of a file and its last line
    end are not text; every other character is, NUL included.

    - `line`: an empty line is an empty text.
    - `paragraph`: lines between blank ones, joined by LF; a line of only whitespace is blank.
    - `file`: one text a file.
    - `window`: the same, in the pieces that `tokenizer.pieces` cuts it into, all but the last a `Part`; crops of it
      are the consumer's business.

    A record of a `.jsonl` file or a row of a `.csv` or `.parquet` file is one text. With `line`, line breaks within it
    become a space; with `window`, the records of a file are joined into one text with a blank line between them. Blank
    lines are no records.

    Memory holds one line, paragraph, record or part at a time, or one file.

    Args:
        sources: names, or `-` for stdin, `-.jsonl` where its lines are JSON; none is stdin.
        config: what a text is. With errors of `replace` there is U+FFFD where bytes are not UTF-8, as `bytes.decode`
            puts it, and where a JSON string holds half of a surrogate pair.
        repairs: counts these.
        stdin: stands for standard input; None is the process's own.
        labels: these are no texts, but labels of texts: in JSON and Parquet they may be whole numbers and truth values,
            which count as JSON writes them, and null, which is an empty one.

    Raises:
        DataError: at once for a source that is missing or stands for no file; while reading for one that cannot be
            read, is damaged, is not UTF-8 (naming line and byte), not valid JSON or CSV, or lacks the field.
        GPTVAEError: at once for a file that needs a package which is not installed.
    """
    files = expand(sources or [STDIN])
    if stdin is None and any(map(is_stdin, files)):
        stdin = getattr(sys.stdin, "buffer", None)
        if stdin is None:
            raise DataError("cannot read stdin: it is closed", hint="name a file")
    form = _Form(config, Repairs() if repairs is None else repairs, labels)
    return chain.from_iterable(_read_file(file, form, stdin) for file in files)


def is_plain(file: str) -> bool:
    """Whether a file's bytes are its texts: it is neither packed nor made of records."""
    return not is_packed(file) and not _has_fields(file)


def _has_fields(file: str) -> bool:
    return ending(file, unpacked=True) in (*_RECORDS, ".parquet")


def with_field(sources: Sequence[str], field: str, option: str = "--field") -> list[str]:
    """The sources of texts that are named by a field; standard input is then JSON lines.

    Keeps texts from being read as they stand, where nothing that is read has fields.

    Raises:
        ConfigError: where none of the sources has.
        DataError: for a source that is missing.
    """
    read = [STDIN_RECORDS if source == STDIN else source for source in sources or [STDIN]]
    files = expand(read)
    if not any(map(_has_fields, files)):
        raise ConfigError(
            f"{option} {field} is for files that end in {', '.join(_RECORDS)} or .parquet, and"
            f" {', '.join(files[:3])} is plain text",
            hint="name it so, or pipe JSON lines: gptvae ... - < FILE",
        )
    return read


@dataclass(frozen=True)
class _Form:
    """How texts are to be read; the arguments of `read_texts`."""

    config: TextConfig
    repairs: Repairs
    labels: bool

    def replaced(self, text: str) -> str:
        """A text whose bytes that are not UTF-8 arrive as lone surrogates, decoded with U+FFFD."""
        repaired = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        self.repairs.count += repaired.count("\ufffd") - text.count("\ufffd")
        return repaired


def _read_file(file: str, form: _Form, stdin: BinaryIO | None) -> Iterator[str]:
    name = "stdin" if is_stdin(file) else file
    with reading_errors(name):
        if ending(file, unpacked=True) == ".parquet":
            if is_packed(file):
                raise DataError(f"{file} is a packed Parquet file, which is not read", hint="unpack it first")
            yield from _of_records(_rows(file, form), form)
            return
        with _decoded(file, stdin) as stream:
            records = _RECORDS.get(ending(file, unpacked=True))
            if records is not None:
                yield from _of_records(records(_lines(stream, name, form), name, form), form)
            elif form.config.unit == "line":
                yield from _noting_records(_lines(stream, name, form), name, form)
            elif form.config.unit == "paragraph":
                yield from _paragraphs(_lines(stream, name, form))
            else:
                yield from _whole(_chunks(stream, name, form), form)


@contextmanager
def _decoded(file: str, stdin: BinaryIO | None) -> Iterator[TextIO]:
    with opened(file, stdin) as stream:
        # Invalid bytes are let through as lone surrogates, which `_valid` finds: a strict decoder fails a whole
        # buffer at once, and the lines before the bad one would be lost with their count.
        text = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline=None)  # type: ignore[type-var]
        try:
            yield text
        finally:
            text.detach()  # or it would close stdin, which is not ours


# Whole files ----------------------------------------------------------------------------------------------------------


def _chunks(stream: TextIO, name: str, form: _Form) -> Iterator[str]:
    """What a file holds, in pieces of any length."""
    line, column = 1, 0  # where a chunk begins
    last = ""  # its line end, which is not text at the end of a file
    while chunk := stream.read(PIECE_CHARS):
        while _ESCAPED_BYTE.match(chunk[-1]) and (more := stream.read(PIECE_CHARS)):
            chunk += more  # bytes that are one U+FFFD together stay together
        valid = _valid(chunk, name, line, form, column)
        if (line, column) == (1, 0):
            valid = valid.removeprefix("\ufeff")
        yield last + valid.removesuffix("\n")
        last = "\n" if valid.endswith("\n") else ""
        column = _bytes(chunk.rpartition("\n")[2]) + (0 if "\n" in chunk else column)
        line += chunk.count("\n")


def _whole(chunks: Iterator[str], form: _Form) -> Iterator[str]:
    """One text of all chunks, or, of a running one, its parts."""
    if form.config.unit != "window":
        yield "".join(chunks)
        return
    rest = ""
    for chunk in chunks:
        rest += chunk
        if len(rest) > PIECE_CHARS:
            *parts, rest = pieces(rest)
            yield from map(Part, parts)
    yield rest


# Lines ----------------------------------------------------------------------------------------------------------------


def _lines(stream: TextIO, name: str, form: _Form) -> Iterator[str]:
    """Lines without their ends. Iterating a stream splits at LF, CRLF and CR only, `str.splitlines` at more."""
    for number, line in enumerate(stream, 1):
        line = _valid(line, name, number, form)
        if number == 1:
            line = line.removeprefix("\ufeff")
        yield line.removesuffix("\n")


def _noting_records(lines: Iterator[str], name: str, form: _Form) -> Iterator[str]:
    """The same lines; takes note where the first one is an object of JSON that has the field of a text."""
    for first in lines:
        with suppress(ValueError, RecursionError):
            if first.startswith("{") and isinstance(json.loads(first).get(form.config.field), str):
                form.repairs.records = name
        yield first
        break
    yield from lines


def _valid(text: str, name: str, number: int | None, form: _Form, column: int = 0) -> str:
    """What begins at byte `column` of line `number` of a file, or the text of a row, without bytes that are not UTF-8.

    Raises:
        DataError: for errors of `strict` and the first such byte, with its place in its line or text.
    """
    if text.isascii() or not (escaped := _ESCAPED_BYTE.search(text)):
        return text
    first = (number, column) == (1, 0)
    if first and (program := next((program for program, begins in _PACKED.items() if begins.match(text)), None)):
        raise DataError(f"{name} is packed, by its first bytes", hint=f"{program} -dc < FILE | gptvae ...")
    if form.config.errors == "replace":
        return form.replaced(text)
    what = f"byte 0x{ord(escaped[0]) - 0xDC00:02x} is not UTF-8"
    before, hint = text[: escaped.start()], "--errors replace puts U+FFFD there"
    if number is None:
        raise DataError(f"{name}: {what} (byte {_bytes(before) + 1} of the text)", hint=hint)
    if first and text.startswith("\udc93NUMPY"):
        raise DataError(f"{name} holds latents, not texts", hint="gptvae generate --latent reads them")
    number += before.count("\n")
    line = before.rpartition("\n")[2]
    column = _bytes(line) + 1 + (0 if "\n" in before else column)
    encoding = "utf-16" if first and text[0] in "\udcfe\udcff" else "latin1"
    convert = f"iconv -f {encoding} -t utf-8 < OLD > NEW"
    if encoding == "latin1" and _BINARY.search(text):
        convert = "pandoc -t plain or pdftotext, if it is a document"
    raise DataError(
        f"{name}, line {number}: {what} (byte {column} of the line)", hint=f"convert it, e.g. {convert}; {hint}"
    )


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line and not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


# Records --------------------------------------------------------------------------------------------------------------


def with_line_feeds(text: str) -> str:
    """The same text, in which LF alone ends a line."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def of_unit(text: str, unit: Unit) -> str:
    """A text that was no file's, such as a record or an argument, with the line ends that a file's would have."""
    text = with_line_feeds(text).removesuffix("\n")
    return text.replace("\n", " ") if unit == "line" else text


def _of_records(records: Iterator[str], form: _Form) -> Iterator[str]:
    """Texts of a unit."""
    texts = (of_unit(record, form.config.unit) for record in records)
    if form.config.unit == "window":
        joined = chain.from_iterable(("\n\n", text) for text in texts)
        yield from _whole(islice(joined, 1, None), form)  # without the first blank line
    else:
        yield from texts


def _records(lines: Iterator[str], name: str, form: _Form) -> Iterator[str]:
    """The field of every line of JSON."""
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        place = f"{name}, line {number}"
        text = _record_text(line, place, form)
        if surrogate := SURROGATE.search(text):
            if form.config.errors == "strict":
                raise DataError(
                    f"{place}: \\u{ord(surrogate[0]):04x} is a lone surrogate, half of a character"
                    f" (character {surrogate.start() + 1} of the text)",
                    hint="--errors replace puts U+FFFD there",
                )
            text, count = SURROGATE.subn("\ufffd", text)
            form.repairs.count += count
        yield text


_OTHERS = "to leave such records out: jq -rR 'fromjson? | .{field} | strings' FILE | gptvae ..."


def _record_text(line: str, place: str, form: _Form) -> str:
    field = form.config.field
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place} is not JSON: {error.msg} at column {error.colno}", hint=_OTHERS.format(field=field)
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting
        raise DataError(f"{place} is not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} is {_json_type(record)}, expected an object with the field {field!r}")
    if field not in record:
        raise DataError(f"{place} has no field {field!r}", hint=f"--field names it; this line has {_some(record)}")
    text = record[field]
    if form.labels and (text is None or isinstance(text, int)):
        text = "" if text is None else json.dumps(text)
    if not isinstance(text, str):
        raise DataError(
            f"{place}: the field {field!r} is {_json_type(text)}, expected a string",
            hint=_OTHERS.format(field=field),
        )
    return text


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _some(names: Sequence[str] | dict[str, object]) -> str:
    return ", ".join(repr(name[:40]) for name in list(names)[:10]) or "none"


def _cells(lines: Iterator[str], name: str, form: _Form) -> Iterator[str]:
    """The column of every row of CSV (RFC 4180), with commas, semicolons or tabs between, as its first row has most."""
    header = next(lines, None)
    if header is None:
        return
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    delimiter = max(",;\t", key=header.count)
    rows = csv.reader((f"{line}\n" for line in chain([header], lines)), delimiter=delimiter, strict=True)
    names: list[str] = []
    first = 1
    try:
        for row in rows:
            if not names:
                names = row
                if form.config.field not in names:
                    raise DataError(
                        f"{name} has no column {form.config.field!r}",
                        hint=f"--field names it; this file has {_some(names)}; {_PLAIN}",
                    )
            elif len(row) == len(names):
                yield row[names.index(form.config.field)]
            elif row:
                raise DataError(
                    f"{name}, line {first} has {len(row)} cells, the first line has {len(names)}",
                    hint=f"a cell with {delimiter!r} in it stands in quotes; {_PLAIN}",
                )
            first = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}, line {first} is not CSV: {error}", hint=f"a quote in quotes is written twice; {_PLAIN}"
        ) from error


_RECORDS = {".jsonl": _records, ".ndjson": _records, ".csv": _cells, ".tsv": _cells}
"""What reads the lines of a file, by its ending."""


def _rows(file: str, form: _Form) -> Iterator[str]:
    """The column of every row of a Parquet file, a few rows at a time."""
    import pyarrow
    from pyarrow import parquet, types

    field = form.config.field
    try:
        # Not pre-buffered, or a whole row group would be in memory; opened here, as Arrow takes only names in UTF-8.
        with (
            opened(file, None) as raw,
            parquet.ParquetFile(raw, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as table,
        ):
            names = table.schema_arrow.names
            if field not in names:
                raise DataError(
                    f"{file} has no column {field!r}",
                    hint=f"--field names it; this file has {_some(names)}",
                )
            kind = table.schema_arrow.types[names.index(field)]
            kind = kind.value_type if types.is_dictionary(kind) else kind
            names_a_class = types.is_integer(kind) or types.is_boolean(kind) or types.is_null(kind)
            if not (str(kind) in _STRINGS or (form.labels and names_a_class)):
                raise DataError(
                    f"{file}: the column {field!r} is of {kind}, expected strings",
                    hint=f"--field names another; this file has {_some(names)}",
                )
            batches = table.iter_batches(_PARQUET_ROWS, columns=[field], use_threads=False)
            # As bytes, because Arrow believes a file that says it holds UTF-8.
            written = "string" if names_a_class else kind
            columns = (batch.column(0).cast(kind).cast(written).cast("large_binary") for batch in batches)
            for number, scalar in enumerate(chain.from_iterable(columns), 1):
                value = scalar.as_py()
                place = f"{file}, row {number}"
                if value is None and form.labels:
                    value = b""
                if value is None:
                    raise DataError(f"{place}: the column {field!r} is null, expected a string")
                yield _valid(value.decode("utf-8", "surrogateescape"), place, None, form)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # of the system, not of Arrow
            raise
        message = " ".join(str(error).split())[:200]
        raise DataError(f"{file} is not Parquet, or cut or damaged: {message}") from error
