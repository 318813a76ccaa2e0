"""Other libraries as PyPI has them: installed beside the tests' environment, and their own tests run unchanged.

Nothing of them is kept in the repository. They land in ``.upstream/`` (ignored by git), a folder per requirement
(and, of packages, per version of Python).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".upstream"

# A plugin of pytest. Tests that say "cuda" or "cuda:0" get the CPU, so that they run where there is no GPU.
CPU_AS_CUDA = """
from types import SimpleNamespace
import pytest, torch
from torch.overrides import TorchFunctionMode
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=108)
def placed(value):
    cuda = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
    return torch.device("cpu") if cuda else value
class CpuAsCuda(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = placed(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(map(placed, args))
        return func(*args, **kwargs)
@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    torch.manual_seed(0)
    with CpuAsCuda():
        return (yield)
"""


def packages(*requirements: str) -> Path:
    """A folder for PYTHONPATH with exactly these packages (no dependencies: name those that are missing)."""
    name = "+".join((*requirements, sys.implementation.cache_tag))  # compiled files are for one version of Python
    return _once(name, lambda folder: _pip("install", "--target", str(folder), *requirements))


def sdist(requirement: str) -> Path:
    """The unpacked source distribution of ``name==version``."""

    def fetch(folder: Path) -> None:
        _pip("download", "--no-binary", ":all:", "--no-build-isolation", "-d", str(folder), requirement)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")

    folder = _once(f"sdist-{requirement}", fetch)
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


def run_tests(
    files: Sequence[Path], path: Iterable[Path], *args: str, env: dict[str, str] | None = None, timeout: float = 300
) -> dict[str, str]:
    """Run test files of a source distribution as they are; the outcome of each by its name.

    A name that several classes or files have is preceded by them: ``test_file::Class::test_name``.
    ``path``: what comes first on PYTHONPATH. Outcomes: ``passed``, ``skipped: reason``, ``failed: first line``.
    """
    with tempfile.TemporaryDirectory() as work:
        report = Path(work) / "report.xml"
        # Neither our configuration nor theirs: the tests alone. The repository itself is not on the path.
        root = os.path.commonpath([file.parent for file in files])  # what the report's names start from
        options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", root, f"--junitxml={report}"]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **(env or {})}
        done = subprocess.run(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", "-m", "pytest", *options, *args]
            + [str(file) for file in files],
            cwd=work,
            env=variables,
            timeout=timeout,
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise AssertionError(f"pytest made no report:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = _by_name(cases, {file.stem for file in files})
    if not outcomes:
        raise AssertionError(f"no test was found:\n{done.stdout[-3000:]}")
    return outcomes


def _by_name(cases: Sequence[ElementTree.Element], modules: set[str]) -> dict[str, str]:
    names = [str(case.get("name")) for case in cases]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    outcomes: dict[str, str] = {}
    for name, case in zip(names, cases):
        if name in repeated:
            where = str(case.get("classname")).split(".")  # folders, file, classes
            first = next(i for i, part in enumerate(where) if part in modules)
            name = "::".join([*where[first:], name])
        if name in outcomes:
            raise AssertionError(f"pytest reported {name} twice")
        outcomes[name] = _outcome(case)
    return outcomes


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error"):
            return f"failed: {(child.get('message') or '').splitlines()[0] if child.get('message') else child.tag}"
        if child.tag == "skipped":
            return f"skipped: {child.get('message')}"
    return "passed"


def _once(name: str, make: object) -> Path:
    folder = CACHE / name.replace("/", "_")
    if folder.exists():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        made = Path(work) / "made"
        made.mkdir()
        assert callable(make)
        make(made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _pip(command: str, *args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", command, "--no-deps", *args],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = f"pip could not {command} {args[-1]}: {done.stderr.strip()[-500:]}"
        if os.environ.get("LESS_FAST_STRICT"):
            pytest.fail(reason)
        pytest.skip(reason)
