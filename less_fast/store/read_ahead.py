"""``ReadAhead``: shards of a remote store are fetched before they are asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from less_fast.store.shard import Shard

# Shards that are fetched beside the one in use: each is memory.
_DEPTH = 2


class ReadAhead:
    """Fetches shards; where they are asked for one after the other, the next ones at the same time."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._threads = ThreadPoolExecutor(1 + _DEPTH, "less_fast-fetch")
        self._lock = threading.Lock()
        self._fetching: dict[int, Future[Shard]] = {}
        self._last = -1

    def take(self, number: int, following: list[int], fetch: Callable[[int], Shard]) -> Shard:
        """Shard ``number``; ``following`` are the numbers that a reader from front to back would ask for next."""
        # ``fetch`` is not kept: it is its owner's, and the two would keep each other, and shards, in memory.
        if self._process != os.getpid():
            self._start()  # a forked process has the pool, but none of its threads
        with self._lock:
            in_order = number == self._last + 1 or number in self._fetching
            self._last = number
            wanted = [number, *(following[:_DEPTH] if in_order else [])]
            for other in self._fetching.keys() - set(wanted):
                self._fetching.pop(other).cancel()
            for other in wanted:
                known = self._fetching.get(other)
                if known is None or (known.done() and known.exception()):  # what failed a while ago may not now
                    self._fetching[other] = self._threads.submit(fetch, other)
            shard = self._fetching.pop(number)
        return shard.result()
