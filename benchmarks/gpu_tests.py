"""Do the GPU tests pass on this device, and is compute-sanitizer content with the kernels?"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_bootstrap import ROOT
from gpu_session import Bar, Session

# `python -m pytest` would put the root on sys.path, and with it the folder kernels/.
_PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
# A test that a missing package keeps from being read must not keep the others from running.
_OPTIONS = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_TINY_TESTS = ("tests/test_triton_backend.py",)
_WORKERS = 8  # compiling kernels is the host's work
_TAIL = 40
COUNTS = ("passed", "failed", "errors", "skipped", "unreadable")
_OURS = ("less_fast", "support")


@dataclass(frozen=True)
class Outcome:
    """What a pytest run came to.

    ``unreadable``: files of tests that need a package which is not installed. ``problems``: the first line of all else.
    """

    passed: int
    failed: int
    errors: int
    skipped: int
    unreadable: int
    problems: list[str]
    tail: str
    seconds: float
    reason: str | None


def estimate(session: Session) -> float:
    """Compiling every kernel for the device is most of it."""
    return 0.0 if session.tiny else 85.0


def run(session: Session, *, share: float, sanitize: str | None) -> None:
    """The tests that need a CUDA device, in at most ``share`` of the time left; then the sanitizer where asked for."""
    limit = share * session.seconds_left()
    outcome = pytest(["-m", "gpu", *_parallel(session), *(_TINY_TESTS if session.tiny else ())], limit)
    bad = outcome.failed + outcome.errors + (outcome.passed == 0) + (outcome.reason is not None)
    facts = {name: getattr(outcome, name) for name in (*COUNTS, "problems", "tail")}
    row = session.row(
        "tests",
        "pytest -m gpu",
        [outcome.seconds],
        shape="the suite" if not session.tiny else " ".join(_TINY_TESTS),
        dtype="all",
        bar=Bar("tests that fail, and none at all", bad, 0),
        reason=outcome.reason,
        **facts,
    )
    session.write("run", [row])
    if sanitize is not None:
        for tool in ("memcheck", "racecheck"):
            _sanitize(session, tool, sanitize, session.seconds_left() * share)


def pytest(arguments: Sequence[str], limit: float, prefix: Sequence[str] = ()) -> Outcome:
    """Run pytest from the root in a process of its own, which is ended after ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [*prefix, sys.executable, "-c", _PYTEST, *_OPTIONS, f"--junitxml={report}", *arguments]
        started = time.monotonic()
        code, output = _run(command, limit)
        seconds = time.monotonic() - started
        counts, problems = read_report(report)
    reason = None
    if code is None:
        reason = f"ended after {limit:.0f} s"
    elif code not in (0, 1, 5):  # 1: some failed, 5: none were found
        reason = f"pytest ended with {code}"
    tail = "\n".join(output.strip().splitlines()[-_TAIL:])
    return Outcome(**counts, problems=problems, tail=tail, seconds=seconds, reason=reason)


def read_report(path: Path) -> tuple[dict[str, int], list[str]]:
    """Counts and problems of a JUnit XML report; zeros where there is none."""
    counts = dict.fromkeys(COUNTS, 0)
    problems: list[str] = []
    if not path.exists():
        return counts, problems
    names = {"failure": "failed", "error": "errors", "skipped": "skipped"}
    for case in ElementTree.parse(path).iter("testcase"):
        found = next((child for child in case if child.tag in names), None)
        if found is None:
            counts["passed"] += 1
        elif _lacks_package(found.text or ""):
            counts["unreadable"] += 1
        else:
            counts[names[found.tag]] += 1
            if found.tag != "skipped":
                message = (found.get("message") or "").strip().partition("\n")[0]
                problems.append(f"{case.get('classname')}::{case.get('name')}: {message}")
    return counts, problems


def _lacks_package(text: str) -> bool:
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", text)
    return missing is not None and missing[1] not in _OURS and importlib.util.find_spec(missing[1]) is None


def _run(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Exit status (None where it was ended) and output of a command in a process group of its own."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        code: int | None
        try:
            code = process.wait(timeout=max(limit, 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        log.seek(0)
        return code, log.read()


def _parallel(session: Session) -> list[str]:
    return ["-n", str(_WORKERS)] if session.cuda and importlib.util.find_spec("xdist") is not None else []


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in a CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    folders = [str(Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _sanitize(session: Session, tool: str, expression: str, limit: float) -> None:
    program = sanitizer()
    if program is None or not session.cuda:
        reason = "it needs a CUDA device" if program else "compute-sanitizer is not on PATH, nor in a CUDA toolkit"
        session.skip(f"compute-sanitizer {tool}", reason)
        return
    prefix = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    outcome = pytest(["-m", "gpu", "-k", expression, "-x"], limit, prefix)
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", outcome.tail)
    clean = outcome.reason is None and outcome.failed + outcome.errors == 0 and outcome.passed > 0
    facts: dict[str, Any] = {"passed": outcome.passed, "summaries": summaries, "tail": outcome.tail}
    row = session.row(
        "tests",
        f"compute-sanitizer {tool}",
        [outcome.seconds],
        shape=f"-k {expression!r}",
        dtype="all",
        bar=Bar("findings", 0 if clean else 1, 0),
        reason=outcome.reason,
        **facts,
    )
    session.write("run", [row])
