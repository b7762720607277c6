"""A model's metadata, and the checking of files that strangers made."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gptvae_cli.config import DataConfig, ModelConfig
from gptvae_cli.errors import CheckpointError, ExitCode
from gptvae_cli.header import (
    FORMAT_VERSION,
    VERSION_KEY,
    ModelHeader,
    TensorInfo,
    locate_model,
    read_header,
    read_layout,
)

HEADER = ModelHeader(
    format_version=FORMAT_VERSION,
    model=ModelConfig(
        num_tokens=259,
        dim=16,
        depth=2,
        enc_depth=1,
        max_seq_len=32,
        dim_latent=4,
        heads=2,
        pad_id=256,
        bos_id=257,
        eos_id=258,
        conditioning="token",
    ),
    data=DataConfig(unit="paragraph"),
    tokenizer='{"version": "1.0", "model": "é 中"}',
    training={"steps": 10, "corpus": ["a.txt"], "nll": 12.5},
)
F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_model(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A file as the reference library writes it."""
    tensors: dict[str, Any] = {
        "a": np.ones((2, 3), np.float32),
        "b": np.arange(4, dtype=np.int64),
        "c": np.ones((0, 5), np.float32),
    }
    save_file(tensors, path, metadata=HEADER.to_metadata() if metadata is None else metadata)
    return path


def write_raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"", *, claimed: int | None = None) -> Path:
    """A file as an attacker writes it."""
    raw = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes((len(raw) if claimed is None else claimed).to_bytes(8, "little") + raw + data)
    return path


