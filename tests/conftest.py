"""Settings of every test process and of those it starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread: the models are tiny, and threads that wait for each other on a busy machine cost many times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a worker of pytest-xdist starts is none itself: pytest-benchmark, for one, measures nothing in a worker.
for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
    os.environ.pop(name, None)

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the tests that need a GPU run without it
    pass
else:  # How long an example takes is the machine's matter: what else it does at the time is not ours to choose.
    settings.register_profile("busy", deadline=None)
    settings.load_profile("busy")

MOST_WORKERS = 8  # the longest test takes a minute, and more would wait for it
WORKER_BYTES = 3 << 30  # torch, transformers and Triton's interpreter in one, and again in what its tests start


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: a worker per core, as far as there is memory for them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else WORKER_BYTES
    return max(1, min(cores, memory // WORKER_BYTES, MOST_WORKERS))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a pool and two targets, all tiny: what ``support.tiny.config`` names."""
    from support import tiny  # it imports torch, which reads the environment

    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(inputs: Path) -> Path:
    """The folder of a run that the installed command made."""
    from support.cli import run_arguments, shell

    out = inputs / "run"
    done = shell(*run_arguments(inputs, out), "--json", cwd=inputs)
    assert done.returncode == 0, done.stderr
    (inputs / "stdout.json").write_text(done.stdout)
    (inputs / "stderr.txt").write_text(done.stderr)
    return out


@pytest.fixture(scope="session")
def checkpoint(finished: Path) -> Path:
    """The last checkpoint of its warm-up."""
    return finished / "warmup" / "checkpoint-6"


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL below which nothing is."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield "memory://bucket/folder"
    files.store.clear()


@pytest.fixture
def flaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that ``flaky://`` URLs reach; a failed request is repeated without a pause."""
    from support import flaky_files

    from less_fast import paths

    flaky_files.register()
    monkeypatch.setattr(paths, "_FIRST_PAUSE", 0.0)
    monkeypatch.setenv(flaky_files.LOG, str(tmp_path / "requests.txt"))
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"
