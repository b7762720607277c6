"""What a model file says about itself, read without torch.

A model is one `.safetensors` file: weights, and in the metadata of its header all that is needed to use them.
Files come from strangers, so nothing in a header is believed before it is checked, and sizes are checked before
memory is spent on them.

Source: https://huggingface.co/docs/safetensors (8 bytes of length, little-endian; JSON; tensors, end to end).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptvae_cli.config import Config, DataConfig, ModelConfig, from_dict
from gptvae_cli.errors import CheckpointError, ConfigError

FORMAT_VERSION = 1
VERSION_KEY = "gptvae_format_version"
"""The metadata key that makes a `.safetensors` file one of ours."""
DIGEST_KEY = "sha256"
"""The metadata key of a checksum over everything else in a file, which also tells models apart."""
STATE_KEY = "state"
"""The metadata key that only a training state has."""

DEFAULT_RUN = "./gptvae-run"
MODEL_NAME = "model.safetensors"
STATE_NAME = "state.safetensors"
METRICS_NAME = "metrics.jsonl"
CACHE_NAME = "cache"

_MAX_HEADER_BYTES = 100_000_000  # as in the reference library; a BPE of a million tokens takes about 50 MB
_MAX_RANK = 8
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
_DAMAGED = "the file is damaged or incomplete, make or copy it again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's type, as safetensors names it (`F32`), and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The checked header of any `.safetensors` file."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    size_bytes: int


@dataclass(frozen=True)
class ModelHeader:
    """All of a model but its weights.

    Args:
        format_version: of the file; a reader refuses versions above its own.
        model: the architecture.
        data: what a text is, for encoding and for writing.
        tokenizer: JSON of the `tokenizers` library.
        training: what was trained, on what, how long, with which figures; for people and `info`.
    """

    format_version: int
    model: ModelConfig
    data: DataConfig
    tokenizer: str = field(repr=False)
    training: dict[str, Any]

    @property
    def has_latent(self) -> bool:
        """Whether the model has learnt what a latent is; a baseline (see `TrainConfig.without_latent`) has not."""
        return self._latents_dropout != 1

    @property
    def takes_guidance(self) -> bool:
        """Whether the decoder has learnt to write both with a latent and without one."""
        return self._latents_dropout not in (0, 1)

    @property
    def _latents_dropout(self) -> object:
        train = self.training.get("train")
        return train.get("latents_dropout_prob") if isinstance(train, dict) else None

    @property
    def reads_other_texts(self) -> bool:
        """Whether the latents come from other texts than the model writes: it was trained with `--latents-from`."""
        return self.has_latent and self.data.latents_from is not None

    def require(self, name: str | Path, *, latent: bool = True, guidance: float = 1.0, refine: bool = False) -> None:
        """Keeps a model from what it has not learnt, and would make nonsense of.

        Args:
            name: what the error calls the model.
            latent: reading or giving latents.
            guidance: see `SampleConfig`; 1 is none, which every model takes.
            refine: fitting latents to texts.

        Raises:
            CheckpointError: for a model that was trained without a latent, or, with guidance, always with one; to
                refine, for one that writes other texts than it encodes.
        """
        if (latent or guidance != 1 or refine) and not self.has_latent:
            raise CheckpointError(
                f"{name} has no latent: it was trained as a baseline, with --latents-dropout-prob 1",
                hint="name another model; this one writes texts of its own: gptvae generate --prior N",
            )
        if guidance != 1 and not self.takes_guidance:
            raise CheckpointError(
                f"guidance compares with no latent, and {name} has always had one: --latents-dropout-prob was 0",
                hint="leave guidance out, or train with --latents-dropout-prob 0.1",
            )
        if refine and self.reads_other_texts:
            raise CheckpointError(
                f"a latent is refined so that its text comes back, and {name} writes other texts than it encodes",
                hint="leave refining out",
            )

    def to_metadata(self) -> dict[str, str]:
        """The header as safetensors metadata, whose values must be strings.

        JSON is kept in ASCII: a path that is not UTF-8 holds surrogates, which survive only as escapes.
        """
        return {
            VERSION_KEY: str(self.format_version),
            "model": json.dumps(asdict(self.model)),
            "data": json.dumps(asdict(self.data)),
            "tokenizer": self.tokenizer,
            "training": json.dumps(self.training),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelHeader:
        """Reads what `to_metadata` wrote.

        Raises:
            CheckpointError: for metadata that is not a gptvae model's, newer than this version, or malformed.
        """
        version = check_version(metadata)
        if STATE_KEY in metadata:
            raise CheckpointError(
                "it is a training state, not a model", hint=f"use {MODEL_NAME}, which lies in the same folder"
            )
        for key in ("model", "data", "tokenizer", "training"):
            if key not in metadata:
                raise CheckpointError(f"its metadata has no {key!r}", hint=_DAMAGED)
        return cls(
            format_version=version,
            model=_config(ModelConfig, "model", metadata["model"]),
            data=_config(DataConfig, "data", metadata["data"]),
            tokenizer=metadata["tokenizer"],
            training=json_object(metadata["training"], "its training summary"),
        )


def locate_model(path: str | None) -> Path:
    """The model file that a command means: `path`, else `$GPTVAE_MODEL`, else `./gptvae-run`.

    A folder stands for the `model.safetensors` in it.

    Raises:
        CheckpointError: where there is no such file, saying where it was looked for.
        ConfigError: for an empty name.
    """
    if path == "":
        raise ConfigError("the name of the model is empty", hint="leave it out for the default, or name one")
    environment = os.environ.get("GPTVAE_MODEL")
    place, origin = DEFAULT_RUN, "the default place"
    if path is not None:
        place, origin = path, "the path that was given"
    elif environment:
        place, origin = environment, "named by $GPTVAE_MODEL"

    found = Path(place)
    with reading(found):
        if found.is_dir():
            if (found / MODEL_NAME).exists():
                return found / MODEL_NAME
            if (found / STATE_NAME).exists():
                raise CheckpointError(
                    f"it holds a training state but no {MODEL_NAME} yet, training has just begun or stopped too early",
                    hint=f"wait for it, or go on with it: gptvae train --resume --out {shlex.quote(place)}",
                )
        elif found.exists():
            return found
    raise CheckpointError(
        f"no model in {place}, {origin}", hint="train one first: gptvae train corpus.txt; or name one: --model PATH"
    )


def read_header(path: Path) -> ModelHeader:
    """What a model file says about itself.

    Raises:
        CheckpointError: for a file that is missing, damaged, foreign or newer than this version.
    """
    layout = read_layout(path)
    with reading(path):
        return ModelHeader.from_metadata(layout.metadata)


def read_layout(path: Path) -> Layout:
    """Reads and checks the header of a `.safetensors` file; the tensors' bytes stay on the disk.

    Raises:
        CheckpointError: for a file that is missing, unreadable or not well-formed.
    """
    with reading(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise CheckpointError("it is not a regular file", hint="name a .safetensors file or a run folder")
        with path.open("rb") as file:
            start = file.read(8)
            if start.startswith(b"\x93NUMPY"):
                raise CheckpointError("it holds latents, not a model", hint="gptvae generate --latent reads them")
            header_bytes = int.from_bytes(start, "little")
            if status.st_size < 8 or header_bytes > min(status.st_size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError("it is not a .safetensors file, or was cut short", hint=_DAMAGED)
            raw = file.read(header_bytes)
        header = json_object(raw, "its header")
        metadata = _checked_metadata(header.pop("__metadata__", {}))
        tensors = _checked_tensors(header, status.st_size - 8 - header_bytes)
    return Layout(metadata, tensors, status.st_size)


def check_version(metadata: Mapping[str, str]) -> int:
    """The format version of one of our files.

    Raises:
        CheckpointError: for a file that is not ours or was written by a later version.
    """
    text = metadata.get(VERSION_KEY)
    if text is None:
        raise CheckpointError(
            f"it is not a gptvae model, its metadata has no {VERSION_KEY!r}",
            hint="train one: gptvae train corpus.txt",
        )
    version = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if version < 1:
        raise CheckpointError(f"its format version is {brief(text)}, it must be a whole number", hint=_DAMAGED)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"it has format version {version}, this gptvae reads up to {FORMAT_VERSION}",
            hint="upgrade: pip install --upgrade gptvae",
        )
    return version


def json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object of a stranger: UTF-8, no key twice, no nesting that exhausts the stack.

    Raises:
        CheckpointError: for anything else; `what` begins the message.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {str(error)[:200]}", hint=_DAMAGED) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object", hint=_DAMAGED)
    return value


def stored_config(kind: type[Config], what: str, values: object) -> Config:
    """A configuration that a file holds.

    Raises:
        CheckpointError: for one that is none. The user did not type it: it is bad input, not wrong usage.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"its {what} configuration is not a JSON object", hint=_DAMAGED)
    try:
        return from_dict(kind, values)
    except ConfigError as error:
        message = f"its {what} configuration is wrong: {error.message[:200]}"
        raise CheckpointError(message, hint=_DAMAGED) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Puts the file's name in front of what went wrong with it, and translates the system's errors."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"cannot load {path}: {error.message}", hint=error.hint) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"cannot load {path}: there is no such file", hint="check the path") from error
    except OSError as error:
        raise CheckpointError(
            f"cannot load {path}: {error.strerror or error}", hint="check the path and its permissions"
        ) from error


