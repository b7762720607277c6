"""A GPU for machines that have none: what is sent to it stays where it is and is marked, torch refuses to mix marked
tensors with others, as it does with two devices, and every wait for the device is counted."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import gptvae_cli.device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_WAITS = {"item", "tolist", "cpu", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__"}
"""What needs a number from the device, or how many there are."""
_OF_NO_DEVICE = {torch.device, torch._C._nn._parse_to}
"""They take devices and no tensors."""
_BETWEEN_DEVICES = {"copy_", "__setitem__", "_has_compatible_shallow_copy_type"}


class PretendedGPU(TorchFunctionMode):
    """Within, `cuda:0` is a device. What torch does in C++ alone, such as the passes backward, it does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """How often the CPU waited for the device, by the function of gptvae that made it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_NO_DEVICE:
            return func(*args, **kwargs)
        name, leaves = func.__name__, tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        marked = any(is_marked(tensor) for tensor in tensors)
        if name == "__get__" and func.__self__.__name__ == "device":
            return GPU if marked else func(*args)
        if name == "__set__" and func.__self__.__name__ == "data":
            func(*args)
            _mark(args[0], is_marked(args[1]))
            return None
        if name in ("numpy", "__array__") and marked:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name in _WAITS and marked:
            self.waits[_caller()] += 1
        devices = [leaf for leaf in leaves if _is_device(leaf)]
        if name == "cpu":
            devices = [CPU]
        elif name == "to" and len(tensors) == 2:
            devices = [GPU if is_marked(tensors[1]) else CPU]
        elif not devices and name not in _BETWEEN_DEVICES:
            _check_same_device(name, tensors)
        result = func(*(CPU if _is_device(arg) else arg for arg in args), **_on_cpu(kwargs))
        if devices:
            marked = torch.device(devices[0]).type == "cuda"
            if tensors and result is tensors[0] and is_marked(result) != marked:
                result = result.detach().clone()
        tree_map_only(Tensor, lambda tensor: _mark(tensor, marked), result)
        return result


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Commands find a GPU that multiplies bfloat16; to compute in it is left to the CPU's autocast."""
    autocast, is_enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (gptvae_cli.device, "_cuda_gpus", lambda: (1, None, True)),
            (torch.cuda, "mem_get_info", lambda device: (2**33, 2**33)),
            (torch.cuda, "get_device_name", lambda device: "Pretended GPU"),
            (torch.cuda, "is_bf16_supported", lambda including_emulation: True),
            (torch.cuda, "device", lambda device: warnings.catch_warnings()),
            (torch, "autocast", lambda device, **options: autocast("cpu", **options)),
            (torch, "is_autocast_enabled", lambda device: is_enabled("cpu")),
            (torch, "get_autocast_dtype", lambda device: dtype("cpu")),
            (Tensor, "pin_memory", lambda tensor: tensor),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield stack.enter_context(PretendedGPU())


def is_marked(tensor: Tensor) -> bool:
    """Whether it lies on the pretended GPU."""
    return getattr(tensor, "_on_pretended_gpu", False)


def _mark(tensor: Tensor, marked: bool) -> None:
    tensor._on_pretended_gpu = marked  # type: ignore[attr-defined]


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "cuda", "cuda:0"))


def _on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: CPU if _is_device(value) else value for name, value in kwargs.items()}


def _check_same_device(name: str, tensors: list[Tensor]) -> None:
    """Numbers without dimensions may come from the CPU; so may indices, but torch copies these, and waits."""
    on_gpu = [tensor for tensor in tensors if is_marked(tensor)]
    on_cpu = [tensor for tensor in tensors if not is_marked(tensor) and tensor.ndim > 0]
    if on_gpu and on_cpu:
        raise RuntimeError(f"{name}: {len(on_gpu)} tensors are on cuda:0 and {len(on_cpu)} on the CPU")


def _caller() -> str:
    """The function of gptvae that is running; `<genexpr>` and the like are none."""
    names = (frame.name for frame in reversed(traceback.extract_stack()) if "gptvae_cli" in frame.filename)
    return next((name for name in names if not name.startswith("<")), "elsewhere")
