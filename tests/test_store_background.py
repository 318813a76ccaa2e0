"""The background writer: order, a bounded queue, and what happens to errors."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from less_fast.store.background import BackgroundWriter


def test_writes_happen_in_order_in_one_other_thread_and_are_done_at_the_end() -> None:
    done: list[tuple[int, str]] = []

    def write(i: int) -> None:
        time.sleep(0.002)
        done.append((i, threading.current_thread().name))

    with BackgroundWriter() as writer:
        for i in range(10):
            writer.submit(lambda i=i: write(i))  # type: ignore[misc]
    assert [i for i, _ in done] == list(range(10))
    (name,) = {name for _, name in done}
    assert name != threading.current_thread().name


def test_the_queue_is_bounded() -> None:
    gate, submitted = threading.Event(), []

    def produce() -> None:
        with BackgroundWriter() as writer:
            for i in range(5):
                writer.submit(gate.wait)  # type: ignore[arg-type]
                submitted.append(i)

    producer = threading.Thread(target=produce)
    producer.start()
    while len(submitted) < 2:
        time.sleep(0.001)
    time.sleep(0.1)
    try:
        assert submitted == [0, 1]  # one is being written, one waits
    finally:
        gate.set()
        producer.join()
    assert submitted == list(range(5))


@pytest.mark.parametrize("more", [0, 1, 5])
def test_an_error_is_raised_once_and_what_follows_is_dropped(more: int) -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"), BackgroundWriter() as writer:
        writer.submit(lambda: done.append(0))
        writer.submit(fail)
        for i in range(more):
            writer.submit(lambda i=i: done.append(1 + i))  # type: ignore[misc]
            time.sleep(0.01)
    assert done[0] == 0 and len(done) <= 1 + min(more, 1)


def test_an_error_outside_still_lets_submitted_writes_finish() -> None:
    done: list[int] = []
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        for i in range(2):
            writer.submit(lambda i=i: (time.sleep(0.02), done.append(i))[0])  # type: ignore[misc,func-returns-value]
        raise KeyboardInterrupt
    assert done == [0, 1]


def test_what_was_submitted_before_an_interruption_of_submit_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives while the main thread waits for room in the queue."""
    gate, done = threading.Event(), []
    original = Future.result

    def interrupted(self: Any, timeout: float | None = None) -> Any:
        gate.set()
        monkeypatch.setattr(Future, "result", original)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.submit(lambda: (gate.wait(), done.append(0))[0])  # type: ignore[arg-type, return-value]
        writer.submit(lambda: done.append(1))
        monkeypatch.setattr(Future, "result", interrupted)
        writer.submit(lambda: done.append(2))
    assert done == [0, 1]
