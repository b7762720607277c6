"""Models and training states on the disk: `.safetensors` files, replaced atomically and loaded strictly.

`header.py` checks a file before safetensors opens it; this module checks what is in the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptvae_cli.config import ModelConfig
from gptvae_cli.errors import CheckpointError, GPTVAEError
from gptvae_cli.files import behind_links, is_utf8, remove_file, write_atomically
from gptvae_cli.header import (
    DIGEST_KEY,
    FORMAT_VERSION,
    STATE_KEY,
    VERSION_KEY,
    ModelHeader,
    brief,
    check_version,
    json_object,
    read_layout,
    reading,
)
from gptvae_cli.model import GPTVAE
from gptvae_cli.tokenizer import Tokenizer

_UNFIT = "the file is damaged or was edited, use one as gptvae wrote it"


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to use, in evaluation mode, with what belongs to it, the checksum of its file, and the type
    to compute in: weights are float32, and bfloat16 is autocast's."""

    model: GPTVAE
    tokenizer: Tokenizer
    header: ModelHeader
    sha256: str
    dtype: torch.dtype = torch.float32

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew of its header and its weights where it goes to another process, as modules of x-transformers cannot
        be pickled."""
        weights = model_tensors(self.model)
        return _built, (self.header, self.sha256, weights, self.model.device, self.dtype)


@dataclass(frozen=True)
class State:
    """A training state as it was saved.

    Args:
        tensors: on the CPU.
        metadata: JSON values.
        note: why this is the previous state and not the newest, for people; None where it is the newest.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    note: str | None


def load(path: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Builds a model from its file alone.

    Raises:
        CheckpointError: for a file that is missing, damaged, foreign, or whose tensors are not exactly those of
            the configuration in its header.
    """
    read_layout(path)
    with reading(path):
        metadata, tensors = _open(path)
        header = ModelHeader.from_metadata(metadata)
        _check_digest(metadata, tensors)
        return _built(header, metadata[DIGEST_KEY], tensors, device, dtype)


def _built(
    header: ModelHeader, sha256: str, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Checkpoint:
    tokenizer = load_tokenizer(header.tokenizer, header.model)
    _check_fit(tensors, model_tensors(claimed_model(header.model, tensors)))
    check_finite(tensors)
    with _NoInit():
        model = GPTVAE.from_config(header.model).float()  # whatever torch's default is
    fill_model(model, tensors)
    return Checkpoint(model.to(device).eval(), tokenizer, header, sha256, dtype)


class _NoInit(TorchFunctionMode):
    """Within, this thread draws no weights, which a file's will replace: the caller's generator is left alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def save_model(path: Path, model: GPTVAE, header: ModelHeader) -> None:
    """Writes a model file, replacing one that is there in one step.

    Raises:
        GPTVAEError: where the file cannot be written; one that was there is unchanged.
    """
    _save(path, model_tensors(model), header.to_metadata())


def save_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes a training state; the one that was there becomes `state.prev.safetensors`, so one is always good.

    Args:
        path: the newest state's file.
        tensors: whatever is big; no two may share memory (see `model_tensors`).
        metadata: whatever is small, as JSON values; infinities and NaN are kept.

    Raises:
        GPTVAEError: where the file cannot be written; the states that were there are unchanged.
    """
    values = {VERSION_KEY: str(FORMAT_VERSION), STATE_KEY: json.dumps(metadata)}
    _save(path, tensors, values, previous_name=_previous_name(path))


def load_state(path: Path) -> State:
    """The newest training state that can be read: `path`, or the one before it, which `note` then tells.

    Raises:
        CheckpointError: where neither can be read; the message is about the newest.
    """
    try:
        return State(*_read_state(path), note=None)
    except CheckpointError as newest_error:
        previous = _previous_state(path)
        try:
            tensors, metadata = _read_state(previous)
        except CheckpointError:
            raise newest_error from None
        return State(tensors, metadata, note=f"{newest_error.message}; going on from {previous}, saved before it")


def state_exists(path: Path) -> bool:
    """Whether there is a state to load: a save that died between its two renames leaves the previous one alone."""
    return path.exists() or _previous_state(path).exists()


def remove_state(path: Path) -> None:
    """Removes both states."""
    remove_file(path)
    remove_file(_previous_state(path))


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers of a state dict, each under the first of its names.

    A `GPTVAE` holds its decoder twice, itself and inside x-transformers' wrapper. safetensors refuses tensors that
    share memory, and a copy would double the file.
    """
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # the very objects, not views of them
        unique.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach() for name, tensor in unique.values()}


