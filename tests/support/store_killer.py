"""Writes a store in a process of its own, so that it can be killed.

``store_killer.py write PATH`` writes every pending shard. ``store_killer.py lines PATH SEED ROUNDS`` kills forked
writers by SIGKILL before the k-th executed line of less_fast.store, for ``ROUNDS`` values of k spread over the whole
run, and again while they resume, and prints as JSON how many there were and which k left a store unlike the
uninterrupted one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy as np

from support.stores import folder_hashes, open_writer, write_pending

N, K = 10, 4
FEATURES = np.arange(N * K, dtype=np.float32).reshape(N, K) / 7
STATUS = np.arange(N, dtype=np.uint8) % 3


def write(path: Path) -> None:
    with open_writer(path, N, K, dtype="float16", shard_size=3) as writer:
        write_pending(writer, FEATURES, STATUS)


def forked(job: Callable[[], None]) -> bool:
    """Run in a child process; False if it was killed."""
    child = os.fork()
    if not child:
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def traced(action: Callable[[], None]) -> None:
    """Call ``action`` before every line of less_fast.store that this process executes from now on."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if "less_fast/store/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            action()
        return trace

    sys.settrace(trace)


def count_lines(path: Path) -> int:
    lines = [0]

    def count() -> None:
        lines[0] += 1

    traced(count)
    write(path)
    sys.settrace(None)
    return lines[0]


def write_until(path: Path, last: int) -> None:
    left = [last]

    def kill_at_last() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    traced(kill_at_last)
    write(path)


def kill_at_lines(path: Path, seed: int, rounds: int) -> dict[str, Any]:
    whole = path / "whole"
    total = count_lines(whole)
    expected = folder_hashes(whole)
    draw = random.Random(seed)
    killed, wrong = 0, []
    for i in range(rounds):
        line = draw.randrange(total * i // rounds, total * (i + 1) // rounds)
        store = path / "store"
        killed += not forked(lambda store=store, line=line: write_until(store, line))  # type: ignore[misc]
        again = draw.randrange(total)  # the resuming writer is killed too, unless it gets done before
        forked(lambda store=store, again=again: write_until(store, again))  # type: ignore[misc]
        forked(lambda store=store: write(store))  # type: ignore[misc]
        if folder_hashes(store) != expected:
            wrong.append(line)
        shutil.rmtree(store)
    return {"lines": total, "killed": killed, "wrong": wrong}


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    if sys.argv[1] == "write":
        print("ready", flush=True)
        write(folder)
    else:
        with patch("os.fsync"):  # what a killed process wrote is not lost: only a power cut would tell the difference
            result = kill_at_lines(folder, int(sys.argv[3]), int(sys.argv[4]))
        print(json.dumps(result))
