"""``run_killer.py FOLDER ROUNDS``: kills runs, lets them go on, and compares with one that was left alone.

A run is forked ``ROUNDS`` times into a new folder and killed after a time spread evenly over the duration of a whole
run; it is then started again and killed once more, and then finished. The times are a run's own CPU seconds, which
another process cannot stretch: the kernel ends it by a signal that, like SIGKILL, leaves it no last word. Prints as
JSON how many were killed, and which files of which rounds are unlike the uninterrupted run's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from less_fast.config import RunConfig
from less_fast.pipeline import run
from support import tiny

# Made from time stamps and paths; the settings name the folder itself.
_VARYING = ("config.yaml", "warmup/")


def start(config: RunConfig, seconds: float = 0) -> int:
    """A forked run, to be killed when it has computed for so long (0: never); its process id."""
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            run(config, progress=False, say=lambda line: None)
            code = 0
        finally:
            os._exit(code)
    return child


def finish(config: RunConfig, seconds: float = 0) -> float | None:
    """The CPU seconds that a run took; None where it was killed, after so many (0: it is left alone)."""
    _, status, used = os.wait4(start(config, seconds), 0)
    if seconds and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return None
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
    return used.ru_utime + used.ru_stime


def hashes(folder: Path) -> dict[str, str]:
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    kept = [name for name in names if not name.startswith(_VARYING) and not name.endswith((".lock", ".partial"))]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in kept}


def main(folder: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    settings = tiny.config(folder)
    duration = finish(RunConfig(**{**settings, "out": str(folder / "whole")})) or 0.0
    expected = hashes(folder / "whole")
    draw = random.Random(0)
    n_killed, unlike = 0, []
    for number in range(rounds):
        out = folder / f"killed-{number}"
        config = RunConfig(**{**settings, "out": str(out)})
        while (seconds := finish(config, duration * (number + 0.5) / rounds)) is not None:
            duration = min(duration, seconds)  # the first run was slower, by what else the machine did perhaps
            shutil.rmtree(out)
        n_killed += 1 + (finish(config, duration * draw.random()) is None)
        finish(config)
        found = hashes(out)
        unlike += [f"{out.name}/{name}" for name in {**expected, **found} if expected.get(name) != found.get(name)]
    print(json.dumps({"files": len(expected), "killed": n_killed, "unlike": unlike}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
