"""The choice of device and number type, on machines that have and have not what was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gptvae_cli import device as device_module
from gptvae_cli.device import resolve_device, resolve_dtype, tune_cpu
from gptvae_cli.errors import ConfigError, DeviceError, ExitCode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Pretends to be a machine: how many GPUs it has, what its torch was built for, what its parts can."""

    def pretend(
        *,
        gpus: int = 0,
        built: bool = True,
        warning: str | None = None,
        broken: str | None = None,
        gpu_bf16: bool = True,
        cpu_bf16: float = 5.0,
    ) -> None:
        def is_available() -> bool:
            if warning is not None:
                warnings.warn(warning, stacklevel=2)
            return gpus > 0

        device_module._cuda_gpus.cache_clear()
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")
        # Emulation counts as support unless torch is asked not to count it.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
        monkeypatch.setattr(device_module, "_failure", lambda device: broken)
        monkeypatch.setattr(device_module, "_cpu_bfloat16_speed", lambda: cpu_bf16)

    yield pretend
    device_module._cuda_gpus.cache_clear()


@pytest.fixture
def thread_count() -> Iterator[int]:
    count = torch.get_num_threads()
    yield count
    torch.set_num_threads(count)


def test_auto_takes_the_first_gpu_and_else_the_cpu(machine: Machine) -> None:
    machine(gpus=2)
    assert resolve_device("auto").device == torch.device("cuda", 0)
    assert resolve_device("auto").reason == "found Test GPU"
    machine(gpus=0)
    assert resolve_device("auto").device == CPU
    assert resolve_device("auto").reason == "torch finds no GPU"


def test_cpu_is_taken_where_there_is_a_gpu_too(machine: Machine) -> None:
    machine(gpus=1)
    assert resolve_device("cpu").device == CPU


def test_gpu_is_taken_by_its_number(machine: Machine) -> None:
    machine(gpus=2)
    assert resolve_device("cuda").device == torch.device("cuda", 0)
    assert resolve_device("cuda:1").device == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        pytest.param({"built": False}, f"this torch ({torch.__version__}) is built without CUDA", id="CPU build"),
        pytest.param({}, "torch finds no GPU", id="no GPU"),
        pytest.param({"warning": "The driver is too old.\nUpdate it."}, "The driver is too old.", id="old driver"),
        pytest.param({"warning": "Old (Triggered internally at x.cpp:1.)"}, "Old", id="old driver, in C++"),
        pytest.param({"gpus": 1, "broken": "cuda:0 fails: it is full"}, "cuda:0 fails: it is full", id="full GPU"),
    ],
)
def test_absent_gpu_says_why(machine: Machine, parts: dict[str, object], said: str) -> None:
    """torch tells of an outdated driver in a warning only, which a pipeline would never show."""
    machine(**parts)
    with pytest.raises(DeviceError) as caught:
        resolve_device("cuda")
    assert caught.value.message == f"device cuda was asked for, but {said}"
    assert caught.value.hint == "use --device cpu"
    assert caught.value.exit_code == ExitCode.FAILURE
    found = resolve_device("auto")
    assert (found.device, found.reason) == (CPU, said)
    assert found.fell_back == ("gpus" in parts or "warning" in parts)