@torch.no_grad()
def fill_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies what `model_tensors` gave into a model of the same architecture, on any device."""
    for name, target in model_tensors(model).items():
        target.copy_(tensors[name])


def _save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, previous_name: str | None = None
) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    signed = {**metadata, DIGEST_KEY: _digest(plain, metadata)}
    try:
        write_atomically(path, lambda new: save_file(plain, new, metadata=signed), previous_name=previous_name)
    except SafetensorError as error:  # the system's error as text: "I/O error: No space left on device"
        raise GPTVAEError(
            f"cannot write {path}: {error}", hint="free some space; what was there is unchanged"
        ) from error


def _previous_name(path: Path) -> str:
    return f"{path.stem}.prev{path.suffix}"


def _previous_state(path: Path) -> Path:
    return behind_links(path).with_name(_previous_name(path))


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    read_layout(path)
    with reading(path):
        metadata, tensors = _open(path)
        check_version(metadata)
        if STATE_KEY not in metadata:
            raise CheckpointError("it is a model, not a training state", hint="name the state.safetensors of a run")
        _check_digest(metadata, tensors)
        return tensors, json_object(metadata[STATE_KEY], "its state")


def _open(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file that `read_layout` has checked; the tensors' bytes are mapped, not yet read.

    Both come from one opening: a training may replace the file at any moment, with another that is as good.
    """
    try:
        # safetensors refuses a path that is not UTF-8, which a name on the disk may be: it gets the open file's number.
        with path.open("rb") as opened:
            place = path if is_utf8(path) else f"/dev/fd/{opened.fileno()}"
            with safe_open(place, framework="pt") as file:
                return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"safetensors refuses it: {str(error)[:200]}", hint=_UNFIT) from error


def _check_digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    signed = {key: value for key, value in metadata.items() if key != DIGEST_KEY}
    if metadata.get(DIGEST_KEY) != _digest(tensors, signed):
        raise CheckpointError("its content is not what was written, the checksum differs", hint=_UNFIT)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, types, shapes and bytes; about 0.06 s for 100 MB where the CPU has instructions for it."""
    names = sorted(tensors)
    frame = [sorted(metadata.items()), [(name, str(tensors[name].dtype), [*tensors[name].shape]) for name in names]]
    digest = hashlib.sha256(json.dumps(frame).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_tokenizer(text: str, model: ModelConfig) -> Tokenizer:
    """A tokenizer of a file, in JSON, that belongs to the model there.

    Raises:
        CheckpointError: for anything else.
    """
    tokenizer = Tokenizer.from_json(text)
    found = (tokenizer.num_tokens, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    expected = (model.num_tokens, model.pad_id, model.bos_id, model.eos_id)
    if found != expected:
        raise CheckpointError(
            f"its tokenizer has (tokens, pad, bos, eos) {found}, its model configuration has {expected}", hint=_UNFIT
        )
    return tokenizer


def claimed_model(config: ModelConfig, tensors: Mapping[str, Tensor]) -> GPTVAE:
    """A model of this configuration that takes no memory, to compare shapes with: a small file may claim a huge one.

    It serves for nothing else: what is filled on the meta device misses the buffers that x-transformers computes.

    Raises:
        CheckpointError: for more layers than there are tensors: a layer takes a millisecond even here.
    """
    layers = config.depth + config.enc_depth
    if layers > len(tensors):
        raise CheckpointError(f"its configuration has {layers} layers, it holds {len(tensors)} tensors", hint=_UNFIT)
    with torch.device("meta"):
        return GPTVAE.from_config(config).float()


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises a `CheckpointError` where a tensor holds NaN or infinity, which would soon be everywhere."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(
                f"tensor {brief(name)} holds NaN or infinity", hint="use another file, this one cannot work"
            )


def _check_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        shape, other = tuple(tensor.shape), found.get(name)
        if other is None:
            raise CheckpointError(f"tensor {name!r} of shape {shape} is missing", hint=_UNFIT)
        for what, has, wanted in (("shape", tuple(other.shape), shape), ("type", other.dtype, tensor.dtype)):
            if has != wanted:
                message = f"tensor {name!r} has the {what} {has}, the configuration expects {wanted}"
                raise CheckpointError(message, hint=_UNFIT)
    if unexpected := sorted(set(found) - set(expected)):
        shape = tuple(found[unexpected[0]].shape)
        raise CheckpointError(
            f"tensor {brief(unexpected[0])} of shape {shape} is unexpected, the first of {len(unexpected)} such",
            hint=_UNFIT,
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is one."""
    if tensor.numel() == 0:
        return True
    # NaN passes through both extremes; unlike `isfinite().all()` this allocates nothing and is 50 times faster.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))
