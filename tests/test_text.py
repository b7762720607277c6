"""Tokenizers that lose nothing, and the reading of corpora."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from gptvae_cli.config import UNITS, Unit
from gptvae_cli.errors import CheckpointError, DataError
from gptvae_cli.text import Tokenizer, automatic_tokenizer, read_texts

HARD_TEXTS = [
    "",
    " ",
    "  two  spaces, a\ttab and trailing ",
    "a<pad>b <s></s> [UNK] <|endoftext|>",
    "NUL \0 ESC \x1b DEL \x7f C1 \x85 \x9b",
    "lines\nof\r\nevery\rkind\x0b\x0c\x1c\u2028\u2029",
    "\ufeffa mark and \ufffd",
    "e\u0301 é ﬁ Å \u212b ½ ㎏",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "don't I'LL 1234567890",
    "\u202eright to left\u202c עברית",
    "\U0010ffff\U00010000\uffff\ue000",
    "a" * 5000,
]


def lines_of(text: str) -> list[str]:
    """What the corpora of the tests hold: one text a line, LF."""
    return text.removesuffix("\n").split("\n")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(["the cat sat on the mat, the dog too\n"] * 3 + ["café 中文\n"] * 2, 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return Tokenizer.bytes() if request.param == "bytes" else bpe


# Tokenizers -------------------------------------------------------------------------------------------------


def test_every_valid_string_comes_back_exactly(tokenizer: Tokenizer) -> None:
    """Normalizers, spellings of special tokens, regex splits and replacement are where texts get changed."""
    draw = random.Random(0)
    chars = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = HARD_TEXTS + ["".join(map(chr, draw.choices(chars, k=50))) for _ in range(200)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


@pytest.mark.parametrize("corpus", ["tatoeba_112langs", "chinese_poems", "python_source"])
def test_every_line_of_a_corpus_comes_back_exactly(corpus: str) -> None:
    folder = os.environ.get("GPTVAE_TEST_DATA")
    if not folder:
        pytest.skip("GPTVAE_TEST_DATA is not set")
    path = Path(folder, f"{corpus}_train.txt")
    texts = lines_of(path.read_bytes().decode("utf-8"))
    assert list(read_texts([str(path)], unit="line")) == texts
    distinct = sorted(set(texts))
    for tokenizer in (Tokenizer.bytes(), Tokenizer.train_bpe(distinct[::10], 1000)):
        assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(distinct)] == distinct


def test_the_token_of_a_byte_is_the_byte() -> None:
    """The ids of a byte model must be the same in every release of the library."""
    texts = [*HARD_TEXTS, "".join(map(chr, range(0x800)))]
    assert Tokenizer.bytes().encode_batch(texts) == [list(text.encode("utf-8")) for text in texts]


def test_special_tokens_are_the_three_ids_after_the_vocabulary(bpe: Tokenizer) -> None:
    for tokenizer, vocab in ((Tokenizer.bytes(), 256), (bpe, len(json.loads(bpe.to_json())["model"]["vocab"]))):
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (vocab, vocab + 1, vocab + 2)
        assert tokenizer.num_tokens == vocab + 3


def test_the_stored_tokenizer_changes_no_text(bpe: Tokenizer) -> None:
    for tokenizer in (Tokenizer.bytes(), bpe):
        parts = json.loads(tokenizer.to_json())
        assert parts["added_tokens"] == []
        changing = ("normalizer", "post_processor", "truncation", "padding")
        assert [parts[part] for part in changing] == [None] * 4


def test_a_tokenizer_and_its_kind_survive_json(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_json(tokenizer.to_json())
    assert (again.kind, again.num_tokens) == (tokenizer.kind, tokenizer.num_tokens)
    assert again.to_json() == tokenizer.to_json()
    assert again.encode_batch(HARD_TEXTS) == tokenizer.encode_batch(HARD_TEXTS)


def test_decode_skips_specials_and_unknown_ids_and_replaces_invalid_bytes() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.decode([257, 104, 256, 105, 258, 259, 10**9, -1, -257]) == "hi"
    broken = b"a\xffb\xe4\xb8c\xf0\x9f\x98\xed\xa0\x80"
    assert tokenizer.decode(list(broken)) == broken.decode("utf-8", "replace")
    assert tokenizer.decode([]) == ""


def test_line_break_tokens_are_all_that_decode_to_lf_or_cr() -> None:
    assert Tokenizer.bytes().line_break_ids() == [10, 13]
    tokenizer = Tokenizer.train_bpe(["\n\n\r\n\r\n\x0b\x0b\u2028\u2028" * 5] * 5, 280)
    found = tokenizer.line_break_ids()
    expected = [i for i in range(tokenizer.pad_id) if set(tokenizer.decode([i])) & {"\n", "\r"}]
    assert found == expected
    assert len(found) > 2  # merged ones too


def test_training_is_deterministic_and_keeps_to_the_size() -> None:
    texts = [f"number {i} of {i * i}" for i in range(2000)]
    first, second = Tokenizer.train_bpe(texts, 400), Tokenizer.train_bpe(iter(texts), 400)
    assert first.to_json() == second.to_json()
    assert first.num_tokens == 403
    assert Tokenizer.train_bpe([], 400).num_tokens == 259


def test_training_on_one_endless_word_ends() -> None:
    """The library takes time quadratic in the length of a word: minutes for this one, were it not cut."""
    dna = "".join(random.Random(0).choices("ACGT", k=300_000))
    assert Tokenizer.train_bpe([dna], 300).num_tokens == 303


def test_an_error_of_the_corpus_passes_through_training() -> None:
    def texts() -> Iterator[str]:
        yield "a"
        raise DataError("line 2 is broken")

    with pytest.raises(DataError, match="line 2 is broken"):
        Tokenizer.train_bpe(texts(), 300)


def test_a_lone_surrogate_is_bad_input_not_a_crash() -> None:
    """An argument of the shell that is not UTF-8 arrives with one."""
    with pytest.raises(DataError, match=r"lone surrogate U\+DCFF"):
        Tokenizer.bytes().encode_batch(["fine", "caf\udcff"])


def edited(tokenizer: Tokenizer, edit: Callable[[dict[str, Any]], object]) -> str:
    parts = json.loads(tokenizer.to_json())
    edit(parts)
    return json.dumps(parts)


def panicking(tokenizer: Tokenizer) -> str:
    return edited(tokenizer, lambda parts: parts["model"].update(continuing_subword_prefix="#" * 11))


def test_a_panic_of_the_library_is_an_ordinary_error(bpe: Tokenizer, tmp_path: Path) -> None:
    """PanicException is a BaseException, which `except Exception` misses."""
    with pytest.raises(BaseException) as panic:
        tokenizers.Tokenizer.from_str(panicking(bpe))
    assert not isinstance(panic.value, Exception)
    with pytest.raises(CheckpointError, match="tokenizer is malformed"):
        Tokenizer.from_json(panicking(bpe))
    path = tmp_path / "tokenizer.json"
    path.write_text(panicking(bpe))
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer file"):
        Tokenizer.from_file(path)


def test_a_panic_while_encoding_is_bad_input(bpe: Tokenizer) -> None:
    pre_tokenizer = {"type": "FixedLength", "length": 0}
    tokenizer = Tokenizer.from_json(edited(bpe, lambda parts: parts.update(pre_tokenizer=pre_tokenizer)))
    with pytest.raises(DataError, match="cannot encode a text"):
        tokenizer.encode_batch(["text"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_taken_for_a_bad_tokenizer(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: str) -> object:
        raise error

    monkeypatch.setattr(json, "loads", interrupted)
    with pytest.raises(error):
        Tokenizer.from_json("{}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"model": []}',
        '{"model": {"type": "BPE"}}',
        "[" * 100_000,
        "\ud800",
        '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 18446744073709551616}, "merges": []}}',
        '{"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}}',
    ],
)
def test_a_malformed_tokenizer_is_a_checkpoint_error_of_one_line(text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_json(text)
    assert len(caught.value.message.splitlines()) == 1
    assert len(caught.value.message) < 300


def test_mutated_tokenizers_load_or_are_refused(bpe: Tokenizer) -> None:
    draw, original = random.Random(1), bpe.to_json()
    for _ in range(200):
        chars = list(original)
        for _ in range(draw.randint(1, 4)):
            chars[draw.randrange(len(chars))] = draw.choice('{}[]",:09azé\0')
        try:
            tokenizer = Tokenizer.from_json("".join(chars))
            tokenizer.decode(tokenizer.encode_batch(["the cat"])[0])
        except (CheckpointError, DataError):
            pass


def save_word_tokenizer(path: Path) -> None:
    """A user's tokenizer as others make them: words, specials, a gap in the ids, padding, truncation, a template."""
    vocab = {"[UNK]": 0, "C": 1, "O": 2, "N": 9}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 10), ("</s>", 11)]
    )
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))


