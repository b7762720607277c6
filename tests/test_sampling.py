"""What a trained model is used for: encoding and writing, on tiny models of bytes that nobody trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from numpy.testing import assert_allclose, assert_array_equal

import gptvae_cli
from gptvae_cli import sampling
from gptvae_cli.checkpoint import Checkpoint, load
from gptvae_cli.config import PathKind, SampleConfig, TextConfig, Unit
from gptvae_cli.decoding import Request, decode
from gptvae_cli.device import Device
from gptvae_cli.errors import CheckpointError, ConfigError, DeviceError
from gptvae_cli.sampling import Encoder, Encoding, Floats
from gptvae_cli.text import read_texts
from gptvae_cli.tokenizer import Tokenizer
from tests.cli.conftest import LONGEST, WIDTH, make_model

TEXTS = [
    "a",
    "",
    "the longest text here",
    "ab",
    "naïve",
    "日本",
    "a",
    *(chr(97 + i % 26) * (i % 20) for i in range(40)),
]
GREEDY = SampleConfig(greedy=True)
SAMPLED = SampleConfig(seed=5, temperature=1.5)
# A character of two, three and four bytes each, and a byte that begins none.
MULTI_BYTE = "né 日本 😀!".encode()

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return sampling.open_model(path, device="cpu").checkpoint


def rows_of(count: int, seed: int = 0) -> list[Floats]:
    return list(3 * np.random.default_rng(seed).standard_normal((count, WIDTH), dtype=np.float32))


def requests(count: int) -> list[Request]:
    return list(sampling.repeated(rows_of(count), 1))


def posterior_alone(checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of one row, computed without a batch and without padding."""
    with torch.inference_mode():
        posterior = checkpoint.model.posterior(torch.tensor([tokens]))
    return posterior.mean_BZ[0].numpy(), posterior.log_var_BZ[0].exp().sqrt().numpy()


# A model that is ready ------------------------------------------------------------------------------------------------


def test_float32_on_a_cpu_is_not_worth_a_note(path: Path) -> None:
    opened = sampling.open_model(path, device="cpu")
    assert (opened.checkpoint.dtype, opened.note) == (torch.float32, None)
    assert opened.checkpoint.model.device == torch.device("cpu")


def test_what_nobody_expects_is_told(path: Path) -> None:
    found, note, fell_back = sampling.open_model(path, device="cpu", dtype="bfloat16")
    assert (found.dtype, fell_back) == (torch.bfloat16, False)
    assert note is not None
    assert "on cpu" in note
    assert "in bfloat16" in note


def test_a_gpu_that_cannot_be_used_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or people wonder for hours why it is slow."""
    fallen = Device(torch.device("cpu"), "the driver is too old", fell_back=True)
    monkeypatch.setattr(sampling, "resolve_device", lambda name: fallen)
    opened = sampling.open_model(path)
    assert opened[1:] == ("computing on the CPU: the driver is too old", True)
    with pytest.warns(UserWarning, match="the driver is too old") as caught:
        gptvae_cli.load(path)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


def test_what_cannot_be_opened_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        sampling.open_model(tmp_path / "nowhere.safetensors", device="cpu")
    with pytest.raises(DeviceError, match="cuda:77"):
        sampling.open_model(path, device="cuda:77")
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        sampling.open_model(path, device="cpu", dtype="int8")  # type: ignore[arg-type]


# Texts to latents -----------------------------------------------------------------------------------------------------


def test_a_latent_is_the_posterior_of_its_text_alone(checkpoint: Checkpoint) -> None:
    """In the order of the texts, though they are computed in batches of texts about equally long."""
    config = checkpoint.header.model
    found = list(Encoder(checkpoint, "line").encode(TEXTS))
    assert len(found) == len(TEXTS)
    for text, encoding in zip(TEXTS, found, strict=True):
        mean_Z, std_Z = posterior_alone(checkpoint, [config.bos_id, *text.encode(), config.eos_id])
        assert encoding.mean_Z.dtype == encoding.std_Z.dtype == np.float32
        assert_allclose(encoding.mean_Z, mean_Z, atol=1e-5, rtol=1e-5)
        assert_allclose(encoding.std_Z, std_Z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 64, 8192])
def test_padding_does_not_change_latent(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    alone = [next(Encoder(checkpoint, "line").encode([text])) for text in TEXTS]
    monkeypatch.setattr(sampling, "tokens_together", lambda device, dtype: budget)
    together = Encoder(checkpoint, "line").encode(TEXTS)
    for one, other in zip(alone, together, strict=True):
        assert_allclose(one.mean_Z, other.mean_Z, atol=1e-5, rtol=1e-5)
        assert_allclose(one.std_Z, other.std_Z, atol=1e-5, rtol=1e-5)


def test_other_texts_have_other_latents(checkpoint: Checkpoint) -> None:
    a, b = Encoder(checkpoint, "line").encode(["a", "b"])
    assert np.abs(a.mean_Z - b.mean_Z).max() > 1e-2


def test_equal_texts_are_computed_once_a_pool(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million empty lines, say."""
    encoder = Encoder(checkpoint, "line")
    computed: list[int] = []
    posteriors = encoder._posteriors

    def counted(rows: Sequence[Sequence[int]]) -> list[Encoding]:
        computed.append(len(rows))
        return posteriors(rows)

    monkeypatch.setattr(encoder, "_posteriors", counted)
    found = list(encoder.encode(["", "b"] * 5000))
    assert computed == [2, 2, 2], "of 4,096 texts, 4,096 and 1,808"
    for i, expected in enumerate(Encoder(checkpoint, "line").encode(["", "b"])):
        assert_allclose([encoding.mean_Z for encoding in found[i::2]], [expected.mean_Z] * 5000, atol=1e-5)


