"""The checkpoints that a Hugging Face Trainer run leaves behind, and the learning rates that weigh them in LESS."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from less_fast.errors import LessFastError

_STATE_NAME = "trainer_state.json"
_FOLDER_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a training run.

    ``path``: its folder. ``step``, ``epoch``: how far training was. ``learning_rate``: the mean learning rate of the
    epoch it ends, which is its weight in LESS.
    """

    path: Path
    step: int
    epoch: float
    learning_rate: float


def discover_checkpoints(run_dir: str | Path, steps: Sequence[int] | None = None) -> list[Checkpoint]:
    """The checkpoints of a Trainer run in order of training, with their learning rates from ``trainer_state.json``.

    ``steps``: those wanted, in the order wanted; not given: all. A checkpoint's learning rate is the mean of those
    logged in the epoch it ends; in a run not saved by epochs, of those logged since the checkpoint before it, whether
    that is wanted or not. Raises LessFastError for a folder without checkpoints, a step that is not there, an
    unreadable state and a run that logged no learning rate in such an interval.
    """
    run_dir = Path(run_dir)
    found = checkpoint_folders(run_dir)
    if not found:
        raise LessFastError(
            f"{run_dir}: no checkpoint found; expected folders named checkpoint-<step>, as the Trainer saves"
        )
    there = [step for step, _ in found]
    wanted = there if steps is None else list(steps)
    if absent := [step for step in wanted if step not in there]:
        raise LessFastError(f"{run_dir}: has no checkpoint-{absent[0]}; there are {', '.join(map(str, there))}")
    before = dict(zip(there, [0, *there]))
    folders = dict(found)
    return [_weighed(step, folders[step], before[step]) for step in wanted]


def _weighed(step: int, path: Path, previous_step: int) -> Checkpoint:
    """A checkpoint with its learning rate, from its own Trainer state."""
    state = read_state(path)
    if state is None:
        raise LessFastError(
            f"{path}: {_STATE_NAME} is missing or cut off, or no Trainer state, so the checkpoint was not saved "
            "whole; remove the folder"
        )
    epoch = float(state["epoch"])
    start = _interval_start(step, epoch, previous_step)
    logged = [entry for entry in state["log_history"] if isinstance(entry, dict) and "learning_rate" in entry]
    for entry in logged:
        if not (_is_number(entry["learning_rate"]) and _is_number(entry.get("step"))):
            raise LessFastError(
                f"{path / _STATE_NAME}: log_history has learning_rate {entry['learning_rate']!r:.40} at step "
                f"{entry.get('step')!r:.40}; expected finite numbers; give the weights yourself, or train again"
            )
    rates = [entry["learning_rate"] for entry in logged if start < entry["step"] <= step]
    if not rates:
        raise LessFastError(
            f"{path / _STATE_NAME}: log_history has no learning_rate for steps {start + 1} to {step}, "
            "so the checkpoint has no weight; give the weights yourself, or train with logging_steps=1"
        )
    return Checkpoint(path, step, epoch, math.fsum(rates) / len(rates))


def _interval_start(step: int, epoch: float, previous_step: int) -> int:
    """The step after which a checkpoint's own interval begins."""
    steps_per_epoch = step / epoch if epoch else step
    # Saved at the end of an epoch, to within a step: older Trainers write 0.99 for a last partial batch.
    if round(epoch) >= 1 and abs(epoch - round(epoch)) * steps_per_epoch <= 1:
        # Earlier checkpoints may have been deleted; the epoch is one epoch long all the same.
        return max(previous_step, step - round(steps_per_epoch))
    return previous_step


def checkpoint_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """The folders named checkpoint-<step>, as (step, folder) in order of steps."""
    if not run_dir.is_dir():
        return []
    matches = ((_FOLDER_NAME.fullmatch(path.name), path) for path in run_dir.iterdir() if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's Trainer state, or None where it is not whole; the Trainer writes it after all other files."""
    try:
        state = json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, no JSON, or no UTF-8
        return None
    is_whole = isinstance(state, dict) and _is_number(state.get("epoch")) and isinstance(state.get("log_history"), list)
    return state if is_whole else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
