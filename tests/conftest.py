"""Settings of every test process and of those it starts."""

import os
from pathlib import Path

import pytest

# One thread: the models are tiny, and threads that wait for each other on a busy machine cost many times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
