"""The machine that this process runs on: whose its processor is, and what may be used of it, as a container grants less
than there is, and neither Python nor torch looks.

The kernel's files are described in its documentation of control groups: `cpu.max` and `memory.max` of the second
version, `cpu.cfs_quota_us` and its like of the first.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_PROCESSORS = Path("/proc/cpuinfo")


def memory() -> int:
    """Memory that this process may use, in bytes."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_numbers("memory.max"), *_numbers("memory/memory.limit_in_bytes")])


def processors() -> int:
    """How many this process may run on at once."""
    count = os.cpu_count() or 1
    if sys.platform == "linux":
        count = len(os.sched_getaffinity(0))
    return min(count, processor_quota() or count)


def processor_quota() -> int | None:
    """Processors whose time a container grants, of whatever many it shows; None where there is no limit. More threads
    than that are all stopped together until the next tenth of a second."""
    limit = _numbers("cpu.max") or _numbers("cpu/cpu.cfs_quota_us") + _numbers("cpu/cpu.cfs_period_us")
    if len(limit) < 2:  # the limit is "max", or -1
        return None
    microseconds, period = limit
    return max(1, -(-microseconds // period))


@cache
def is_amd() -> bool:
    """Whether the processor is AMD's, as far as Linux tells."""
    try:
        return "AuthenticAMD" in _PROCESSORS.read_text("utf-8", "replace")
    except OSError:
        return False


def _numbers(name: str) -> list[int]:
    try:
        words = (_GROUPS / name).read_text("ascii").split()
    except OSError:
        return []
    return [int(word) for word in words if word.isdigit()]