def test_a_users_tokenizer_neither_cuts_nor_pads_nor_adds(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path / "words.json")
    tokenizer = Tokenizer.from_file(tmp_path / "words.json")
    assert tokenizer.kind == "file"
    assert tokenizer.encode_batch(["C O N C O N", "N"]) == [[1, 2, 9, 1, 2, 9], [9]]
    vocab = json.loads(tokenizer.to_json())["added_tokens"]
    assert tokenizer.pad_id == 10  # behind N, the last
    assert tokenizer.decode([1, 7, 2]) == "C O"  # 7 is in the gap
    assert tokenizer.encode_batch(["<s>"])[0] == [next(t["id"] for t in vocab if t["content"] == "<s>")]
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode_batch(["C O N"]) == tokenizer.encode_batch(["C O N"])
    assert again.kind == "file"


def test_a_users_bpe_encodes_without_its_dropout(bpe: Tokenizer, tmp_path: Path) -> None:
    """BPE dropout would give one text other tokens each time."""
    path = tmp_path / "tokenizer.json"
    path.write_text(edited(bpe, lambda parts: parts["model"].update(dropout=0.5)))
    text = ["the cat sat on the mat"]
    assert all(Tokenizer.from_file(path).encode_batch(text) == bpe.encode_batch(text) for _ in range(20))


