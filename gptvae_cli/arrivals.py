"""Lists of texts or latents to be computed together: as many as pay, or, from a pipe, those that have come."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Sized)

_POOL_ITEMS, _POOL_SIZE = 4096, 2**20
"""How many items, and how many characters of texts, are in a list at most, but for a last one that goes beyond."""


def in_pools(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in long lists."""
    pool: list[Item] = []
    size = 0
    for item in items:
        pool.append(item)
        size += len(item)
        if len(pool) >= _POOL_ITEMS or size >= _POOL_SIZE:
            yield pool
            pool, size = [], 0
    if pool:
        yield pool


def as_they_come(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in lists of all that are there; an empty list says that the next one has to be waited for.

    They are taken from their source in a thread of its own, which is a list ahead at most.
    """
    arrivals = _Arrivals(items)
    try:
        while True:
            pool = arrivals.take(wait=False)
            yield pool
            if not pool:
                pool = arrivals.take(wait=True)
                if not pool:
                    return
                yield pool
    finally:
        arrivals.stop()


class _Arrivals(Generic[Item]):
    """Items that a thread has taken from their source."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = items
        self._there: list[Item] = []
        self._size = 0
        self._error: Exception | None = None
        self._ended = False  # no more will come
        self._stopped = False  # no more are wanted
        self._change = threading.Condition()
        # A daemon, as nothing ends a read of a pipe: at the end of the process it may still wait there.
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, *, wait: bool) -> list[Item]:
        """All that are there. None are if there are to be no more, or if the caller does not wait.

        Raises:
            Exception: what the source raised, once all before that has been taken.
        """
        with self._change:
            if wait:
                self._change.wait_for(lambda: self._there or self._ended)
            taken, self._there, self._size = self._there, [], 0
            self._change.notify_all()
        if not taken and self._error is not None:
            raise self._error
        return taken

    def stop(self) -> None:
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def _read(self) -> None:
        # At its end Python closes standard input where nobody holds it, and aborts if a thread is reading there.
        _held = sys.stdin
        try:
            for item in self._items:
                with self._change:
                    self._change.wait_for(self._has_room)
                    if self._stopped:
                        break
                    self._there.append(item)
                    self._size += len(item)
                    self._change.notify_all()
        except Exception as error:  # raised where the items are taken
            self._error = error
        finally:
            with self._change:
                self._ended = True
                self._change.notify_all()

    def _has_room(self) -> bool:
        return self._stopped or (len(self._there) < _POOL_ITEMS and self._size < _POOL_SIZE)
