"""What a container grants, from files as the kernel writes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gptvae_cli import machine


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in place of the kernel's."""
    monkeypatch.setattr(machine, "_GROUPS", tmp_path)
    for name in ("cpu", "memory"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "1000 100000\n"}, 1),
        ({"cpu.max": "50000 10000\n"}, 5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "400000\n"}, None),
    ],
)
def test_processors_of_a_quota(groups: Path, files: dict[str, str], processors: int | None) -> None:
    for name, text in files.items():
        (groups / name).write_text(text)
    assert machine.processor_quota() == processors


def test_processors_are_no_more_than_the_quota_nor_than_there_are(groups: Path) -> None:
    there = os.cpu_count()
    if sys.platform == "linux":
        there = len(os.sched_getaffinity(0))
    assert machine.processors() == there
    (groups / "cpu.max").write_text("100000 100000")
    assert machine.processors() == 1
    (groups / "cpu.max").write_text("100000000 100000")
    assert machine.processors() == there


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_of_a_limit(groups: Path, name: str) -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.memory() == there
    (groups / name).write_text("123456789\n")
    assert machine.memory() == 123456789
    (groups / name).write_text("9223372036854771712\n")  # the first version's way to say that there is none
    assert machine.memory() == there


@pytest.mark.parametrize(
    ("content", "amd"), [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False), (None, False)]
)
def test_whose_the_processor_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, amd: bool
) -> None:
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(machine, "_PROCESSORS", tmp_path / "cpuinfo")
    assert machine.is_amd.__wrapped__() == amd
