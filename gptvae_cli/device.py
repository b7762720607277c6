"""Where a model runs and with which numbers: decided once, with the reason to print."""

from __future__ import annotations

import ctypes
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from gptvae_cli import machine
from gptvae_cli.config import DEVICE, DType, MachineConfig
from gptvae_cli.errors import DeviceError, FieldError

BFLOAT16_PAYS = 1.5
"""How many times as fast as float32 a CPU must multiply bfloat16 for training in it: a step also converts between the
two, and does much besides products. Processors with AMX reach 5. Of those with AVX512_BF16 alone, one of AMD came to
2.1 and more, which made steps 1.6 to 1.9 times as fast, and one of Intel to 0.5, which made them 1.5 times as long: on
the line between the two nothing is gained at 0.8 (row `dtype` of `tests/benchmarks/speed/`, and its `results.txt`)."""
_MOST_KEPT, _KEPT_BYTES = 8192, 900_000
"""Products of bfloat16 that oneDNN keeps at most, and what each takes (row `kept` of `tests/benchmarks/speed/`)."""
_TIMING = Lock()
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h; the greatest that the second one takes is 32 MB


@dataclass(frozen=True)
class Device:
    """Where to compute, and why there; `fell_back` is whether there is a GPU, but none that can be used."""

    device: torch.device
    reason: str
    fell_back: bool = False


@dataclass(frozen=True)
class Precision:
    """The type to compute in (weights stay float32, bfloat16 means autocast), and why this one."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The type as `--dtype` calls it."""
        return str(self.dtype).removeprefix("torch.")


