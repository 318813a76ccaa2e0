"""Calling the command line in tests: in this process, or as the installed command in its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from less_fast.cli import app
from support import tiny

SIZES = [
    "--dim",
    "128",
    "--block",
    "32",
    "--max-length",
    "128",
    "--shard-size",
    "8",
    "--device",
    "cpu",
    "--no-progress",
]


def less_fast(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object, status: int = 2) -> str:
    """The one line that a refused command prints."""
    result = less_fast(*arguments)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error", "interrupted"))]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return lines[0]


def shell(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    command = [sys.executable, "-c", "from less_fast.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


def run_arguments(inputs: Path, out: Path, **changes: Any) -> list[str]:
    """``less-fast run`` with every setting given as a flag."""
    arguments = ["run", "--no-progress"]
    for name, value in tiny.config(inputs, out=str(out), **changes).items():
        flag = "--target" if name == "targets" else f"--{name.replace('_', '-')}"
        values = [f"{task}={file}" for task, file in value.items()] if isinstance(value, dict) else value
        for item in values if isinstance(values, list) else [values]:
            arguments += [flag, str(item)]
    return arguments
