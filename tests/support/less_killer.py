"""``less_killer.py FOLDER ROUNDS``: kills ``get_info`` before the k-th change of the disk, for ``ROUNDS`` values of k.

A change is a rename, a removal, a new folder or an ``fsync``; k is spread over a whole run and its last changes. The
run is then started again, killed once more in every second round, and finished. Prints as JSON how many runs were
killed, and which files of which rounds are unlike the uninterrupted run's.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from less_fast.compat.less import get_info, job
from less_fast.errors import LessFastError

# What a run imports when it needs it.
IMPORTS = ("peft", "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers", "datasets")
CHANGES = ("replace", "unlink", "rmdir", "mkdir", "fsync")


def child(arguments: list[str], kill_at: int | None, counter: int | None = None) -> int:
    """A forked run's status by ``waitpid``; ``counter``: a descriptor to write the number of changes to."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    seen = [0]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **options)

        return call

    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        get_info.main(arguments)
        if counter is not None:
            os.write(counter, str(seen[0]).encode())
        code = 0
    except LessFastError:
        code = 2
    finally:
        os._exit(code)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main(folder: Path, rounds: int, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    job.SHARD_SIZE = 16
    for module in IMPORTS:  # here, and nothing is run: a fork of a process with threads may wait for one for ever
        importlib.import_module(module)
    reading, writing = os.pipe()
    assert child([*arguments, "--output_path", str(folder / "whole")], None, writing) == 0
    n_changes = int(os.read(reading, 20))
    expected = hashes(folder / "whole")
    spread = [1 + round(i * (n_changes - 1) / (rounds - 3)) for i in range(rounds - 2)]
    unlike, n_killed = [], 0
    for number, k in enumerate([*spread, n_changes - 1, n_changes - 3]):
        out = folder / f"killed-{number}"
        command = [*arguments, "--output_path", str(out)]
        n_killed += os.WIFSIGNALED(child(command, k))
        if number % 2:
            n_killed += os.WIFSIGNALED(child(command, 5))
        assert child(command, None) == 0, f"round {number}, killed at {k}, does not finish"
        found = hashes(out)
        unlike += [f"{k}: {name}" for name in {**expected, **found} if expected.get(name) != found.get(name)]
    print(json.dumps({"files": sorted(expected), "changes": n_changes, "killed": n_killed, "unlike": unlike}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
