"""A tiny model that nobody trained, and ways to run the tool on it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

if TYPE_CHECKING:
    from gptvae_cli.tokenizer import Tokenizer

WIDTH = 8
LONGEST = 24


def make_model(
    path: Path,
    *,
    unit: str = "line",
    latents_from: str | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    dim: int = 32,
    **training: Any,
) -> Path:
    """Writes a random model, of bytes unless told otherwise, with 8 latent dimensions, which reads 24 tokens."""
    import torch

    from gptvae_cli.checkpoint import save_model
    from gptvae_cli.config import DataConfig, ModelConfig, from_dict
    from gptvae_cli.header import FORMAT_VERSION, ModelHeader
    from gptvae_cli.model import GPTVAE
    from gptvae_cli.tokenizer import Tokenizer

    tokenizer = tokenizer or Tokenizer.bytes()
    config = ModelConfig(
        num_tokens=tokenizer.num_tokens,
        dim=dim,
        depth=2,
        enc_depth=1,
        max_seq_len=LONGEST,
        dim_latent=WIDTH,
        heads=2,
        attn_dim_head=16,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        conditioning="token",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTVAE.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Fresh weights would hide mistakes: the latent hardly shows.
                parameter.add_(0.3 * torch.randn(parameter.shape))
            # About one token in ten ends a text.
            ending = model.decoder.to_logits.weight
            ending[: tokenizer.eos_id] *= 0.5
    data = from_dict(DataConfig, {"unit": unit, "latents_from": latents_from})
    save_model(path, model, ModelHeader(FORMAT_VERSION, config, data, tokenizer.to_json(), training))
    return path


def array(values: npt.NDArray[Any]) -> bytes:
    """A `.npy` file."""
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `line.safetensors`, `paragraph.safetensors` and `window.safetensors`, alike but for the unit."""
    folder = tmp_path_factory.mktemp("models")
    for unit in ("line", "paragraph", "window"):
        make_model(folder / f"{unit}.safetensors", unit=unit, steps=7, validation={"kl": 1.5, "texts": 30})
    return folder
