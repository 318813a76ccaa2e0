"""``ahead``: a thread prepares the next item while the caller works with this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def ahead(thread: ThreadPoolExecutor, make: Callable[[_Item], _Made], items: Iterable[_Item]) -> Iterator[_Made]:
    """``make(item)`` of every item in order, each made by ``thread`` while the one before it is in use."""
    waiting: deque[Future[_Made]] = deque()
    for item in items:
        waiting.append(thread.submit(make, item))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