def test_texts_that_a_users_tokenizer_changes_are_counted(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "cat": 1, "number": 2}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = make_model(tmp_path / "words.safetensors", tokenizer=Tokenizer.from_json(words.to_str()))
    encoder = Encoder(load(path, device=torch.device("cpu")), "line")
    assert len(list(encoder.encode(["cat number", "cat", "dog", "cat  number"]))) == 4
    assert encoder.changed == 2
    assert encoder.note == "2 texts do not come back from the tokenizer as written; what it drops is not read"
    list(encoder.encode(["cat " * 30]))
    assert str(encoder.note).startswith(
        "1 text is longer than the model's 24 tokens; the beginning was used; 2 texts do"
    )


def test_a_text_that_is_too_long_is_cut_without_eos_and_counted(checkpoint: Checkpoint) -> None:
    config = checkpoint.header.model
    fits, long = "x" * (LONGEST - 2), "x" * (LONGEST + 30)
    encoder = Encoder(checkpoint, "line")
    assert encoder.cut == 0
    whole, cut = encoder.encode([fits, long])
    assert encoder.cut == 1
    assert encoder.note == "1 text is longer than the model's 24 tokens; the beginning was used"
    ending, _ = posterior_alone(checkpoint, [config.bos_id, *fits.encode(), config.eos_id])
    open_end, _ = posterior_alone(checkpoint, [config.bos_id, *long[: LONGEST - 1].encode()])
    assert_allclose(whole.mean_Z, ending, atol=1e-5, rtol=1e-5)
    assert_allclose(cut.mean_Z, open_end, atol=1e-5, rtol=1e-5)
    list(encoder.encode([long] * 1199))
    assert encoder.note == "1,200 texts are longer than the model's 24 tokens; the beginning was used"


@pytest.mark.parametrize("length", [1, LONGEST - 2, LONGEST - 1, LONGEST, 3 * (LONGEST - 1), 70_000])
def test_a_running_text_has_a_latent_for_each_of_its_consecutive_windows(checkpoint: Checkpoint, length: int) -> None:
    """The longest is read in two pieces, which end at a line."""
    config = checkpoint.header.model
    text = "".join("\n" if i % 10 == 9 else chr(97 + i % 26) for i in range(length))
    size = LONGEST - 1
    windows = [text.encode()[i : i + size] for i in range(0, length, size)]
    encoder = Encoder(checkpoint, "window")
    found = list(encoder.encode([text]))
    assert len(found) == len(windows)
    seam = 2**16 // size
    looked_at = [*range(min(len(windows), 5)), *range(seam - 2, seam + 3)]
    for window, encoding in [(windows[i], found[i]) for i in looked_at if i < len(windows)]:
        mean_Z, _ = posterior_alone(checkpoint, [config.bos_id, *window])
        assert_allclose(encoding.mean_Z, mean_Z, atol=1e-5, rtol=1e-5)
    assert encoder.note is None, "nothing is cut off"


