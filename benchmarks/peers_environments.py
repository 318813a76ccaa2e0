"""One virtual environment per peer, with the versions of the tests' constraints for what the peers share."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


@dataclass(frozen=True)
class Environment:
    """What pip installs; ``remove``: what it must not leave there."""

    name: str
    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()


# bergson asks for torchvision and torchaudio but imports neither; as PyPI builds them they do not load beside a torch
# for CPUs, and transformers, which imports torchvision where it finds it, then fails with them.
ENVIRONMENTS = {
    "bergson": Environment("bergson", ("bergson==2.5.1", "peft"), ("torchvision", "torchaudio")),
    "dattri-llm": Environment("dattri-llm", ("dattri-llm[attribution,transformers]==0.1.0", "peft")),
    "traker": Environment("traker", ("traker==0.3.2", "transformers", "peft")),
}


def python_of(environment: Environment, folder: Path) -> Path:
    """The environment's Python; it is made where the folder does not hold it as described.

    Raises subprocess.CalledProcessError where pip fails.
    """
    home = folder.absolute() / environment.name
    python, done = home / "bin/python", home / ".installed"
    described = f"{environment}\n{CONSTRAINTS.read_text()}"
    if done.exists() and done.read_text() == described:
        return python
    print(f"installing {', '.join(environment.requirements)} into {home}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    install = [*pip, "install", "-c", str(CONSTRAINTS)]
    # torch first and alone: with an exact version a CPU wheel that is at hand is taken, and nothing pulls another one.
    for requirements in (["torch"], environment.requirements):
        subprocess.run([*install, *requirements], check=True)
    if environment.remove:
        subprocess.run([*pip, "uninstall", "--yes", *environment.remove], check=True)
    done.write_text(described)
    return python


def surroundings(threads: int, *, isolated: bool) -> dict[str, str]:
    """The variables of a worker's process: the CPU alone, so many threads, no network; isolated: no paths of ours."""
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    kept = {name: value for name, value in os.environ.items() if not (isolated and name == "PYTHONPATH")}
    return {**kept, **alone}
