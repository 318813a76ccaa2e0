"""The folder of a run.

    config.yaml                          every setting, paths made absolute
    warmup/checkpoint-*/                 the warm-up's checkpoints (none where ``checkpoints`` names a finished run)
    checkpoints.json                     the checkpoints in use, their learning rates and weights
    features/checkpoint-N/train/         store of the pool's features, through Adam
    features/checkpoint-N/target-TASK/   store of a target's features, plain gradients
    scores/TASK.parquet                  a score for every example of the pool (TASK.csv too, where asked for)
    selected/TASK.jsonl                  the selected examples, best first; lines of JSON Lines files byte for byte
    report.json                          what the pool and every selection are made of

Everything appears whole or not at all. A run that was killed goes on with the same call and ends with the same files,
bit for bit on the same machine; targets may be added later, everything else has to stay as it was.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from less_fast.checkpoints import Checkpoint
from less_fast.config import RunConfig
from less_fast.errors import LessFastError
from less_fast.paths import AnyPath
from less_fast.store import atomic_file
from less_fast.store.files import FolderLock, failed_write


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files are, and the check that they are this run's."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "config.yaml"

    @property
    def warmup(self) -> Path:
        return self.path / "warmup"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints.json"

    @property
    def features(self) -> Path:
        return self.path / "features"

    @property
    def report(self) -> Path:
        return self.path / "report.json"

    def train_store(self, checkpoint: Checkpoint) -> Path:
        return self.features / f"checkpoint-{checkpoint.step}" / "train"

    def target_store(self, checkpoint: Checkpoint, task: str) -> Path:
        return self.features / f"checkpoint-{checkpoint.step}" / f"target-{task}"

    def scores(self, task: str, suffix: str = ".parquet") -> Path:
        return self.path / "scores" / f"{task}{suffix}"

    def selected(self, task: str) -> Path:
        return self.path / "selected" / f"{task}.jsonl"

    def relative(self, path: Path) -> str:
        """A path inside the folder without it, so that the folder may be moved."""
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)

    @contextlib.contextmanager
    def writing(self, patience: float = 0.0) -> Iterator[None]:
        """Hold the folder against other processes, and say in one line what a full or read-only disk means.

        ``patience``: seconds to wait for those that only look whether it is held.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(self.path, patience=patience)
            try:
                yield
            finally:
                lock.release()
        except OSError as error:
            place = Path(error.filename or self.path)
            raise failed_write(place, error, "what was finished is kept") from error

    def adopt(self, config: RunConfig, say: Callable[[str], None]) -> None:
        """Write the settings down, or check that they are those that the folder was begun with.

        Raises LessFastError naming each changed setting. More targets are no change: they use what is there.
        """
        entries = {entry.name for entry in self.path.iterdir()} - {".lock", "config.yaml.tmp"}
        if not self.settings.exists() and entries:
            raise LessFastError(f"{self.path}: holds {min(entries)} and is not a run's folder; choose another out")
        if entries <= {"config.yaml"}:  # nothing was made yet: settings that failed may be corrected
            config.save(self.settings)
            return
        begun = RunConfig.load(self.settings)
        added = {task: file for task, file in config.targets.items() if task not in begun.targets}
        # A run that was moved as a whole is still the same run.
        expected = replace(begun, out=config.out, targets={**begun.targets, **added})
        if changes := _changes(expected, config):
            raise LessFastError(
                f"{self.path}: holds a run with other settings (old -> new): {'; '.join(changes)}; resume with the old "
                "ones, or choose another out ('less-fast select' makes other selections from the same scores)"
            )
        if config != begun:
            config.save(self.settings)
        say(f"{self.path}: going on with the run there" + (f"; new targets: {', '.join(added)}" if added else ""))


def _changes(old: RunConfig, new: RunConfig) -> list[str]:
    before, after = _flat(old), _flat(new)
    names = list({**before, **after})
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _flat(config: RunConfig) -> dict[str, Any]:
    values = config.to_dict()
    return {**values, **{f"targets.{task}": file for task, file in values.pop("targets").items()}}


def write_json(path: AnyPath, content: Any) -> None:
    """Write a file that appears whole or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