def brief(text: object) -> str:
    """A stranger's value, quoted, on one line and not longer than a line should be."""
    quoted = repr(text)
    return quoted if len(quoted) <= 120 else quoted[:117] + "..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:  # readers differ in which one they take, so a file could say two things
            raise ValueError(f"the key {brief(key)} occurs twice")
        result[key] = value
    return result


def _config(kind: type[Config], what: str, text: str) -> Config:
    return stored_config(kind, what, json_object(text, f"its {what} configuration"))


def _checked_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("its metadata is not text", hint=_DAMAGED)
    try:
        "".join([*metadata, *metadata.values()]).encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError("its metadata is not valid Unicode", hint=_DAMAGED) from error
    return metadata


def _checked_tensors(entries: Mapping[str, object], data_bytes: int) -> dict[str, TensorInfo]:
    """Tensors of a header, which must fill the `data_bytes` behind it without a gap or an overlap."""
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
                pass
            case _:
                raise CheckpointError(f"tensor {brief(name)} is not described as one", hint=_DAMAGED)
        if dtype not in _ITEM_BYTES:
            raise CheckpointError(f"tensor {brief(name)} has the unknown type {brief(dtype)}", hint=_DAMAGED)
        # `type`, not `isinstance`: True is an int. Sizes are bounded first, for their product may not be.
        if len(shape) > _MAX_RANK or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise CheckpointError(f"tensor {brief(name)} has the shape {brief(shape[: _MAX_RANK + 1])}", hint=_DAMAGED)
        tensors[name] = TensorInfo(dtype, tuple(shape))
        if tensors[name].numel * _ITEM_BYTES[dtype] != end - start:
            raise CheckpointError(
                f"tensor {brief(name)} of shape {tuple(shape)} does not fill its bytes", hint=_DAMAGED
            )
        spans.append((start, end))
    reached = 0
    for start, end in sorted(spans):
        if start != reached:
            raise CheckpointError("its tensors overlap or leave a gap", hint=_DAMAGED)
        reached = end
    if reached != data_bytes:
        raise CheckpointError(f"its tensors take {reached} bytes, the file has {data_bytes} for them", hint=_DAMAGED)
    return tensors
