"""``BackgroundWriter``: shards are written while the next ones are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

# Finished shards that wait to be written, beside the one that is being written: what they hold is memory.
_WAITING = 1


class BackgroundWriter:
    """Runs writes one after the other in a thread of its own; they are done when the context is left.

    An error of a write is raised by the next :meth:`submit` or :meth:`wait`, or on leaving the context; writes that
    have not begun by then are dropped. Where another error (or Ctrl-C) leaves the context, what was submitted before is
    still written.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "less_fast-writer")
        self._queue: deque[Future[None]] = deque()

    def submit(self, write: Callable[[], None]) -> None:
        """Have ``write`` called in the background; waits while more than one write is waiting already."""
        while self._queue and (self._queue[0].done() or len(self._queue) > _WAITING):
            self._take()
        self._queue.append(self._thread.submit(write))

    def wait(self) -> None:
        """Return when all that was submitted is written."""
        while self._queue:
            self._take()

    def _take(self) -> None:
        oldest = self._queue[0]
        try:
            oldest.result()
        finally:
            # Ctrl-C while waiting is no reason to drop what was submitted; a write that failed is.
            if oldest.done():
                self._queue.popleft()
                if oldest.exception() is not None:
                    self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)
