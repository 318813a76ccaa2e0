"""Make less_fast importable from a source checkout without installing it, and without exposing the folder kernels/."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("less_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
_MARK = ".less_fast_checkout"
_BUILD_SECONDS = 240


def ensure_importable() -> str:
    """Put this checkout's less_fast on sys.path and in PYTHONPATH, for this process and its children; says how.

    What is installed is taken where it is this checkout's (an editable install); another version never is.
    """
    _hide_root()
    spec = importlib.util.find_spec("less_fast")
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    if origin is not None and ROOT in origin.parents and _has_kernels():
        return f"less_fast is installed from {ROOT}"
    if origin is not None and _mark(origin.parent.parent) == str(ROOT):
        atexit.register(shutil.rmtree, origin.parent.parent, ignore_errors=True)
        return f"less_fast is built in {origin.parent.parent}"
    site = Path(tempfile.mkdtemp(prefix="less_fast_site_"))
    atexit.register(shutil.rmtree, site, ignore_errors=True)
    how = build(site)
    for name in [name for name in sys.modules if name.partition(".")[0] == "less_fast"]:
        del sys.modules[name]
    sys.path.insert(0, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()
    return how


def build(site: Path) -> str:
    """Build the checkout into ``site``, compiled modules included; pure Python where pip cannot. Says what was done."""
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        _copy(source)  # a build writes beside its sources, and the checkout may be read-only
        options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)]
        try:
            done = subprocess.run(
                command, cwd=temporary, env=_environment(), capture_output=True, text=True, timeout=_BUILD_SECONDS
            )
            failure = None if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip())[-400:]
        except subprocess.TimeoutExpired:
            failure = f"pip took more than {_BUILD_SECONDS} s"
        if failure is None:
            (site / _MARK).write_text(str(ROOT))
            return f"less_fast was built in {site}"
        copy_python(source, site)
    (site / _MARK).write_text(str(ROOT))
    return f"less_fast is used as pure Python, without its compiled modules: {failure}"


def _environment() -> dict[str, str]:
    """Builds for the devices of this machine alone, which takes a fraction of the time."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return dict(os.environ)
    return {"LESS_FAST_CUDA_ARCHS": " ".join(sorted(set(printed.replace(".", "").split()))), **os.environ}


def copy_python(source: Path, site: Path) -> None:
    """The package as it is installed, without compiled modules: kernels/ becomes less_fast/kernels."""
    shutil.rmtree(site / "less_fast", ignore_errors=True)
    shutil.copytree(source / "less_fast", site / "less_fast", ignore=_ignore)
    shutil.copytree(source / "kernels", site / "less_fast/kernels", ignore=_ignore)


_ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "*.egg-info", "build")


def _copy(target: Path) -> None:
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=_ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)


def _hide_root() -> None:
    """With the root on the path, kernels/ could be imported under a name that transformers gives a meaning to."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    kept = [e for e in os.environ.get("PYTHONPATH", "").split(os.pathsep) if e and Path(e).resolve() != ROOT]
    os.environ["PYTHONPATH"] = os.pathsep.join(kept)


def _has_kernels() -> bool:
    try:
        return importlib.util.find_spec("less_fast.kernels") is not None
    except ImportError:
        return False


def _mark(site: Path) -> str | None:
    return (site / _MARK).read_text() if (site / _MARK).exists() else None