def resolve_device(name: str) -> Device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:n` means on this machine.

    Raises:
        ConfigError: for any other name.
        DeviceError: for a GPU that is not there.
    """
    if name == "cpu":
        return Device(torch.device("cpu"), "asked for")
    match = DEVICE.fullmatch(name)
    if match is None:
        raise FieldError("device", name, "auto, cpu, cuda or cuda:n")
    count, problem, is_there = _cuda_gpus()
    index = int(match[1] or 0)
    if 0 < count <= index:
        last = f"cuda:0 to cuda:{count - 1}" if count > 1 else "only cuda:0"
        raise DeviceError(f"device {name} was asked for, but this machine has {last}", hint="use --device cuda")
    how = "found" if name == "auto" else "asked for, it is"
    for gpu in [torch.device("cuda", i) for i in (range(count) if name == "auto" else [index][:count])]:
        failure = _failure(gpu)
        if failure is None:
            return Device(gpu, f"{how} {torch.cuda.get_device_name(gpu)}")
        problem = problem or failure
    assert problem is not None
    if name == "auto":
        return Device(torch.device("cpu"), problem, fell_back=is_there)
    raise DeviceError(f"device {name} was asked for, but {problem}", hint="use --device cpu")


def resolve_dtype(name: DType, device: torch.device, *, training: bool) -> Precision:
    """The type to compute in. `auto` trains in bfloat16 where the hardware multiplies it fast. It infers in float32:
    figures and texts are then the same on every device, and in whatever batch.

    A CPU is not asked for its instructions but timed: there are some for bfloat16 that are slower than float32, and
    without any it is up to 500 times as slow.

    Raises:
        ConfigError: for a name that is none of `auto`, `float32` and `bfloat16`.
    """
    if name == "float32":
        return Precision(torch.float32, "asked for")
    if name not in ("auto", "bfloat16"):
        raise FieldError("dtype", name, "auto, float32 or bfloat16")
    if name == "auto" and not training:
        return Precision(torch.float32, "exact and fast enough")
    if device.type == "cuda":
        return _gpu_dtype(name, device)
    with _TIMING:  # which changes the number of torch's threads and puts it back
        times = _cpu_bfloat16_speed()
    found = f"this CPU multiplies bfloat16 {times:.1f} times as fast as float32"
    if name == "bfloat16":
        return Precision(torch.bfloat16, "asked for" if times >= 1 else f"asked for, but slow: {found}")
    return Precision(torch.bfloat16 if times >= BFLOAT16_PAYS else torch.float32, found)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within, a model of float32 weights computes in this type: bfloat16 under autocast, or float32. A GPU is the
    current one then, of which torch asks what it can."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on another device. It is pinned on its way to a GPU, which can then copy it while the CPU goes on."""
    is_for_gpu = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if is_for_gpu else tensor).to(device, non_blocking=True)


def tune_cpu(threads: int | None) -> int:
    """Prepares this process for computing on its CPU, and returns how many threads torch uses.

    Three more settings hold for the whole process; what each gains is in `tests/benchmarks/speed/`:

    - Denormal numbers count as zero, since a CPU computes with them slowly.
    - Freed memory stays with the process: returning the pages of every large tensor and getting them again costs a
      sixth of a training step.
    - oneDNN, which multiplies bfloat16 and, for `products`, float32, compiles code for every shape of matrices. It
      keeps 1,024 of these kernels, which batches of many lengths soon exceed; here it keeps more, in at most a quarter
      of the memory (two hundred shapes of batches fill 3 GB). oneDNN reads this at its first product, so call this
      before there was one.

    Args:
        threads: for None torch's own choice, but no more than a container grants, unless `$OMP_NUM_THREADS` says so.

    Raises:
        ConfigError: for less than one, or more than any machine has.
    """
    if threads is not None:
        MachineConfig(threads=threads)  # which checks them
        torch.set_num_threads(threads)
    elif "OMP_NUM_THREADS" not in os.environ and (granted := machine.processor_quota()) is not None:
        torch.set_num_threads(min(granted, torch.get_num_threads()))
    kept = max(1024, min(_MOST_KEPT, machine.memory() // 4 // _KEPT_BYTES))
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kept))
    # NumPy keeps what it finds out, and before 2.4 warned where denormals are zero.
    np.finfo(np.float32), np.finfo(np.float64)
    torch.set_flush_denormal(True)
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # of glibc; other C libraries have other habits
        libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return torch.get_num_threads()


def tokens_together(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Tokens of one batch, for inference. On a CPU the activations of a layer then fit in its caches, a quarter faster
    than batches eight times as large; a GPU wants few kernels."""
    if device.type != "cpu":
        return 8192
    return 2048 if dtype == torch.bfloat16 else 1024


def rows_together(device: torch.device, row_bytes: int) -> int:
    """How many texts to write at once, in no more than an eighth of the memory. A GPU takes hardly longer for more of
    them: its time goes into launching kernels.

    Args:
        row_bytes: that the longest text takes.
    """
    if device.type == "cpu":
        most, memory = 64, machine.memory()
    else:
        most, memory = 256, torch.cuda.mem_get_info(device)[1]
    return max(1, min(most, memory // 8 // row_bytes))


@cache  # torch warns once
def _cuda_gpus() -> tuple[int, str | None, bool]:
    """How many GPUs can be tried; where that is none, why; and whether there is one."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return 0, f"this torch ({torch.__version__}) is built without CUDA", False
    with warnings.catch_warnings(record=True) as caught:  # torch tells of an outdated driver in a warning
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count > 0:
        return count, None, True
    if caught:
        return 0, str(caught[0].message).partition("\n")[0].partition(" (Triggered internally")[0], True
    return 0, "torch finds no GPU", False


def _failure(device: torch.device) -> str | None:
    """Why a GPU that is there cannot compute, or None: torch may lack kernels for it, another process may hold it."""
    try:
        with warnings.catch_warnings():  # torch warns of the first of these at length
            warnings.simplefilter("ignore")
            torch.zeros(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as problem:  # MIG ends in the last one
        return f"{device} fails: " + str(problem).partition("\n")[0]
    return None


def _gpu_dtype(name: DType, gpu: torch.device) -> Precision:
    with torch.cuda.device(gpu):  # torch answers for the current GPU
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bfloat16":
        return Precision(torch.bfloat16, "asked for" if able else "asked for, but slow: this GPU cannot multiply it")
    if able:
        return Precision(torch.bfloat16, f"this GPU multiplies it ({torch.cuda.get_device_name(gpu)})")
    return Precision(torch.float32, "this GPU cannot multiply bfloat16")


@cache
def _cpu_bfloat16_speed() -> float:
    """How many times as fast as float32 this CPU multiplies matrices of bfloat16; takes some twenty milliseconds.

    Measured in the CPU time of one thread, so that it does not matter what else the machine does.
    """
    squares = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(squares, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(4):  # the first is slow
            for dtype, square in squares.items():
                began = time.thread_time()
                square @ square
                best[dtype] = min(best[dtype], time.thread_time() - began)
            if best[torch.bfloat16] > 10 * best[torch.float32]:
                break  # it is emulated, and takes seconds
    finally:
        torch.set_num_threads(threads)
    return best[torch.float32] / best[torch.bfloat16]
