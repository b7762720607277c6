"""All commands on a GPU that is only pretended: nothing mixes devices, and nothing waits for it without need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gptvae_cli.cli.app import app
from tests.pretended_gpu import GPU, is_marked, pretended_gpu

WORDS = [
    f"the {size} {animal} {does} the {food}"
    for size in ("small", "big", "red")
    for animal in ("cat", "dog", "bird")
    for does in ("sees", "hears")
    for food in ("mouse", "seed", "grass", "naïve man")
]


def gptvae(*args: object, device: str = "cuda") -> str:
    result = CliRunner().invoke(app, [*map(str, args), "--device", device, "--debug"])
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(WORDS) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_command_runs_on_it(corpus: Path, tmp_path: Path, dtype: str) -> None:
    run, latents, labels = tmp_path / "run", tmp_path / "z.npy", tmp_path / "labels.txt"
    labels.write_text("".join(f"{i % 2}\n" for i in range(len(WORDS))))
    model = ("--model", run, "--dtype", dtype)
    with pretended_gpu():
        gptvae("train", corpus, "--out", run, "--preset", "nano", "--steps", 12, "--dtype", dtype, "--threads", 1)
        gptvae("train", "--resume", "--out", run, "--steps", 16)
        gptvae("encode", corpus, "--out", latents, *model)
        written = gptvae("generate", "--latent", latents, "--greedy", *model)
        gptvae("generate", "--prior", 3, "--prompt", "the sm", "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, *model)
        gptvae("generate", "--ref", corpus, "--sample", "-n", 2, "--max-tokens", 5, *model)
        gptvae("interpolate", "--from", WORDS[0], "--to", WORDS[-1], "--refine", *model)
        gptvae(
            "evaluate", corpus, "--with-baseline", "--labels", labels, "--texts", 40, "--samples", 2, "--refine", *model
        )
    assert len(np.load(latents)) == len(WORDS)
    if dtype == "float32":
        assert written == gptvae("generate", "--latent", latents, "--greedy", *model, device="cpu")


def test_nothing_waits_for_it_without_need(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pretended_gpu() as gpu:
        gptvae("train", corpus, "--out", run, "--preset", "nano", "--steps", 12, "--threads", 1)
    looking = {"measure_texts", "decode", "run"}
    saving = {"is_finite", "_save"}
    assert gpu.waits.keys() == {"_failure", "_read"} | looking | saving, "a step itself does not wait"
    with pretended_gpu() as gpu:
        gptvae("generate", "--prior", 9, "--seed", 1, "--max-tokens", 20, "--model", run)
    assert gpu.waits == {"_failure": 1, "decode": 1, "run": 20}, "once a token, for all texts together"
    with pretended_gpu() as gpu:
        gptvae("encode", corpus, "--out", tmp_path / "z.npy", "--model", run)
    with pretended_gpu() as more:
        gptvae("encode", corpus, "--refine", "--out", tmp_path / "z.npy", "--model", run)
    assert more.waits == gpu.waits == {"_failure": 1, "_posteriors": 3}, "a step of refining does not wait"


# The pretence itself --------------------------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses() -> None:
    with pretended_gpu() as gpu:
        there = torch.ones(3, device="cuda")
        assert there.device == GPU
        assert (there + torch.tensor(1.0)).device == GPU
        assert torch.arange(3).to(GPU)[1:].device == GPU
        with pytest.raises(RuntimeError, match="1 tensors are on cuda:0 and 1 on the CPU"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert not gpu.waits
        assert there.cpu().numpy().tolist() == [1, 1, 1]
        assert gpu.waits.total() == 1
        linear = torch.nn.Linear(3, 2).to("cuda")
        assert linear(there).device == GPU
        with pytest.raises(RuntimeError, match="linear"):
            linear(torch.ones(3))
    assert not is_marked(torch.ones(3))
