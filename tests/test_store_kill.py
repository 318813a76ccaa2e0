"""A writer killed with SIGKILL at any instant leaves a store that resumes to the same bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.children import child_environment
from support.stores import folder_hashes

SCRIPT = Path(__file__).parent / "support" / "store_killer.py"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL and fork are POSIX")


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = child_environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=SCRIPT.parent,
    )


def test_killed_before_any_line(tmp_path: Path) -> None:
    """The lines are drawn evenly over the whole run: creation, every shard, the manifest between them, the close."""
    rounds = 60
    output, _ = start("lines", str(tmp_path), "0", str(rounds)).communicate(timeout=300)
    result = json.loads(output)
    assert result["lines"] > 1000
    assert result["killed"] == rounds
    assert result["wrong"] == []


def test_killed_at_random_times(tmp_path: Path) -> None:
    assert start("write", str(tmp_path / "whole")).wait(60) == 0
    expected = folder_hashes(tmp_path / "whole")
    draw = random.Random(0)
    for _ in range(3):
        writer = start("write", str(tmp_path / "store"))
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.15))
        writer.kill()
        writer.wait()
    assert start("write", str(tmp_path / "store")).wait(60) == 0
    assert folder_hashes(tmp_path / "store") == expected
