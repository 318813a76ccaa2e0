"""``ReadAhead``: shards of a remote store are fetched before they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from less_fast.store.shard import Shard

# Shards that are fetched beside the one in use: each is memory.
_DEPTH = 2


class ReadAhead:
    """Fetches shards with ``fetch``; where they are asked for one after the other, the next ones at the same time."""

    def __init__(self, fetch: Callable[[int], Shard]) -> None:
        self._fetch = fetch
        self._threads = ThreadPoolExecutor(1 + _DEPTH, "less_fast-fetch")
        self._lock = threading.Lock()
        self._fetching: dict[int, Future[Shard]] = {}
        self._last = -1

    def take(self, number: int, following: list[int]) -> Shard:
        """Shard ``number``; ``following`` are the numbers that a reader from front to back would ask for next."""
        with self._lock:
            in_order = number == self._last + 1 or number in self._fetching
            self._last = number
            wanted = [number, *(following[:_DEPTH] if in_order else [])]
            self._fetching = {
                shard: self._fetching.get(shard) or self._threads.submit(self._fetch, shard) for shard in wanted
            }
            shard = self._fetching.pop(number)
        return shard.result()
