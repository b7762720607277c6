"""Lists of items as they come, from sources that a test holds back."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import repeat

import pytest

from gptvae_cli.arrivals import as_they_come, in_pools


class Pipe:
    """A source that gives what a test sends, and tells when it is asked for more."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        self.asked = threading.Semaphore(0)

    def __iter__(self) -> Iterator[str]:
        while True:
            self.asked.release()
            found = self.sent.get(timeout=60)
            if found is None:
                return
            if isinstance(found, Exception):
                raise found
            yield found

    def send(self, *items: str | Exception | None) -> None:
        """Returns when all are taken."""
        for item in items:
            assert self.asked.acquire(timeout=60)
            self.sent.put(item)
        if isinstance(item, str):
            assert self.asked.acquire(timeout=60)
            self.asked.release()


def test_lists_are_of_what_is_there_and_an_empty_one_comes_before_waiting() -> None:
    pipe = Pipe()
    pools = as_they_come(pipe)
    assert next(pools) == [], "nothing has been sent"
    pipe.send("a")
    assert next(pools) == ["a"]
    pipe.send("b", "c", "d")
    assert next(pools) == ["b", "c", "d"]
    assert next(pools) == []
    waiting: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: waiting.put(next(pools)))
    thread.start()
    thread.join(0.2)
    assert waiting.empty(), "it waits"
    pipe.send("e")
    thread.join(60)
    assert waiting.get(timeout=60) == ["e"]
    pipe.send(None)
    assert [each for each in pools if each] == []


def test_all_items_arrive_in_order() -> None:
    items = [str(i) for i in range(20_000)]
    pools = list(as_they_come(items))
    assert [item for pool in pools for item in pool] == items
    assert [*as_they_come([])] == [[]]


def test_an_error_of_the_source_comes_behind_what_it_gave() -> None:
    pipe = Pipe()
    pools = as_they_come(pipe)
    assert next(pools) == []
    pipe.send("a", "b", ValueError("cut"))
    found: list[str] = []
    with pytest.raises(ValueError, match="cut"):
        for pool in pools:
            found += pool
    assert found == ["a", "b"]


@pytest.mark.parametrize(("item", "most"), [("x", 4096), ("x" * 2**18, 4)])
def test_a_list_is_bounded_in_items_and_in_characters(item: str, most: int) -> None:
    """Or memory would grow with what is encoded."""
    sizes = [len(pool) for pool in in_pools(repeat(item, 5 * most - 1))]
    assert sizes == [most] * 4 + [most - 1]
    assert max(len(pool) for pool in as_they_come(repeat(item, 5 * most))) <= most


def test_a_source_is_read_no_further_than_a_list_ahead_and_no_longer_than_it_is_wanted() -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "x"

    before = threading.active_count()
    pools = as_they_come(endless())
    seen = sum(len(next(pools)) for _ in range(5))
    assert taken <= seen + 4096 + 2
    pools.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate()[before:]:
        thread.join(60)
    assert threading.active_count() == before


def test_a_process_ends_while_its_input_is_open() -> None:
    """A thread waits in a read of standard input then, of which Python makes a fatal error where it closes that."""
    program = """if True:
        import sys
        from gptvae_cli.arrivals import as_they_come
        for pool in as_they_come(sys.stdin.buffer):
            if pool:
                sys.exit(7)
    """
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        process.stdin.write(b"a line\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 7
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.communicate()