def test_a_window_does_not_reach_into_the_next_text(checkpoint: Checkpoint) -> None:
    texts = ["one", "", "x" * (LONGEST + 1), "two"]
    apart = [encoding for text in texts for encoding in Encoder(checkpoint, "window").encode([text])]
    together = list(Encoder(checkpoint, "window").encode(texts))
    assert len(together) == len(apart) == 5, "an empty text has a latent, too"
    for one, other in zip(apart, together, strict=True):
        assert_allclose(one.mean_Z, other.mean_Z, atol=1e-5, rtol=1e-5)


def test_a_running_text_in_parts_has_the_windows_of_the_whole(checkpoint: Checkpoint, tmp_path: Path) -> None:
    lines = "".join(f"{i} times\n" for i in range(20_000))
    for name, text in (("a", lines), ("b", ""), ("c", "c" * 2**17), ("d", "short")):
        (tmp_path / f"{name}.txt").write_text(text)
    whole, parts = (list(read_texts([str(tmp_path)], TextConfig(unit=unit))) for unit in ("file", "window"))
    assert len(whole) == 4 < len(parts)
    rows = [list(Encoder(checkpoint, "window").rows(texts)) for texts in (whole, parts)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("unit", ["line", "paragraph", "file", "window"])
def test_no_texts_give_no_latents(checkpoint: Checkpoint, unit: Unit) -> None:
    assert list(Encoder(checkpoint, unit).encode([])) == []


def test_texts_of_a_list_are_encoded_together(checkpoint: Checkpoint) -> None:
    """And none is asked for before all of these are there. An empty list stays one: more has to be waited for."""
    read: list[int] = []

    def pools() -> Iterator[list[str]]:
        for count in (0, 1, 3, 0, 2):
            read.append(count)
            yield TEXTS[:count]

    expected = list(Encoder(checkpoint, "line").encode(TEXTS))
    for number, encodings in enumerate(Encoder(checkpoint, "line").encode_pools(pools()), 1):
        assert len(read) == number
        assert len(encodings) == read[-1]
        for encoding, alone in zip(encodings, expected, strict=False):
            assert_allclose(encoding.mean_Z, alone.mean_Z, atol=1e-5, rtol=1e-5)
    assert len(read) == 5


def test_bfloat16_gives_nearly_the_same_latents_as_float32(checkpoint: Checkpoint) -> None:
    exact = np.stack([each.mean_Z for each in Encoder(checkpoint, "line").encode(TEXTS)])
    rounded = np.stack(
        [each.mean_Z for each in Encoder(replace(checkpoint, dtype=torch.bfloat16), "line").encode(TEXTS)]
    )
    assert rounded.dtype == np.float32
    assert not np.array_equal(exact, rounded), "it was not computed in bfloat16"
    assert np.abs(exact - rounded).mean() < 0.1 * np.abs(exact).mean()


# Draws ----------------------------------------------------------------------------------------------------------------


def test_a_latent_of_the_prior_does_not_depend_on_how_many_there_are() -> None:
    few, many = list(sampling.prior(3, 2, WIDTH)), list(sampling.prior(3, 50, WIDTH))
    assert (len(few), len(many)) == (2, 50)
    assert_array_equal(np.stack(few), np.stack(many[:2]))
    assert len({latent_Z.tobytes() for latent_Z in many}) == 50
    assert not np.array_equal(few[0], next(sampling.prior(4, 1, WIDTH)))


def test_the_prior_is_standard_normal() -> None:
    values = np.stack(list(sampling.prior(0, 5000, WIDTH)))
    assert values.dtype == np.float32
    # Five standard errors of the mean and of the variance of 5,000 draws.
    assert np.abs(values.mean(0)).max() < 5 / 5000**0.5
    assert np.abs(values.var(0) - 1).max() < 5 * (2 / 5000) ** 0.5


def test_copies_repeat_a_latent_under_numbers_of_their_own() -> None:
    latents = rows_of(2)
    found = list(sampling.repeated(latents, 3))
    assert [(each.row, each.copy) for each in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for each in found:
        assert each.latent is not None
        assert_array_equal(each.latent, latents[each.row])


def test_sampled_copies_differ_and_are_reproducible(checkpoint: Checkpoint) -> None:
    def found(texts: Sequence[str], copies: int, seed: int) -> dict[tuple[int, int], Floats]:
        encodings = Encoder(checkpoint, "line").encode_pools([text] for text in texts)
        drawn = [each for each in sampling.encoded(encodings, copies, seed) if each is not None]
        return {(each.row, each.copy): each.latent.numpy() for each in drawn if each.latent is not None}

    first = found(["a", "b"], 3, 1)
    assert list(first) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert len({latent_Z.tobytes() for latent_Z in first.values()}) == 6
    again, fewer, other = found(["a", "b"], 3, 1), found(["a"], 1, 1), found(["a"], 1, 2)
    for key, latent_Z in first.items():
        assert_array_equal(latent_Z, again[key])
    assert_allclose(fewer[0, 0], first[0, 0], atol=1e-5)
    assert np.abs(other[0, 0] - first[0, 0]).max() > 1e-3


def test_an_empty_list_asks_for_what_was_begun_to_be_written_first() -> None:
    means = [Encoding(latent_Z, latent_Z, latent_Z) for latent_Z in rows_of(3)]
    for seed in (None, 1):
        found = sampling.encoded([[], means[:2], [], [], means[2:]], 2, seed)
        assert [each and (each.row, each.copy) for each in found] == [
            *(None, (0, 0), (0, 1), (1, 0), (1, 1)),
            *(None, None, (2, 0), (2, 1)),
        ]
    latents = list(zip((7, 3), rows_of(2), strict=True))
    numbers = [each and each.row for each in sampling.numbered([[], latents[:1], [], latents[1:]], 1)]
    assert numbers == [None, 7, None, 3]


def test_draws_of_a_posterior_have_its_mean_and_deviation() -> None:
    mean_Z = np.array([5, -1], np.float32)
    encoding = Encoding(mean_Z, np.array([0.1, 2], np.float32), mean_Z)
    drawn = np.stack([encoding.sample(0, row) for row in range(4000)])
    assert_allclose(drawn.mean(0), encoding.mean_Z, atol=5 * 2 / 4000**0.5)
    assert_allclose(drawn.std(0), encoding.std_Z, rtol=5 / (2 * 4000) ** 0.5)


@pytest.mark.parametrize("kind", ["slerp", "lerp"])
def test_a_walk_starts_and_ends_at_its_points_exactly(kind: PathKind) -> None:
    points_NZ = np.stack(rows_of(3))
    path_KZ = sampling.walk(points_NZ, 4, kind)
    assert path_KZ.shape == (7, WIDTH)
    assert path_KZ.dtype == np.float32
    assert_array_equal(path_KZ[[0, 3, 6]], points_NZ)


def test_refined_latents_come_a_few_at_a_time(checkpoint: Checkpoint) -> None:
    """As it takes seconds; those of an empty list of texts, which says that one has to wait, come at once."""
    texts = [f"{i % 50} cats" for i in range(600)]
    pools = list(Encoder(checkpoint, "line", refine=True).encode_pools([texts, [], ["a"]]))
    assert [*map(len, pools)] == [256, 256, 88, 0, 1]
    assert [*map(len, Encoder(checkpoint, "line").encode_pools([texts, [], ["a"]]))] == [600, 0, 1]
    assert_array_equal(pools[0][0].latent_Z, pools[0][50].latent_Z)
    assert_allclose(pools[0][0].latent_Z, pools[2][38].latent_Z, atol=1e-3)


# Latents to texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_text_does_not_depend_on_its_neighbours(checkpoint: Checkpoint, config: SampleConfig) -> None:
    """70 texts do not fit in one batch of 64."""
    together = list(sampling.write(checkpoint, requests(70), config, unit="line"))
    assert len(together) == 70
    assert len(set(together)) > 35, "the latent hardly shows"
    for row in (0, 3, 69):
        assert list(sampling.write(checkpoint, [requests(70)[row]], config, unit="line")) == [together[row]]
    backwards = list(sampling.write(checkpoint, requests(70)[::-1], config, unit="line"))
    assert backwards[::-1] == together


def test_copies_of_a_latent_are_other_texts_unless_they_are_greedy(checkpoint: Checkpoint) -> None:
    def found(config: SampleConfig) -> list[str]:
        return list(sampling.write(checkpoint, sampling.repeated(rows_of(1), 8), config, unit="line"))

    assert len(set(found(SAMPLED))) > 4
    assert len(set(found(GREEDY))) == 1


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_only_a_line_is_kept_free_of_line_breaks(checkpoint: Checkpoint, unit: Unit) -> None:
    """At a temperature where all tokens are about equally likely."""
    config = SampleConfig(seed=1, temperature=100, max_tokens=LONGEST)
    written = "".join(sampling.write(checkpoint, requests(100), config, unit=unit))
    assert ("\n" in written, "\r" in written) == ((False, False) if unit == "line" else (True, True))


@pytest.mark.parametrize(("prompt", "as_read"), [("a\n", "a\n"), ("\r", "\n"), ("a\r\nb", "a\nb"), ("\n\r", "\n\n")])
def test_a_line_does_not_begin_with_a_line_break(checkpoint: Checkpoint, prompt: str, as_read: str) -> None:
    """Where a text may, its line ends are those that the model has read."""
    with pytest.raises(ConfigError, match="line break"):
        next(sampling.write(checkpoint, requests(1), GREEDY, unit="line", prompt=prompt))
    paragraph = next(sampling.write(checkpoint, requests(1), GREEDY, unit="paragraph", prompt=prompt))
    assert paragraph.startswith(as_read)


@pytest.mark.parametrize("prompt", ["", "ab", "naïve 日", "x" * (2 * LONGEST)], ids=["none", "short", "wide", "long"])
def test_a_text_is_its_prompt_and_what_follows(checkpoint: Checkpoint, prompt: str) -> None:
    config = SampleConfig(seed=2, max_tokens=5)
    for text in sampling.write(checkpoint, requests(20), config, unit="line", prompt=prompt):
        assert text.startswith(prompt)
        assert len(text) <= len(prompt) + 5


def test_spaces_at_the_end_of_a_prompt_are_left_to_the_next_word(tmp_path: Path) -> None:
    """A token has the space before its word, and after one by itself a model has only seen the end of its knowledge."""
    words = Tokenizer.train_bpe(["the cat sat on the mat, the dog sat on the log"] * 20, 300)
    path = make_model(tmp_path / "bpe.safetensors", tokenizer=words)
    checkpoint = sampling.open_model(path, device="cpu").checkpoint
    spaced = [i for i in range(words.pad_id) if words.decode([i]).startswith(" ")]
    rule = words.constraint("line")
    assert len(spaced) > 5
    for cached in (True, False):
        latents = [torch.tensor(latent_Z) for latent_Z in rows_of(20)]
        heads = [Request(row, 0, latent_Z, words.encode_batch(["the"])[0]) for row, latent_Z in enumerate(latents)]
        found = list(decode(checkpoint.model, heads, GREEDY, constraint=rule, endings=[spaced], cached=cached))
        anything = list(decode(checkpoint.model, heads, GREEDY, constraint=rule, cached=cached))
        assert all(ids[0] in spaced for ids in found)
        assert any(ids[:1] and ids[0] not in spaced for ids in anything)
        assert all(one == other for one, other in zip(found, anything, strict=True) if other[:1] and other[0] in spaced)
    written = list(sampling.write(checkpoint, requests(20), GREEDY, unit="line", prompt="the "))
    assert written == [words.decode([*heads[0].prompt, *ids]).removesuffix("\ufffd") for ids in found]
    assert all(text.startswith("the ") for text in written)
    pieces: list[str] = []
    streamed = list(sampling.write(checkpoint, requests(20), GREEDY, unit="line", prompt="the ", on_text=pieces.append))
    assert (streamed, "".join(pieces)) == (written, "".join(written))


def test_a_prompt_changes_what_follows(checkpoint: Checkpoint) -> None:
    def follows(prompt: str) -> list[str]:
        written = sampling.write(checkpoint, requests(20), GREEDY, unit="line", prompt=prompt)
        return [text.removeprefix(prompt) for text in written]

    assert follows("a") != follows("b")


def test_latents_are_taken_as_there_is_room_for_them(checkpoint: Checkpoint) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Request]:
        row = 0
        while True:
            taken.append(row)
            yield Request(row, 0, torch.zeros(WIDTH))
            row += 1

    next(sampling.write(checkpoint, endless(), GREEDY, unit="line"))
    assert len(taken) < 300


def test_no_latents_give_no_texts(checkpoint: Checkpoint) -> None:
    assert list(sampling.write(checkpoint, [], GREEDY, unit="line")) == []


def test_bfloat16_writes_the_texts_of_autocast(checkpoint: Checkpoint) -> None:
    """Which are not all those of float32."""
    written, exact = (
        list(sampling.write(replace(checkpoint, dtype=dtype), requests(30), GREEDY, unit="line"))
        for dtype in (torch.bfloat16, torch.float32)
    )
    rule = checkpoint.tokenizer.constraint("line")
    with torch.autocast("cpu", torch.bfloat16):
        expected = list(decode(checkpoint.model, requests(30), GREEDY, constraint=rule))
    assert written == [bytes(ids).decode("utf-8", "ignore") for ids in expected]
    assert written != exact


# Texts in pieces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "日é"], ids=["none", "wide"])
def test_pieces_join_to_the_text(checkpoint: Checkpoint, prompt: str) -> None:
    """A model that nobody trained writes many characters of several bytes."""
    config = SampleConfig(seed=3, temperature=20)
    pieces: list[str] = []
    written = sampling.write(checkpoint, requests(30), config, unit="line", prompt=prompt, on_text=pieces.append)
    whole = list(sampling.write(checkpoint, requests(30), config, unit="line", prompt=prompt))
    assert sum(not text.isascii() for text in whole) > 20
    for found, text in zip(written, whole, strict=True):
        assert "".join(pieces) == found == text
        pieces.clear()


def scripted(texts: Sequence[bytes]) -> Callable[..., Iterator[list[int]]]:
    """A stand-in for `decode` that writes these bytes, one token at a time."""

    def decode(
        model: object, requests: Iterator[Request], sample: object, *, on_token: Callable[[int, int], None], **rest: Any
    ) -> Iterator[list[int]]:
        for position, (_, text) in enumerate(zip(requests, texts, strict=False)):
            for token in text:
                on_token(position, token)
            yield list(text)

    return decode


def test_the_bytes_of_a_character_wait_until_it_is_complete(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "decode", scripted([MULTI_BYTE, b"x"]))
    pieces: list[str] = []
    written = sampling.write(checkpoint, requests(2), GREEDY, unit="line", prompt="é", on_text=pieces.append)
    assert next(written) == "é" + MULTI_BYTE.decode()
    assert pieces == ["én", *MULTI_BYTE.decode()[1:]]
    pieces.clear()
    assert next(written) == "éx"
    assert pieces == ["éx"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\xff", "a\ufffd"),
        (b"a\xffb", "a\ufffdb"),
        (b"\xe6\x97", ""),
        (b"a\xe6\x97", "a"),
        (b"\xe6\x97x", "\ufffdx"),
        (b"\xf0\x9f\x98\xe6\x97\xa5", "\ufffd日"),
        ("\ufffd".encode(), "\ufffd"),
        (b"", ""),
    ],
    ids=["at-the-end", "inside", "cut", "cut-behind", "broken-off", "two", "the-character-itself", "nothing"],
)
def test_invalid_bytes_become_the_replacement_character_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, data: bytes, text: str
) -> None:
    monkeypatch.setattr(sampling, "decode", scripted([data]))
    pieces: list[str] = []
    written = next(sampling.write(checkpoint, requests(1), GREEDY, unit="line", on_text=pieces.append))
    assert written == "".join(pieces) == text


def test_a_piece_takes_no_longer_the_longer_the_text_is(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []

    def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return "a" * len(ids)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    pieces = sampling._Pieces(Tokenizer.bytes(), [], lambda text: None)
    for position in range(100):
        pieces.add(position, ord("a"))
    assert max(decoded) == 2