def assert_refused(path: Path, *said: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    error = caught.value
    assert error.exit_code == ExitCode.BAD_INPUT
    assert error.message.startswith(f"cannot load {path}: ")
    assert error.message.isprintable(), "one line, and nothing that a terminal obeys"
    assert len(error.message) < len(str(path)) + 500
    for text in said:
        assert text in error.message
    return error


def test_header_survives_the_way_through_metadata() -> None:
    metadata = HEADER.to_metadata()
    assert all(isinstance(text, str) for item in metadata.items() for text in item)
    assert ModelHeader.from_metadata(metadata) == HEADER


def test_paths_that_are_not_utf8_and_infinite_figures_survive_in_a_file(tmp_path: Path) -> None:
    """Such a path is a string with lone surrogates, which safetensors cannot encode unless they are escaped."""
    training = {"corpus": os.fsdecode(b"caf\xe9.txt"), "best": float("inf")}
    header = replace(HEADER, data=DataConfig(latents_from=os.fsdecode(b"\xff.txt")), training=training)
    assert read_header(write_model(tmp_path / "m.safetensors", header.to_metadata())) == header


def test_file_of_the_reference_library_is_read_in_full(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.safetensors")
    assert read_header(path) == HEADER
    layout = read_layout(path)
    assert layout.tensors == {
        "a": TensorInfo("F32", (2, 3)),
        "b": TensorInfo("I64", (4,)),
        "c": TensorInfo("F32", (0, 5)),
    }
    assert sum(tensor.numel for tensor in layout.tensors.values()) == 10
    assert layout.size_bytes == path.stat().st_size


def test_reading_a_header_loads_nothing_heavy(tmp_path: Path) -> None:
    """`info` answers at once because nothing on its way imports torch, numpy, safetensors or tokenizers."""
    path = write_model(tmp_path / "m.safetensors")
    heavy = "{'torch', 'numpy', 'safetensors', 'tokenizers', 'x_transformers'}"
    code = (
        "import sys; from pathlib import Path; from gptvae_cli.header import read_header;"
        f"read_header(Path(sys.argv[1])); print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = write_model(tmp_path / "m.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(40), *range(40, len(content), 13), len(content) - 1]:
        cut.write_bytes(content[:length])
        assert_refused(cut)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes() + b"\0")
    assert_refused(path, "its tensors take 56 bytes, the file has 57 for them")


@pytest.mark.parametrize("claimed", [2**64 - 1, 2**63, 2**40, 100])
def test_header_that_claims_more_than_the_file_is_refused(tmp_path: Path, claimed: int) -> None:
    """Reading what is claimed, before looking at the file's size, would ask for exabytes."""
    assert_refused(write_raw(tmp_path / "m.safetensors", b"{}", claimed=claimed), "cut short")


def test_header_above_the_cap_is_refused_even_in_a_file_that_long(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.safetensors", b"{}", claimed=2**27)
    os.truncate(path, 2**28)  # sparse: it takes no space
    assert_refused(path, "not a .safetensors file")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        pytest.param(b'{"a": {}, "a": {}}', "the key 'a' occurs twice", id="duplicate tensor"),
        pytest.param(b'{"__metadata__": {"k": "1", "k": "2"}}', "the key 'k' occurs twice", id="duplicate metadata"),
        pytest.param(b'{"a":' + b"[" * 200_000, "not valid JSON", id="nesting"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON", id="endless integer"),
        pytest.param(b'{"\xff": 1}', "not valid JSON", id="not UTF-8"),
        pytest.param(b"\xef\xbb\xbf{}", "not valid JSON", id="BOM"),
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b"[]", "not a JSON object", id="list"),
        pytest.param(b'{"__metadata__": []}', "metadata is not text", id="metadata is a list"),
        pytest.param(b'{"__metadata__": {"k": 1}}', "metadata is not text", id="metadata holds a number"),
        pytest.param(b'{"__metadata__": {"k": "\\ud800"}}', "not valid Unicode", id="lone surrogate"),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, header: bytes, said: str) -> None:
    """The reference reader takes the last of two equal keys in silence; Python's parser exhausts the stack."""
    assert_refused(write_raw(tmp_path / "m.safetensors", header), said)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        pytest.param({"a": 1}, "tensor 'a' is not described", id="a number"),
        pytest.param({"a": {"dtype": "F32", "shape": [2]}}, "tensor 'a' is not described", id="no offsets"),
        pytest.param({"a": {**F32_2, "data_offsets": [0, 8, 8]}}, "not described", id="three offsets"),
        pytest.param({"a": {**F32_2, "data_offsets": [0.0, 8.0]}}, "not described", id="float offsets"),
        pytest.param({"a": {**F32_2, "dtype": "F99"}}, "unknown type 'F99'", id="unknown type"),
        pytest.param({"a": {**F32_2, "shape": [-2]}}, "has the shape [-2]", id="negative"),
        pytest.param({"a": {**F32_2, "shape": [True, 2]}}, "has the shape", id="boolean size"),
        pytest.param({"a": {**F32_2, "shape": [2.0]}}, "has the shape", id="float size"),
        pytest.param({"a": {**F32_2, "shape": [1] * 1000}}, "has the shape", id="rank"),
        pytest.param({"a": {**F32_2, "shape": [0, 10**4000]}}, "has the shape", id="huge size"),
        pytest.param({"a": {**F32_2, "shape": [3]}}, "does not fill its bytes", id="wrong size"),
        pytest.param({"a": {**F32_2, "data_offsets": [8, 0]}}, "does not fill its bytes", id="backwards"),
        pytest.param({"a": {**F32_2, "data_offsets": [-8, 0]}}, "overlap or leave a gap", id="negative offset"),
        pytest.param({"a": {**F32_2, "data_offsets": [8, 16]}}, "overlap or leave a gap", id="gap"),
        pytest.param({"a": F32_2, "b": F32_2}, "overlap or leave a gap", id="overlap"),
        pytest.param(
            {"a": F32_2, "b": {**F32_2, "data_offsets": [8, 16]}}, "take 16 bytes, the file has 8", id="beyond the file"
        ),
        pytest.param({"\x1b[31m\n" + "x" * 10_000: 1}, "is not described", id="name with escapes"),
    ],
)
def test_tensor_that_does_not_fit_the_file_is_refused(tmp_path: Path, tensors: dict[str, Any], said: str) -> None:
    assert_refused(write_raw(tmp_path / "m.safetensors", tensors, bytes(8)), said)


