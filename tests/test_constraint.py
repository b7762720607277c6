"""Texts whose tokens are parts of characters, and which are valid UTF-8 all the same."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import pytest
import torch

from gptvae_cli.checkpoint import load
from gptvae_cli.config import SampleConfig
from gptvae_cli.constraint import Constraint
from gptvae_cli.decoding import Request, decode
from gptvae_cli.sampling import prior, repeated, write
from gptvae_cli.tokenizer import Tokenizer
from tests.cli.conftest import WIDTH, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

BYTES = Constraint([*(bytes([i]) for i in range(256)), b""], never=(), eos_id=256)
LINES = [f"{a} {b}" for a in ("日本語", "मां बाप का", "naïve", "👍🏽") for b in ("שלום", "ไทย", "x", "ქართული")] * 40


def can_follow(before: bytes, token: bytes) -> bool:
    """By Python's decoder: nothing is invalid, though the last character may be cut."""
    try:
        (before + token).decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


BEFORE = ["", "61", "c3", "e0", "e1", "ed", "f0", "f1", "f4", "e0a4", "ed9f", "f09f", "f09f91", "f48f", "e697a5"]


@pytest.mark.parametrize("before", [bytes.fromhex(each) for each in BEFORE], ids=BEFORE)
def test_a_byte_may_come_where_pythons_decoder_takes_it(before: bytes) -> None:
    allowed_V = BYTES.allowed_SV[BYTES.behind(before)]
    assert [bool(may) for may in allowed_V[:-1]] == [can_follow(before, bytes([i])) for i in range(256)]


def test_a_token_of_several_bytes_is_all_of_them_in_turn() -> None:
    tokens = [*(bytes(each) for each in itertools.product((0x61, 0x80, 0x97, 0xA5, 0xE6, 0xF0), repeat=3)), b""]
    found = Constraint([*tokens, b""], never=(), eos_id=len(tokens))
    for before in (b"", b"\xe6", b"\xe6\x97", b"\xf0", b"\xc3"):
        state = BYTES.behind(before)
        assert [bool(may) for may in found.allowed_SV[state][:-1]] == [can_follow(before, token) for token in tokens]
        for number, token in enumerate(tokens):
            if found.allowed_SV[state, number]:
                assert found.behind([number], state) == BYTES.behind(before + token), token


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_text_is_made_of_tokens_that_may_come(kind: str) -> None:
    tokenizer = Tokenizer.bytes() if kind == "bytes" else Tokenizer.train_bpe(LINES, 300)
    assert b"".join(tokenizer.spelled()[i] for i in tokenizer.encode_batch([LINES[0]])[0]) == LINES[0].encode()
    constraint = tokenizer.constraint("file")
    for text in [*LINES[:16], "\ufffd", *map(chr, range(0x7F, 0x11000, 0x91))]:
        if unicodedata.category(text[0]) == "Cs":
            continue
        state = 0
        for token in tokenizer.encode_batch([text])[0]:
            assert constraint.allowed_SV[state, token], text
            state = constraint.behind([token], state)
        assert state == 0


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_what_is_written_is_valid(tmp_path: Path, kind: str, cached: bool) -> None:
    """A model that nobody trained draws any token behind any other; what it may not draw, it draws anew."""
    tokenizer = Tokenizer.bytes() if kind == "bytes" else Tokenizer.train_bpe(LINES, 300)
    checkpoint = load(make_model(tmp_path / "model.safetensors", tokenizer=tokenizer), device=torch.device("cpu"))
    spelled, sample = tokenizer.spelled(), SampleConfig(temperature=3.0, max_tokens=17)
    requests = [Request(row, 0, torch.tensor(z)) for row, z in enumerate(prior(1, 60, WIDTH))]
    constraint = tokenizer.constraint("file")
    written = list(decode(checkpoint.model, requests, sample, constraint=constraint, cached=cached))
    texts = [b"".join(spelled[i] for i in ids) for ids in written]
    assert all(can_follow(b"", text) for text in texts)
    assert sum(any(byte >= 0x80 for byte in text) for text in texts) > 50
    ended = [text for text, ids in zip(texts, written, strict=True) if len(ids) < 17]
    assert ended
    for text in ended:
        text.decode("utf-8")  # no text ends within a character of itself
    assert any(
        not can_follow(b"", b"".join(spelled[i] for i in ids)) for ids in decode(checkpoint.model, requests, sample)
    )
    shown = list(write(checkpoint, repeated(prior(1, 60, WIDTH), 1), sample, unit="file"))
    assert shown == [text.decode("utf-8", "ignore") for text in texts], "what is cut within one ends before it"