def test_a_tokenizer_file_that_is_missing_or_binary_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*none\.json: No such file"):
        Tokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="it is not UTF-8"):
        Tokenizer.from_file(tmp_path / "binary.json")


@pytest.mark.parametrize(
    ("length", "total", "kind", "size"),
    [
        (100, 0, "bytes", 256),
        (100, 200_000, "bytes", 256),
        (7, 5_000_000, "bytes", 256),
        (100, 500_000, "bpe", 1000),
        (100, 3_000_000, "bpe", 2000),
        (100, 20_000_000, "bpe", 3750),
        (100, 200_000_000, "bpe", 8750),
        (100, 10**12, "bpe", 16000),
    ],
)
def test_the_automatic_tokenizer_by_size_and_length_of_texts(length: int, total: int, kind: str, size: int) -> None:
    choice = automatic_tokenizer(["x" * length] * 10, total)
    assert choice[:2] == (kind, size)
    assert choice.reason


def test_a_corpus_of_unknown_size_counts_as_its_sample() -> None:
    sample = ["é" * 50] * 10_000
    assert automatic_tokenizer(sample, None) == automatic_tokenizer(sample, 1_000_000)
    assert automatic_tokenizer([], None).kind == "bytes"


# Texts ------------------------------------------------------------------------------------------------------


def read(data: bytes, unit: Unit = "line") -> list[str]:
    return list(read_texts([], unit=unit, stdin=io.BytesIO(data)))


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
    assert list(read_texts(files, unit=unit)) == ["a\n\nb\n", "", "c"]