def test_foreign_safetensors_file_is_told_from_a_model(tmp_path: Path) -> None:
    error = assert_refused(write_model(tmp_path / "m.safetensors", {"format": "pt"}), "not a gptvae model")
    assert error.hint == "train one: gptvae train corpus.txt"


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        pytest.param({VERSION_KEY: "2"}, "format version 2, this gptvae reads up to 1", "upgrade", id="newer"),
        pytest.param({VERSION_KEY: "0"}, "whole number", "damaged", id="version 0"),
        pytest.param({VERSION_KEY: "9" * 5000}, "whole number", "damaged", id="endless version"),
        pytest.param({VERSION_KEY: "²"}, "whole number", "damaged", id="a digit that int() refuses"),
        pytest.param({"state": "{}"}, "a training state, not a model", "model.safetensors", id="state"),
        pytest.param({"model": "{}"}, "ModelConfig needs a value for num_tokens", "damaged", id="missing field"),
        pytest.param({"data": '{"x": 1}'}, "DataConfig has no field 'x'", "damaged", id="unknown field"),
        pytest.param({"data": '{"unit": "word"}'}, "unit is 'word'", "damaged", id="value out of range"),
        pytest.param({"data": '{"vocab_size": "1"}'}, "vocab-size is '1'", "damaged", id="value of another type"),
        pytest.param({"data": json.dumps({"unit": "x" * 10**6})}, "unit is 'xxx", "damaged", id="long value"),
        pytest.param({"data": '{"field": "a", "field": "b"}'}, "'field' occurs twice", "damaged", id="duplicate"),
        pytest.param({"training": "[" * 200_000}, "its training summary is not valid JSON", "damaged", id="nesting"),
        pytest.param({"training": "[]"}, "its training summary is not a JSON object", "damaged", id="list"),
    ],
)
def test_metadata_that_cannot_be_used_is_bad_input(
    tmp_path: Path, change: dict[str, str], said: str, hint: str
) -> None:
    """A wrong configuration in a file is exit code 3, although the same value on the command line is 2."""
    path = write_model(tmp_path / "m.safetensors", {**HEADER.to_metadata(), **change})
    assert hint in (assert_refused(path, said).hint or "")


@pytest.mark.parametrize("key", ["model", "data", "tokenizer", "training"])
def test_missing_metadata_is_named(tmp_path: Path, key: str) -> None:
    metadata = HEADER.to_metadata()
    del metadata[key]
    assert_refused(write_model(tmp_path / "m.safetensors", metadata), f"its metadata has no {key!r}")


def test_what_is_not_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """Opening a named pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "not a regular file")
    assert_refused(tmp_path, "not a regular file")
    assert_refused(tmp_path / "missing", "there is no such file")


def test_mutated_header_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    content = write_model(tmp_path / "m.safetensors").read_bytes()
    mutant = tmp_path / "mutant.safetensors"
    chance = random.Random(0)
    refused = 0
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        mutant.write_bytes(changed)
        try:
            read_layout(mutant)
            read_header(mutant)
        except CheckpointError:
            assert_refused(mutant)
            refused += 1
    assert refused > 250


class TestLocateModel:
    @pytest.fixture(autouse=True)
    def in_an_empty_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("GPTVAE_MODEL", raising=False)

    def run(self, name: str, file: str = "model.safetensors") -> Path:
        Path(name).mkdir()
        (Path(name) / file).touch()
        return Path(name) / file

    def test_path_wins_over_environment_and_environment_over_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        default, named, given = self.run("gptvae-run"), self.run("named"), self.run("given")
        assert locate_model(None) == default
        monkeypatch.setenv("GPTVAE_MODEL", "named")
        assert locate_model(None) == named
        assert locate_model("given") == given

    def test_file_is_taken_as_it_is(self) -> None:
        Path("any.name").touch()
        assert locate_model("any.name") == Path("any.name")

    def test_empty_variable_counts_as_unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`GPTVAE_MODEL= gptvae info` is how a shell unsets a variable for one command."""
        monkeypatch.setenv("GPTVAE_MODEL", "")
        default = self.run("gptvae-run")
        assert locate_model(None) == default

    @pytest.mark.parametrize(
        ("given", "environment", "said"),
        [
            (None, None, "no model in ./gptvae-run, the default place"),
            (None, "lost", "no model in lost, named by $GPTVAE_MODEL"),
            ("gone", "lost", "no model in gone, the path that was given"),
            ("empty", None, "no model in empty, the path that was given"),
        ],
    )
    def test_missing_model_says_where_it_looked(
        self, given: str | None, environment: str | None, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("empty").mkdir()
        if environment is not None:
            monkeypatch.setenv("GPTVAE_MODEL", environment)
        with pytest.raises(CheckpointError) as caught:
            locate_model(given)
        assert caught.value.message == said
        assert caught.value.hint == "train one first: gptvae train corpus.txt; or name one: --model PATH"

    def test_run_that_stopped_before_its_first_model_hints_to_go_on(self) -> None:
        self.run("early run", "state.safetensors")
        with pytest.raises(CheckpointError, match=r"no model\.safetensors yet") as caught:
            locate_model("early run")
        assert caught.value.hint == "wait for it, or go on with it: gptvae train --resume --out 'early run'"