def test_auto_passes_over_a_gpu_that_is_full(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(gpus=2)
    monkeypatch.setattr(device_module, "_failure", lambda gpu: "cuda:0 fails: it is full" if gpu == GPU else None)
    assert resolve_device("auto").device == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="it is full"):
        resolve_device("cuda")


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError])
def test_a_gpu_that_cannot_be_initialised_is_found_out(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """With MIG, torch counts more GPUs than there are and raises errors of its own."""

    def fail(*_: object, **__: object) -> None:
        raise error("CUDA call failed lazily at initialization with error: device >= 0\nCUDA call was")

    monkeypatch.setattr(torch, "zeros", fail)
    said = "cuda:0 fails: CUDA call failed lazily at initialization with error: device >= 0"
    assert device_module._failure(GPU) == said


def test_a_device_that_cannot_compute_is_found_out() -> None:
    """By trying: torch counts a GPU that it has no kernels for. Here by a device that holds no numbers."""
    assert device_module._failure(torch.device("meta")) == "meta fails: Tensor.item() cannot be called on meta tensors"
    assert device_module._failure(CPU) is None


@pytest.mark.parametrize(("gpus", "found"), [(1, "only cuda:0"), (3, "cuda:0 to cuda:2")])
def test_gpu_out_of_range_says_which_there_are(machine: Machine, gpus: int, found: str) -> None:
    machine(gpus=gpus)
    with pytest.raises(DeviceError, match=f"device cuda:3 was asked for, but this machine has {found}"):
        resolve_device("cuda:3")


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cuda:99999", "mps"])
def test_unknown_device_is_wrong_usage(name: str) -> None:
    with pytest.raises(ConfigError, match="it must be auto, cpu, cuda or cuda:n") as caught:
        resolve_device(name)
    assert repr(name) in caught.value.message


@pytest.mark.parametrize(
    ("device", "training", "parts", "dtype"),
    [
        pytest.param(CPU, False, {"cpu_bf16": 5.0}, torch.float32, id="cpu inference"),
        pytest.param(CPU, True, {"cpu_bf16": 5.0}, torch.bfloat16, id="able cpu training"),
        pytest.param(CPU, True, {"cpu_bf16": 2.1}, torch.bfloat16, id="cpu training with AVX512_BF16"),
        pytest.param(CPU, True, {"cpu_bf16": 1.2}, torch.float32, id="hardly able cpu training"),
        pytest.param(CPU, True, {"cpu_bf16": 0.5}, torch.float32, id="cpu training with slow instructions for it"),
        pytest.param(GPU, False, {"gpu_bf16": True}, torch.float32, id="able gpu inference"),
        pytest.param(GPU, True, {"gpu_bf16": True}, torch.bfloat16, id="able gpu training"),
        pytest.param(GPU, True, {"gpu_bf16": False}, torch.float32, id="old gpu training"),
    ],
)
def test_auto_takes_bfloat16_only_where_it_gains(
    machine: Machine, device: torch.device, training: bool, parts: dict[str, float], dtype: torch.dtype
) -> None:
    """Products decide, of which a training step has much besides: a CPU with AVX512_BF16 took 1.5 times as long for
    a step in bfloat16, whose products were half as fast."""
    machine(gpus=1, **parts)
    precision = resolve_dtype("auto", device, training=training)
    assert precision.dtype == dtype
    assert precision.reason


def test_asking_for_float32_is_always_granted(machine: Machine) -> None:
    machine(gpus=1)
    assert resolve_dtype("float32", GPU, training=True).dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "why"),
    [(CPU, "this CPU multiplies bfloat16 0.5 times as fast as float32"), (GPU, "this GPU cannot multiply it")],
)
def test_asking_for_bfloat16_is_granted_with_a_warning_where_it_is_slow(
    machine: Machine, device: torch.device, why: str
) -> None:
    machine(gpus=1, cpu_bf16=0.5, gpu_bf16=False)
    precision = resolve_dtype("bfloat16", device, training=True)
    assert precision.dtype == torch.bfloat16
    assert precision.reason == f"asked for, but slow: {why}"
    machine(gpus=1)
    assert resolve_dtype("bfloat16", device, training=True).reason == "asked for"


def test_one_thread_at_a_time_times_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of torch's threads is set meanwhile, and another one would put back what it found."""
    at_once, most = 0, 0

    def timed() -> float:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        at_once -= 1
        return 2.0

    monkeypatch.setattr("gptvae_cli.device._cpu_bfloat16_speed", timed)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: resolve_dtype("bfloat16", CPU, training=False), range(4)))
    assert most == 1


def test_unknown_dtype_is_wrong_usage() -> None:
    with pytest.raises(ConfigError, match="dtype is 'float16'"):
        resolve_dtype("float16", CPU, training=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("float32", "bfloat16", "times", "products"),
    [([7, 4, 90, 4], [9, 2, 30, 2], 2.0, 4), ([2, 1, 1, 1], [15, 9, 8, 9], 0.125, 4), ([1], [900], 1 / 900, 1)],
    ids=["faster", "slower", "emulated"],
)
def test_speed_of_bfloat16_is_that_of_the_best_products(
    monkeypatch: pytest.MonkeyPatch,
    thread_count: int,
    float32: list[float],
    bfloat16: list[float],
    times: float,
    products: int,
) -> None:
    """Against a clock that only products move; what is hopelessly slow is not tried again."""
    clock, threads = 0.0, []

    class Square:
        def __init__(self, dtype: torch.dtype) -> None:
            self.durations = iter(float32 if dtype == torch.float32 else bfloat16)

        def __matmul__(self, other: Square) -> None:
            nonlocal clock
            clock += next(self.durations)
            threads.append(torch.get_num_threads())

    monkeypatch.setattr(torch, "ones", lambda *shape, dtype: Square(dtype))
    monkeypatch.setattr(time, "thread_time", lambda: clock)
    assert device_module._cpu_bfloat16_speed.__wrapped__() == times
    assert threads == [1] * 2 * products
    assert torch.get_num_threads() == thread_count


