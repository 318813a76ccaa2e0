"""``Worker``: which of several processes this one is, as ``torchrun`` says in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from less_fast.errors import LessFastError

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# By these libraries take a process for one of many, and wait for the others.
_PREFIXES = ("TORCHELASTIC_", "LOCAL_WORLD_", "GROUP_", "ROLE_", "MASTER_")


@dataclass(frozen=True)
class Worker:
    """Process ``rank`` of ``size``, and number ``local_rank`` on its machine; on its own where none is named."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Worker:
        """As RANK, LOCAL_RANK and WORLD_SIZE say; raises LessFastError where they are no such numbers."""
        found = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if not {"RANK", "WORLD_SIZE"} <= set(found):
            return cls()
        text = ", ".join(f"{name}={value}" for name, value in found.items())
        if not all(value.isdecimal() for value in found.values()):
            raise LessFastError(f"the environment has {text}; expected numbers, as torchrun sets them")
        worker = cls(int(found["RANK"]), int(found.get("LOCAL_RANK", "0")), int(found["WORLD_SIZE"]))
        if worker.rank >= worker.size:
            raise LessFastError(f"the environment has {text}; expected a RANK below WORLD_SIZE")
        return worker

    @property
    def start(self) -> float:
        """Where in a list of shards this one begins, 0 to 1: the later workers meet, the less they get in the way."""
        return self.rank / self.size

    def device(self, device: str) -> str:
        """The device that a setting means here: ``auto`` is a CUDA device of this worker's own, as far as they go."""
        import torch

        if device != "auto" or self.size == 1 or not torch.cuda.is_available():
            return device
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


@contextmanager
def alone() -> Iterator[None]:
    """Within the block the environment tells of no other process, so that what is done there waits for none."""
    hidden = {name: value for name, value in os.environ.items() if name in _VARIABLES or name.startswith(_PREFIXES)}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
