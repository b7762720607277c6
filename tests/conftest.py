"""What several test modules share: tiny models that can be told apart, a corpus, and skipping what needs a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gptvae_cli.config import ModelConfig
    from gptvae_cli.model import GPTVAE

LINES = [f"{word} number {i}" for i in range(40) for word in ("cat", "dog", "a bird")]


def pytest_configure(config: pytest.Config) -> None:
    # Of x-transformers, which tests import themselves: it scripts a function, which torch has begun to deprecate.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is (deprecated|not supported)")
    # Commands compute on the CPU, on a machine that has a GPU too; what is tested on one names it.
    os.environ.setdefault("GPTVAE_DEVICE", "cpu")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Every processor has a worker: more threads would only wait for one another.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("requires_cuda") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU that torch can use")


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Commands set denormal numbers to zero, for the whole process: `0 < 5e-324` is then false, in Python too."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def safe_path() -> Iterator[None]:
    """A pool of processes keeps the working directory off the path of all processes that are started later."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors are computed fastest by one thread, most of all where another process is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A file of short lines."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(LINES) + "\n")
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty run folder."""
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    """Makes a `ModelConfig` of 17 plain tokens and a window of 16; keywords change it."""
    from gptvae_cli.config import ModelConfig

    def make(**changes: Any) -> ModelConfig:
        fields = {
            "num_tokens": 20,
            "dim": 32,
            "depth": 2,
            "enc_depth": 1,
            "max_seq_len": 16,
            "dim_latent": 8,
            "heads": 2,
            "attn_dim_head": 16,
            "pad_id": 17,
            "bos_id": 18,
            "eos_id": 19,
            "conditioning": "token",
        }
        return ModelConfig(**{**fields, **changes})

    return make


@pytest.fixture
def shake(one_thread: None) -> Callable[..., Any]:
    """Puts noise on every weight of a module, and returns it in eval mode.

    Fresh weights would hide mistakes: gains are 1, biases 0, and the latent hardly shows.
    """
    import torch

    def shake(module: Any, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return module.eval()

    return shake


@pytest.fixture
def tiny_model(shake: Callable[..., Any], tiny_config: Callable[..., ModelConfig]) -> Callable[..., GPTVAE]:
    """Makes a shaken model of `tiny_config`; keywords change the config."""
    import torch

    from gptvae_cli.model import GPTVAE

    def make(*, seed: int = 0, **changes: Any) -> GPTVAE:
        torch.manual_seed(seed)
        model: GPTVAE = shake(GPTVAE.from_config(tiny_config(**changes)), seed)
        return model

    return make


def stock_of(model: GPTVAE) -> Any:
    """x-transformers' own class with the same weights."""
    from x_transformers import gpt_vae as reference

    config = model.config
    assert config is not None
    stock = reference.GPTVAE(
        num_tokens=config.num_tokens,
        dim=config.dim,
        depth=config.depth,
        enc_depth=config.enc_depth,
        max_seq_len=config.max_seq_len,
        dim_latent=config.dim_latent,
        heads=config.heads,
        attn_dim_head=config.attn_dim_head,
        pad_id=config.pad_id,
        rotary_pos_emb=True,
        verbose=False,
    )
    stock.load_state_dict(model.state_dict())
    return stock.eval()