def test_sources_are_read_in_order_and_a_dash_is_stdin(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1\n2")
    (tmp_path / "b").write_text("3\n")
    stdin = io.BytesIO(b"x\ny")
    sources = [str(tmp_path / "b"), "-", str(tmp_path / "a.csv")]
    assert list(read_texts(sources, unit="line", stdin=stdin)) == ["3", "x", "y", "1", "2"]
    assert not stdin.closed


def test_stdin_is_the_process_own_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb")))
    assert list(read_texts([], unit="line")) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="stdin: it is closed"):
        read_texts(["-"], unit="line")


def test_lines_of_a_pipe_are_there_before_its_end() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as stdin, os.fdopen(writer, "wb", buffering=0) as pipe:
        pipe.write(b"first\nsec")
        texts = read_texts([], unit="line", stdin=stdin)
        assert next(texts) == "first"
        pipe.write(b"ond\n")
        assert next(texts) == "second"
        pipe.close()
        assert list(texts) == []


def test_reading_lines_takes_constant_memory() -> None:
    """100 MB of lines under a limit of address space that does not hold them."""
    program = """
import io, resource, sys
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
print(sum(len(text) for text in read_texts([], unit="line", stdin=stdin)))
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
    assert list(read_texts([str(tmp_path)], unit="line")) == ["1", "2", "3", "4", "5"]


def test_missing_sources_are_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.txt: No such file"):
        read_texts(["-", str(tmp_path / "none.txt")], unit="line", stdin=io.BytesIO(b"a"))
    with pytest.raises(DataError, match="no texts in the folder") as caught:
        read_texts([str(tmp_path)], unit="line")
    assert caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_bad_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        list(read_texts([str(tmp_path / "a.txt")], unit="line"))
    (tmp_path / "sub").mkdir(mode=0)
    with pytest.raises(DataError, match="Permission denied"):
        read_texts([str(tmp_path)], unit="line")
    (tmp_path / "sub").chmod(0o700)


@pytest.mark.parametrize("unit", UNITS)
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
        list(read_texts([str(path)], unit=unit))
    assert (caught.value.hint and "iconv -f latin1" in caught.value.hint) or line == 1


def test_lines_before_an_invalid_byte_are_texts() -> None:
    texts = read_texts([], unit="line", stdin=io.BytesIO(b"a\nb\n\xff"))
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
    return list(read_texts([str(path)], unit=unit, field=field))


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
    assert list(read_texts([str(path)], unit="line")) == ["a", "b"]


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


def test_a_missing_field_comes_with_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_jsonl(tmp_path, '{"id": 1, "body\\u001b": ""}')
    assert caught.value.hint == "--field names it; this line has 'id', 'body\\x1b'"


def test_gzip_is_read_as_the_text_within(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfa\r\nb\n"))
    assert list(read_texts([str(path)], unit="line")) == ["a", "b"]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"plain text", lambda data: data[:-9], lambda data: data + b"more"],
    ids=["empty", "plain", "cut", "followed"],
)
def test_damaged_gzip_is_bad_input(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "corpus.gz"
    path.write_bytes(damage(gzip.compress(os.urandom(1000).hex().encode())))
    with pytest.raises(DataError, match=r"corpus\.gz is not gzip, or cut or damaged"):
        list(read_texts([str(path)], unit="line"))


def test_gzip_with_any_byte_flipped_is_read_or_bad_input(tmp_path: Path) -> None:
    path, data = tmp_path / "corpus.gz", gzip.compress(b"some text\nand more of it\n" * 3, mtime=0)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            assert list(read_texts([str(path)], unit="line"))
        except DataError as error:
            assert "corpus.gz" in error.message


def test_reading_may_stop_early(tmp_path: Path) -> None:
    """`head` does; nothing may be left open (warnings are errors here) and stdin not be closed."""
    path, stdin = tmp_path / "a.txt", io.BytesIO(b"a\n\nb\n\nc")
    path.write_text("a\n\nb\n\nc")
    units: list[Unit] = ["line", "paragraph"]
    for unit in units:
        assert next(read_texts([str(path)], unit=unit)) == "a"
        stdin.seek(0)
        assert next(read_texts([], unit=unit, stdin=stdin)) == "a"
        assert not stdin.closed
