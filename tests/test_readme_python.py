"""The Python in README runs as printed, top to bottom, and does what its comments say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptvae_cli
from tests.cli.conftest import WIDTH, make_model

README = (Path(gptvae_cli.__file__).parent.parent / "README.md").read_text("utf-8")


@pytest.mark.usefixtures("one_thread")
def test_python_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    make_model(tmp_path / "model.safetensors", steps=7)
    (tmp_path / "gptvae-run").symlink_to(tmp_path)
    (tmp_path / "gptvae-demo").mkdir()
    (tmp_path / "gptvae-demo" / "run").symlink_to(tmp_path)
    (tmp_path / "gptvae-demo" / "names.txt").write_text("emma\nchristoph\nanna\n")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), found)
    assert found["z"].shape == (2, WIDTH)
    assert found["z"].dtype == np.float32
    assert [len(found[name]) for name in ("texts", "new", "between", "near", "turned")] == [6, 5, 5, 5, 4]
    assert [len(found[name]) for name in ("in_a", "others")] == [2, 1]
    assert found["mean"].shape == found["std"].shape == (1, WIDTH)
    assert found["steps"] == 7
    printed = capsys.readouterr().out
    assert printed == "latents has the shape (2, 7), the latents of this model have 8 dimensions; " + (
        "encode again with this model, or name the model that made it\n"
    )
