"""The benchmarks, which are run by hand, still find what they measure."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest

from gptvae_cli.config import DataConfig, SizeConfig, TrainConfig
from tests import benchmarks
from tests.benchmarks.latent import study

SCRIPTS = [found.name for found in pkgutil.walk_packages(benchmarks.__path__, "tests.benchmarks.") if not found.ispkg]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_can_be_started(name: str) -> None:
    """It names functions of the package, some of them when it is imported."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "rdkit":
            raise
        pytest.skip("needs rdkit, which is no dependency")


@pytest.mark.parametrize("arm", study.ARMS.values(), ids=study.ARMS)
def test_an_arm_of_the_study_is_made_of_options_that_there_are(arm: dict[str, Any]) -> None:
    SizeConfig(**{name: value for name, value in arm.items() if name in study.SHAPE})
    DataConfig(**{name: value for name, value in arm.items() if name in study.DATA})
    TrainConfig(**{name: value for name, value in arm.items() if name not in (*study.SHAPE, *study.DATA)})
