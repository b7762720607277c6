"""What people get: the wheel, its version, and the pages beside it. README has `test_readme.py`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import gptvae_cli

ROOT = Path(gptvae_cli.__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because building leaves files in the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "gptvae_cli", source / "gptvae_cli", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"gptvae_cli/py.typed", "gptvae_cli/corpora/names_us.txt", "gptvae_cli/cli/app.py"} <= names
    assert {name.partition("/")[0] for name in names} == {"gptvae_cli", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}


def test_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    program = "import gptvae_cli; print(gptvae_cli.__file__); from gptvae_cli.cli.app import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", program, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    where, version = ran.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert version == f"gptvae {gptvae_cli.__version__}"


def test_the_source_distribution_can_be_tested(tmp_path: Path) -> None:
    """By packagers, who have nothing else: it holds what git does, `.ci` included."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".*_cache", ".venv", ".git", "gptvae-*")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    kept = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {"CHANGELOG.md", "LICENSE", "tests/conftest.py", "tests/cli/conftest.py"} <= held
    assert {name for name in kept if name.startswith(("gptvae_cli/", "tests/"))} <= held


def test_a_misspelt_name_is_found_by_a_type_checker(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("from gptvae_cli import load\nfrom gptvae_cli import lode\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), str(program)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert 'program.py:2: error: Module "gptvae_cli" has no attribute "lode"' in checked.stdout
    assert "program.py:1" not in checked.stdout


def test_version_is_said_once() -> None:
    """pyproject and the package each hold it, as `--version` may not pay for importlib.metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == gptvae_cli.__version__


def test_checks_run_the_test_command_of_readme() -> None:
    (command,) = re.findall(r"^python3.*pytest$", README, re.MULTILINE)
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("this is not a checkout: there is no .ci/run")
    assert command in script.read_text("utf-8").splitlines()


def test_changelog_keeps_its_form() -> None:
    """Keep a Changelog 1.1: the unreleased part on top, known headings below it."""
    lines = (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    assert versions[0] == "## [Unreleased]"
    assert {line for line in lines if line.startswith("### ")} <= {
        f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }
