"""The Python API: the same results as the commands, and errors instead of surprises."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from typer.testing import CliRunner

import gptvae_cli
from gptvae_cli import CheckpointError, ConfigError, DataError, GPTVAEError, Model, load
from gptvae_cli.cli.app import app
from gptvae_cli.header import read_header
from tests.cli.conftest import LONGEST, WIDTH, make_model

TEXTS = ["a", "", "naïve", "日本", "ab", *(chr(97 + i % 26) * (i % 20) for i in range(30))]
LATENTS = 3 * np.random.default_rng(0).standard_normal((6, WIDTH), dtype=np.float32)
HOLED = LATENTS.copy()
HOLED[2, 3] = np.nan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that holds nothing but a model of lines; `window.safetensors` beside it reads running texts."""
    folder = tmp_path_factory.mktemp("run")
    make_model(folder / "model.safetensors")
    make_model(folder / "window.safetensors", unit="window")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, device="cpu")


@pytest.fixture
def command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command on the model, in a folder with the texts and the latents above as files."""
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), "utf-8")
    np.save("z.npy", LATENTS)

    def run(*arguments: object) -> None:
        result = CliRunner().invoke(app, [*map(str, arguments), "--model", str(folder), "--device", "cpu"])
        assert result.exit_code == 0, result.stderr
        Path("out").write_bytes(result.stdout_bytes)

    return run


def written() -> list[str]:
    """The texts that a command with --format jsonl wrote."""
    return [json.loads(line)["text"] for line in Path("out").read_bytes().splitlines()]


# The same as the commands ---------------------------------------------------------------------------------------------


def test_latents_are_those_of_gptvae_encode(model: Model, command: Callable[..., None]) -> None:
    command("encode", "texts.txt", "--std-out", "std.npy")
    latents = model.encode(TEXTS)
    assert latents.dtype == np.float32
    assert latents.shape == (len(TEXTS), WIDTH)
    assert_array_equal(latents, np.load("out"))
    posterior = model.posterior(iter(TEXTS))
    assert_array_equal(posterior.mean_NZ, latents)
    assert_array_equal(posterior.std_NZ, np.load("std.npy"))
    command("encode", "texts.txt", "--sample", "--seed", "7")
    assert_array_equal(model.encode(TEXTS, sample=True, seed=7), np.load("out"))
    command("encode", "texts.txt", "--refine")
    assert_array_equal(model.encode(TEXTS, refine=True), np.load("out"))
    assert not np.allclose(latents, np.load("out"), atol=1e-2)
    with pytest.raises(ConfigError, match="sample draws from posteriors, which refine leaves alone"):
        model.encode(TEXTS, sample=True, refine=True)


def test_tokens_are_those_of_gptvae_evaluate(model: Model, command: Callable[..., None]) -> None:
    texts = ["a", "naïve", "", "x" * 3 * LONGEST]
    Path("texts.txt").write_text("".join(f"{text}\n" for text in texts), "utf-8")
    command("evaluate", "texts.txt", "--samples", 1, "--per-text", "scores.jsonl")
    told = [json.loads(line)["tokens"] for line in Path("scores.jsonl").read_text().splitlines()]
    with pytest.warns(UserWarning, match="1 text is longer"):
        counts = model.count_tokens(texts)
    assert counts.tolist() == told == [2, 7, 1, LONGEST - 1]


def test_line_breaks_are_those_of_records(model: Model, folder: Path, tmp_path: Path) -> None:
    """A model of lines never saw one; a column of a table may have some."""
    texts = ["one\r\ntwo", "one\rtwo\n", "one\ntwo"]
    assert_array_equal(model.encode(texts), model.encode(["one two"] * 3))
    assert_array_equal(model.nll(texts, samples=2), model.nll(["one two"] * 3, samples=2))
    assert model.interpolate(texts[0], "x", steps=2) == model.interpolate("one two", "x", steps=2)
    make_model(tmp_path / "file.safetensors", unit="file")
    whole = load(tmp_path / "file.safetensors", device="cpu")
    assert_array_equal(whole.encode(texts), whole.encode(["one\ntwo"] * 3))
    assert not np.array_equal(whole.encode(["one\ntwo"]), whole.encode(["one two"]))


def test_a_running_text_has_a_row_for_each_of_its_windows(folder: Path, tmp_path: Path) -> None:
    model = load(folder / "window.safetensors", device="cpu")
    text = "abc " * 20
    (tmp_path / "text.txt").write_text(text)
    arguments = ["encode", str(tmp_path / "text.txt"), "--model", str(folder / "window.safetensors")]
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "z.npy")]).exit_code == 0
    assert_array_equal(model.encode([text]), np.load(tmp_path / "z.npy"))
    with pytest.raises(DataError, match="one window of 24 tokens, a text has 4"):
        model.interpolate(text, "a")


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (["--prior", 9], {"prior": 9}),
        ([], {}),
        (["--latent", "z.npy", "--greedy"], {"latents": LATENTS, "greedy": True}),
        (
            ["--latent", "z.npy", "-n", 3, "--prompt", "日é", "--max-tokens", 9],
            {"latents": LATENTS, "copies": 3, "prompt": "日é", "max_tokens": 9},
        ),
        (["--prior", 9, "--temperature", 1.5, "--top-k", 9], {"prior": 9, "temperature": 1.5, "top_k": 9}),
        (["--prior", 9, "--top-p", 0.7, "--min-p", 0.01], {"prior": 9, "top_p": 0.7, "min_p": 0.01}),
        (["--latent", "z.npy", "--greedy", "--guidance", 2], {"latents": LATENTS, "greedy": True, "guidance": 2}),
    ],
    ids=["prior", "nothing", "greedy", "copies", "top-k", "top-p", "guidance"],
)
def test_texts_are_those_of_gptvae_generate(
    model: Model, command: Callable[..., None], options: list[Any], keywords: dict[str, Any]
) -> None:
    command("generate", *options, "--seed", 5, "--format", "jsonl")
    texts = model.generate(**keywords, seed=5)
    assert texts == written()
    assert len(texts) in (1, 6, 9, 18)


def test_a_path_is_that_of_gptvae_interpolate(model: Model, command: Callable[..., None]) -> None:
    command("interpolate", "--from", "naïve", "--to", "quite another", "--format", "jsonl")
    assert model.interpolate("naïve", "quite another") == written()
    np.save("two.npy", LATENTS[:2])
    command("interpolate", "--latent", "two.npy", "--steps", 9, "--path", "lerp", "--format", "jsonl")
    straight = model.interpolate(LATENTS[0], LATENTS[1:2], steps=9, path="lerp")
    assert straight == written()
    assert len(straight) == 9
    np.save("three.npy", LATENTS[:3])
    command("interpolate", "--latent", "three.npy", "--steps", 4, "--format", "jsonl")
    assert model.interpolate(*LATENTS[:3], steps=4) == written()
    command("interpolate", "--latent", "three.npy", "--steps", 4, "--guidance", 2.5, "--format", "jsonl")
    guided = model.interpolate(*LATENTS[:3], steps=4, guidance=2.5)
    assert guided == written() != model.interpolate(*LATENTS[:3], steps=4)
    assert guided[0] == model.generate(LATENTS[0], greedy=True, guidance=2.5)[0]
    command("interpolate", "--from", "naïve", "--to", "quite another", "--refine", "--format", "jsonl")
    assert model.interpolate("naïve", "quite another", refine=True) == written()
    with pytest.raises(ConfigError, match="refine fits latents to texts, and there are none"):
        model.interpolate(*LATENTS[:2], refine=True)
    assert model.interpolate("naïve", LATENTS[0], steps=2) == [
        *model.generate(model.encode(["naïve"]), greedy=True),
        *model.generate(LATENTS[0], greedy=True),
    ]


def test_bfloat16_is_asked_for_as_in_the_commands(folder: Path, command: Callable[..., None]) -> None:
    rounded = load(folder, device="cpu", dtype="bfloat16")
    command("encode", "texts.txt", "--dtype", "bfloat16")
    assert_array_equal(rounded.encode(TEXTS), np.load("out"))
    assert not np.array_equal(rounded.encode(TEXTS), load(folder, device="cpu").encode(TEXTS))
    command("generate", "--latent", "z.npy", "--greedy", "--dtype", "bfloat16", "--format", "jsonl")
    assert rounded.generate(LATENTS, greedy=True) == written()


# The model ------------------------------------------------------------------------------------------------------------


def test_a_model_is_found_where_the_commands_find_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTVAE_MODEL", str(folder))
    found = load(device="cpu")
    assert_array_equal(found.encode(["a"]), load(str(folder / "model.safetensors"), device="cpu").encode(["a"]))
    monkeypatch.delenv("GPTVAE_MODEL")
    monkeypatch.chdir(folder)
    with pytest.raises(GPTVAEError, match=r"no model in \./gptvae-run, the default place"):
        load(device="cpu")


def test_a_model_says_what_it_is(model: Model, folder: Path) -> None:
    assert model.header == read_header(folder / "model.safetensors")
    assert (model.dim_latent, model.max_seq_len, model.unit) == (WIDTH, LONGEST, "line")
    assert isinstance(model.network, gptvae_cli.GPTVAE)
    assert not model.network.training
    count = sum(weight.numel() for weight in model.network.parameters())
    assert model.path == folder / "model.safetensors"
    told = CliRunner().invoke(app, ["info", "--json", "--model", str(folder)])
    assert model.sha256 == json.loads(told.stdout)["sha256"]
    what = f"{count:,} parameters, latent {WIDTH}, unit line, sha256 {model.sha256[:8]}..."
    assert repr(model) == f"<gptvae_cli.Model {model.path}: {what}>"
    assert len(repr(model.header)) < 5000, "the tokenizer alone has megabytes"


def test_a_notebook_completes_the_names_of_a_model() -> None:
    """jedi 0.20, which does it there, fails for all of them where a property returns a Literal."""
    for name, value in vars(Model).items():
        if isinstance(value, property):
            assert get_origin(get_type_hints(value.fget)["return"]) is not Literal, name


def test_using_a_model_changes_nothing_of_the_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands flush denormals, keep freed memory, and set the threads; a library has no right to."""

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"called with {arguments}")

    for name in ("set_num_threads", "set_flush_denormal", "manual_seed", "set_default_dtype"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr("gptvae_cli.device.ctypes.CDLL", refuse)
    random = torch.get_rng_state()
    model = load(folder, device="cpu")
    model.interpolate("a", "b", steps=2)
    model.generate(prior=2)
    model.encode(["a"], sample=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


# What goes in ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_of_torch_does_not_matter(model: Model, folder: Path, default: torch.dtype) -> None:
    """Some libraries set it to float64."""
    texts = ["one", "another"]
    expected = model.encode(texts), model.nll(texts, samples=3), model.generate(prior=3, seed=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for each in (model, load(folder, device="cpu")):
            found = each.encode(texts), each.nll(texts, samples=3), each.generate(prior=3, seed=1)
            assert np.array_equal(found[0], expected[0])
            assert np.array_equal(found[1], expected[1])
            assert found[2] == expected[2]
    finally:
        torch.set_default_dtype(before)


def test_the_default_device_of_torch_does_not_matter(model: Model, folder: Path) -> None:
    """A notebook may set it to a GPU; "meta" computes nothing at all."""

    def results(model: Model) -> list[Any]:
        texts = ["one", "another"]
        written = [*model.generate(prior=3, seed=1, prompt="a"), *model.interpolate("one", *LATENTS[:2], path="lerp")]
        return [*model.encode(texts, sample=True, seed=1).tolist(), *model.nll(texts, samples=3), written]

    expected = results(model)
    torch.set_default_device("meta")
    try:
        loaded = load(folder, device="cpu")
        assert [results(model), results(loaded)] == [expected] * 2
        assert torch.get_default_device() == torch.device("meta")
    finally:
        torch.set_default_device(None)


def test_nothing_in_gives_nothing_out(model: Model) -> None:
    assert model.encode([]).shape == (0, WIDTH)
    assert model.encode([]).dtype == np.float32
    assert [part.shape for part in model.posterior([])] == [(0, WIDTH)] * 2
    assert model.generate([]) == model.generate(model.encode([])) == model.generate(prior=0) == []


@pytest.mark.parametrize(
    "latents",
    [
        LATENTS.astype(">f8"),
        np.asfortranarray(LATENTS),
        np.repeat(LATENTS, 2, axis=0)[::2],
        LATENTS.tolist(),
        list(LATENTS),
        torch.tensor(LATENTS),
    ],
    ids=["big-endian", "fortran", "strided", "lists", "rows", "tensor"],
)
def test_latents_may_come_in_any_form(model: Model, latents: Any) -> None:
    assert model.generate(latents, greedy=True) == model.generate(LATENTS, greedy=True)


def test_one_latent_needs_no_list(model: Model) -> None:
    assert model.generate(LATENTS[0], seed=1) == model.generate(LATENTS[:1], seed=1)
    half = LATENTS.astype("f2")
    assert model.generate(half, greedy=True) == model.generate(half.astype("f4"), greedy=True)


def test_latents_come_back_from_a_table(model: Model) -> None:
    """What pandas gives NumPy of a column of latents, of nullable numbers, and of a row that holds a text, too."""
    column = np.empty(len(LATENTS), object)
    column[:] = list(LATENTS)
    expected = model.generate(LATENTS, greedy=True)
    for values in (column, LATENTS.astype(object), list(map(list, LATENTS.astype(object)))):
        assert model.generate(values, greedy=True) == expected
    row = np.array(["a text", *LATENTS[0]], object)
    assert model.generate(row[1:], greedy=True) == expected[:1]
    assert model.interpolate(row[1:], column[1], steps=2) == expected[:2]
    with pytest.raises(DataError) as caught:
        model.generate(np.array([LATENTS[0], LATENTS[0, 1:]], object))
    assert "np.stack(column)" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_missing_text_is_told_of_with_what_to_do(model: Model, missing: Any) -> None:
    """In a notebook a traceback is all that one sees."""
    with pytest.raises(DataError, match=r"texts\[1\] is of type \w+, expected a string") as caught:
        model.encode(["a", missing])
    assert "hint: leave missing texts out: column.dropna()" in traceback.format_exception(caught.value)[-1]
    with pytest.raises(DataError) as caught:
        model.encode([b"a"])  # type: ignore[list-item]
    assert caught.value.hint is None


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (LATENTS[:, :-1], "the shape (6, 7), the latents of this model have 8 dimensions"),
        (LATENTS[None], "the shape (1, 6, 8), expected (N, 8) or (8,)"),
        (1.0, "the shape (), expected (N, 8) or (8,)"),
        (LATENTS.astype(int), "holds integers"),
        (LATENTS.astype(complex), "holds complex numbers"),
        (LATENTS > 0, "holds booleans"),
        (np.array([["0.5"] * WIDTH], object), "holds text"),
        (LATENTS.astype(object)[:, :2], "the shape (6, 2), the latents of this model have 8 dimensions"),
        (np.array([[object()] * WIDTH]), "cannot be made an array of floats"),
        (np.array([[None] * WIDTH]), "row 0, dimension 0 (both from 0): nan"),
        (HOLED, "row 2, dimension 3 (both from 0): nan"),
        (np.full((1, WIDTH), 1e300), "too large for a latent"),
        ("a text", "holds text"),
        (["a text"], "holds text"),
        ([[0.5] * WIDTH, [0.5]], "cannot be made an array"),
        (torch.zeros(WIDTH, requires_grad=True), "cannot be made an array"),
        (None, "holds Python objects"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_latents_are_checked_as_those_of_a_file(model: Model, latents: Any, words: str) -> None:
    if latents is not None:
        with pytest.raises(DataError) as caught:
            model.generate(latents)
        assert words in caught.value.message
    if not isinstance(latents, str):
        with pytest.raises(DataError) as caught:
            model.interpolate("a", latents)
        assert words in caught.value.message


class Table(list[str]):
    """As of pandas, which gives the names of its columns one by one."""

    columns = ("a", "b")


def test_a_point_of_a_path_is_one_latent(model: Model) -> None:
    with pytest.raises(DataError, match=r"points\[1\] holds 6 latents"):
        model.interpolate("a", LATENTS)
    with pytest.raises(DataError, match=r"points\[0\] holds 0 latents"):
        model.interpolate([], "b")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.encode("one"), "texts is one string, expected a list"),
        (lambda model: model.posterior("one"), "texts is one string, expected a list"),
        (lambda model: model.encode(["a"], seed=-1), "seed is -1"),
        (lambda model: model.generate(LATENTS, prior=2), "latents and prior exclude each other"),
        (lambda model: model.encode(None), "texts is of type NoneType, expected a list of strings"),
        (lambda model: model.encode(np.array("a")), "texts is of type ndarray, expected a list of strings"),
        (lambda model: model.encode({"a text": 1}), "texts is of type dict, expected a list of strings"),
        (lambda model: model.nll(Table(["a text"])), "texts is of type Table, expected a list of strings"),
        (lambda model: model.generate(5), "latents is 5, expected an array"),
        (lambda model: model.generate(top_k=True), "top-k is True"),
        (lambda model: model.generate(copies=True), "copies is True"),
        (lambda model: model.generate(prior=-1), "prior is -1"),
        (lambda model: model.generate(prior=2.0), "prior is 2.0, it must be a whole number, 0 or more"),
        (lambda model: model.generate(copies=0), "copies is 0, it must be a whole number, 1 or more"),
        (lambda model: model.generate(copies="2"), "copies is '2'"),
        (lambda model: model.generate(prompt=None), "prompt is of type NoneType, expected a string"),
        (lambda model: model.generate(temperature=None), "temperature is None, it must be a number"),
        (lambda model: model.generate(seed=1.5), "seed is 1.5"),
        (lambda model: model.generate(temperature=0), "temperature is 0"),
        (lambda model: model.generate(top_p=2), "top-p is 2"),
        (lambda model: model.generate(prompt="a\nb"), "the prompt holds a line break"),
        (lambda model: model.nll("one"), "texts is one string, expected a list"),
        (lambda model: model.nll(["a"], samples=0), "samples is 0"),
        (lambda model: model.nll(["a"], seed=-1), "seed is -1"),
        (lambda model: model.interpolate("a", "b", steps=1), "steps is 1"),
        (lambda model: model.interpolate("a", "b", steps=3.0), "steps is 3.0, it must be a whole number, 2 or more"),
        (lambda model: model.interpolate(), "a path needs at least 2 latents, found 0"),
        (lambda model: model.interpolate("a"), "a path needs at least 2 latents, found 1"),
        (lambda model: model.interpolate("a", "b", path="spline"), "path is 'spline', it must be one of slerp, lerp"),
    ],
)
def test_an_argument_that_cannot_be_is_a_config_error(model: Model, call: Callable[[Model], Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call(model)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a", float("nan")], "texts[1] is of type float, expected a string"),
        ([None], "texts[0] is of type NoneType"),
        (b"bytes", "texts[0] is of type int"),
        (["a", "b\udcff"], "lone surrogate U+DCFF"),
    ],
)
def test_what_is_no_text_is_a_data_error(model: Model, texts: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        model.encode(texts)
    assert words in caught.value.message


def test_a_device_may_be_one_of_torch(folder: Path) -> None:
    assert load(folder, device=torch.device("cpu")).network.device == torch.device("cpu")
    with pytest.raises(ConfigError, match="device is 'None', it must be auto, cpu, cuda"):
        load(folder, device=None)  # type: ignore[arg-type]


def test_what_cannot_be_loaded_is_told(folder: Path) -> None:
    with pytest.raises(gptvae_cli.CheckpointError, match="no model in"):
        load(folder / "nowhere")
    with pytest.raises(gptvae_cli.DeviceError, match="cuda:77"):
        load(folder, device="cuda:77")
    with pytest.raises(ConfigError, match="path is of type int"):
        load(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        load(folder, device="cpu", dtype="int8")  # type: ignore[arg-type]


def test_a_text_that_is_cut_is_warned_of_at_the_line_that_gave_it(model: Model) -> None:
    for call in (
        lambda: model.encode(["x" * 60, "a"]),
        lambda: model.posterior(["x" * 60]),
        lambda: model.interpolate("a", "x" * 60, steps=2),
        lambda: model.nll(["x" * 60], samples=1),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [str(w.message)[:52] for w in caught] == ["1 text is longer than the model's 24 tokens; the beg"]
        assert caught[0].filename == __file__


# Randomness -----------------------------------------------------------------------------------------------------------


def test_without_a_seed_every_call_is_another_draw(model: Model) -> None:
    assert model.generate(prior=20) != model.generate(prior=20)
    assert not np.array_equal(model.encode(["a"], sample=True), model.encode(["a"], sample=True))
    assert model.generate(prior=20, seed=3)[:4] == model.generate(prior=4, seed=3)
    assert_array_equal(model.encode(["a"]), model.encode(["a"]))


# Threads and processes ------------------------------------------------------------------------------------------------


def test_a_process_that_is_forked_after_loading_computes(tmp_path: Path) -> None:
    """As servers do, to share the weights. With helpers of OpenMP in the thread that forks it would wait for ever."""
    make_model(tmp_path / "model.safetensors", dim=256)  # which is copied by several threads
    program = (
        "import os, sys, torch\n"
        "from gptvae_cli import load\n"
        "torch.set_num_threads(2)\n"
        "model = load(sys.argv[1], device='cpu')\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "torch.ones(300, 300) @ torch.ones(300, 300)\n"
        "print(model.encode(['a']).shape)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.communicate(timeout=60)[0] == f"(1, {WIDTH})\n"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_model_that_is_pickled_is_the_same_elsewhere(model: Model, folder: Path) -> None:
    """As joblib and scikit-learn do it; the weights as they are now, and in the type that was asked for."""
    rough = load(folder, device="cpu", dtype="bfloat16")
    with torch.no_grad():
        rough.network.decoder.to_logits.weight.mul_(1.5)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        for each in (model, rough):
            assert_array_equal(other.submit(each.encode, TEXTS).result(timeout=120), each.encode(TEXTS))
            again = pickle.loads(pickle.dumps(each))
            assert again.generate(LATENTS, greedy=True) == each.generate(LATENTS, greedy=True)
            assert again.header == each.header


# The package ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy_until_a_name_is_asked_for() -> None:
    program = (
        "import sys, gptvae_cli; dir(gptvae_cli)\n"
        "heavy = {'torch', 'numpy', 'x_transformers', 'safetensors', 'tokenizers', 'typer', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "gptvae_cli.GPTVAEError\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not hasattr(gptvae_cli, 'save')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_warns_of_nothing() -> None:
    """A project whose tests take warnings for errors has to get past the first line."""
    program = "import gptvae_cli; [getattr(gptvae_cli, name) for name in gptvae_cli.__all__]"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_every_name_of_the_package_is_there() -> None:
    for name in gptvae_cli.__all__:
        assert getattr(gptvae_cli, name) is not None
        assert name in dir(gptvae_cli)
    errors = [name for name in gptvae_cli.__all__ if name.endswith("Error")]
    assert all(issubclass(getattr(gptvae_cli, name), GPTVAEError) for name in errors)


# Without a latent -----------------------------------------------------------------------------------------------------


def test_a_baseline_writes_texts_and_refuses_latents(tmp_path: Path) -> None:
    """As the commands do: its encoder never learnt anything."""
    path = make_model(tmp_path / "baseline.safetensors", train={"latents_dropout_prob": 1.0})
    baseline = load(path, device="cpu")
    for use in (
        lambda: baseline.encode(["a"]),
        lambda: baseline.posterior(["a"]),
        lambda: baseline.generate(LATENTS),
        lambda: baseline.interpolate("a", LATENTS[0]),
        lambda: baseline.generate(prior=1, guidance=2),
    ):
        with pytest.raises(CheckpointError, match="the model has no latent"):
            use()
    result = CliRunner().invoke(app, ["generate", "--prior", "3", "--seed", "5", "-q", "--model", str(path)])
    assert result.exit_code == 0, result.stderr
    assert baseline.generate(prior=3, seed=5) == result.stdout.removesuffix("\n").split("\n")


def test_a_decoder_that_always_had_a_latent_cannot_be_guided(tmp_path: Path) -> None:
    path = make_model(tmp_path / "always.safetensors", train={"latents_dropout_prob": 0.0})
    always = load(path, device="cpu")
    assert always.generate(LATENTS, greedy=True, guidance=1) == always.generate(LATENTS, greedy=True)
    message = "guidance compares with no latent, and .* has always had one: --latents-dropout-prob was 0"
    with pytest.raises(CheckpointError, match=message):
        always.generate(LATENTS, guidance=2)
    with pytest.raises(CheckpointError, match=message):
        always.generate(prior=1, guidance=0.5)
    with pytest.raises(CheckpointError, match=message):
        always.interpolate(*LATENTS[:2], guidance=2)


def test_a_text_alone_has_no_likelihood_where_latents_come_from_others(tmp_path: Path) -> None:
    """And no latent can be fitted to it."""
    aligned = load(make_model(tmp_path / "aligned.safetensors", latents_from="train.txt"), device="cpu")
    for use in (lambda: aligned.encode(["a"], refine=True), lambda: aligned.interpolate("a", "b", refine=True)):
        with pytest.raises(CheckpointError, match="writes other texts than it encodes"):
            use()
    with pytest.raises(ConfigError, match="come from other texts than it writes") as caught:
        aligned.nll(["a"])
    assert "--latents-from --per-text" in str(caught.value.hint)