def test_threads_are_set_and_none_changes_nothing(
    thread_count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptvae_cli.machine._GROUPS", tmp_path / "none")  # a container may grant fewer
    with pytest.raises(ConfigError, match="threads is 0"):
        tune_cpu(0)
    assert tune_cpu(None) == thread_count
    assert tune_cpu(thread_count + 1) == torch.get_num_threads() == thread_count + 1
    assert tune_cpu(None) == thread_count + 1


def test_no_more_threads_than_a_container_grants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thread_count: int
) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setattr("gptvae_cli.machine._GROUPS", tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert tune_cpu(4) == 4, "whoever asks for threads knows why"
    assert tune_cpu(None) == 2
    torch.set_num_threads(1)
    assert tune_cpu(None) == 1, "a limit adds none"
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert tune_cpu(None) == 4


def test_denormals_count_as_zero_once_a_cpu_is_tuned(thread_count: int) -> None:
    tiny = torch.full((64,), 1e-38)
    assert bool((tiny * 1e-3).any())
    tune_cpu(None)
    assert not bool((tiny * 1e-3).any())


_PRODUCTS = """
import sys, torch
from gptvae_cli.device import tune_cpu
if sys.argv[1] == "tuned":
    tune_cpu(1)
weight = torch.ones(16, 16, 3)
for width in [*range(20, 720)] * 2:
    torch.nn.functional.conv1d(torch.ones(4, 16, width), weight)
"""


@pytest.mark.parametrize(("how", "kept"), [("tuned", True), ("as it comes", False)])
def test_what_onednn_compiles_is_kept_for_thousands_of_shapes(how: str, kept: bool) -> None:
    # Convolutions, as it has these of float32 on every processor; each makes several entries of its cache.
    environment = {k: v for k, v in os.environ.items() if "PRIMITIVE_CACHE" not in k} | {"ONEDNN_VERBOSE": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", _PRODUCTS, how], capture_output=True, text=True, env=environment, check=True
    )
    if "create:cache_miss" not in ran.stdout:
        pytest.skip("this torch does not use oneDNN here, or does not tell")
    hits = ran.stdout.count("create:cache_hit,cpu,convolution")
    assert hits == (700 if kept else 0)


@pytest.mark.parametrize(
    ("gigabytes", "limit", "kept"),
    [(64, None, 8192), (64, "max\n", 8192), (64, "4000000000\n", 1111), (8, None, 2386), (2, None, 1024)],
)
def test_what_is_kept_takes_no_more_than_a_quarter_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gigabytes: int, limit: str | None, kept: int
) -> None:
    """Of the machine, or of the container; but as much as oneDNN keeps by itself."""
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")  # so that it is put back, set or not
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 2**18}.__getitem__)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr("gptvae_cli.machine._GROUPS", tmp_path)
    tune_cpu(None)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(kept)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    tune_cpu(None)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7", "whoever sets it knows why"


def test_a_gpu_takes_more_at_once_than_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_module.tokens_together(GPU) > device_module.tokens_together(CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**40))
    assert device_module.rows_together(GPU, 1) > device_module.rows_together(CPU, 1)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_texts_that_are_written_together_take_an_eighth_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))
    monkeypatch.setattr("gptvae_cli.machine.memory", lambda: 2**34)
    assert device_module.rows_together(device, 2**27) == 16
    assert device_module.rows_together(device, 2**34) == 1


def test_numpy_does_not_warn_of_denormals_that_are_zero() -> None:
    """Before 2.4 it did, four times, where scikit-learn asked it."""
    program = "from gptvae_cli.device import tune_cpu; tune_cpu(None); import numpy as np; np.finfo(np.float32).eps"
    environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("count", [0, -1, 3_000_000_000])
def test_no_threads_and_more_than_any_machine_has_are_wrong_usage(count: int) -> None:
    with pytest.raises(ConfigError, match=f"threads is {count}"):
        tune_cpu(count)


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_real_gpu_is_found_and_multiplies_in_the_chosen_type() -> None:
    found = resolve_device("auto").device
    dtype = resolve_dtype("auto", found, training=True).dtype
    ones = torch.ones(8, 8, device=found, dtype=dtype)
    assert float((ones @ ones)[0, 0]) == 8
