"""What a selection is worth: the loss on a task's test examples after fine-tuning on what was selected for it."""

from __future__ import annotations

import hashlib
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_case import Case, Exact, Float32, Workspace, as_tensor, subtask_means, top, unit
from quality_sketch import sketch, stored_cosines

from less_fast.data import collate, encode_all, load_examples, plan_batches
from less_fast.layout import ParameterLayout
from less_fast.model import load_model
from less_fast.model.inputs import Inputs
from less_fast.model.loss import example_losses, label_logits
from less_fast.projection import Projection
from less_fast.warmup import warmup

TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class Arm:
    """One way to choose training examples. ``kind``: exact, sketch, random, all or none; ``store``: of a sketch."""

    name: str
    kind: str
    store: str = "float32"


ARMS = (
    Arm("exact", "exact"),
    Arm("srht, float32", "sketch"),
    Arm("srht, 1bit", "sketch", "1bit"),
    Arm("random", "random"),
    Arm("all", "all"),
    Arm("none", "none"),
)


@dataclass(frozen=True)
class Training:
    """Rows of the pool, ascending, the seed of the adapter, the order and the dropout, and the tasks to test.

    Without rows it is the model as it is. Arms that select the same rows share a training.
    """

    rows: tuple[int, ...]
    seed: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """A file's name for the result."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:24]


def run(space: Workspace, n_seeds: int, n_jobs: int) -> Iterator[dict[str, Any]]:
    """A result for every task and arm: the mean and standard deviation of the test loss over the seeds."""
    selected = space.result("selected", lambda: select(space))
    tasks = tuple(space.case.targets)
    arms = {(task, arm): _trainings(arm, task, tasks, selected, n_seeds) for task in tasks for arm in ARMS}
    # The longest first, so that no process is left alone with one at the end.
    different = {training for trainings in arms.values() for training in trainings}
    todo = sorted(different, key=lambda training: (-len(training.rows), training.name))
    losses = dict(zip(todo, _train_all(space, todo, n_jobs)))
    for (task, arm), trainings in arms.items():
        values = [losses[training]["losses"][task] for training in trainings]
        exact = selected["exact"][task]
        yield {
            "task": task,
            "arm": arm.name,
            "examples": len(trainings[0].rows),
            "in_common_with_exact": len(set(exact) & set(trainings[0].rows)) / len(exact),
            "seeds": len(values),
            "test_loss": statistics.mean(values),
            "test_loss_sd": statistics.stdev(values) if len(values) > 1 else None,
            "test_losses": values,
            "seconds": [losses[training]["seconds"] for training in trainings],
        }


def _trainings(arm: Arm, task: str, tasks: tuple[str, ...], selected: Any, n_seeds: int) -> list[Training]:
    """What the arm does for a task, one for every seed; what does not depend on the task is tested on all."""
    valid, seeds = selected["valid"], range(n_seeds)
    if arm.kind == "none":
        return [Training((), 0, tasks)]
    if arm.kind == "random":
        n = len(selected["exact"][task])
        drawn = [np.random.default_rng(seed).choice(valid, n, replace=False).tolist() for seed in seeds]
    else:
        drawn = [valid if arm.kind == "all" else selected[arm.name][task]] * n_seeds
    tested = tasks if arm.kind in ("random", "all") else (task,)
    return [Training(tuple(sorted(rows)), seed, tested) for rows, seed in zip(drawn, seeds)]


def select(space: Workspace) -> dict[str, Any]:
    """Arm -> task -> rows of the pool that LESS selects over all checkpoints, best first; ``valid``: usable rows."""
    case = space.case
    checkpoints = space.checkpoints()
    total = sum(checkpoint.learning_rate for checkpoint in checkpoints)
    means: dict[str, dict[str, Float32]] = {}
    rows = None
    for checkpoint in checkpoints:
        exact = space.exact(checkpoint)
        if rows is not None and not np.array_equal(rows, exact.rows):
            raise SystemExit("usable examples differ between checkpoints; their rows would be mixed up")
        rows = exact.rows
        for name, cosines in _cosines(exact, space.layout(checkpoint), case.store_dim).items():
            for task, values in subtask_means(cosines, exact.groups).items():
                weighted = values * np.float32(checkpoint.learning_rate / total)
                known = means.setdefault(name, {})
                known[task] = known[task] + weighted if task in known else weighted
    assert rows is not None
    best = {
        name: {task: rows[top(values.max(axis=1), space.n_selected())].tolist() for task, values in by_task.items()}
        for name, by_task in means.items()
    }
    return {**best, "valid": rows.tolist()}


def _cosines(exact: Exact, layout: ParameterLayout, dim: int) -> dict[str, Float32]:
    """Arm -> (N, Q) at a checkpoint."""
    projection = Projection("srht", dim)
    pool, targets = (sketch(as_tensor(rows), layout, projection).numpy() for rows in (exact.pool, exact.targets))
    sketched = {arm.name: stored_cosines(pool, targets, arm.store, "float32") for arm in ARMS if arm.kind == "sketch"}
    return {"exact": unit(exact.pool) @ unit(exact.targets).T, **sketched}


def _train_all(space: Workspace, todo: Sequence[Training], n_jobs: int) -> list[dict[str, Any]]:
    work = partial(train_and_test, space.folder, space.case)
    if n_jobs == 1:
        return list(map(work, todo))
    # One thread each: matrices this small gain little from a second one.
    with ProcessPoolExecutor(n_jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(work, todo))


def train_and_test(folder: Path, case: Case, training: Training) -> dict[str, Any]:
    """Fine-tune on the rows and return task -> ``losses`` on its test examples, and the ``seconds`` it took."""
    space = Workspace(folder, case)

    def make() -> dict[str, Any]:
        started = time.perf_counter()
        out = folder / "trainings" / f"{training.name}.run"
        adapter = None
        if training.rows:
            adapter = warmup(
                case.model,
                load_examples(case.pool).take(training.rows),
                out,
                fraction=1.0,
                epochs=case.tuning_epochs,
                learning_rate=case.learning_rate,
                batch_size=case.tuning_batch,
                lora=case.lora,
                max_length=case.max_length,
                seed=training.seed,
                device="cpu",
                progress=False,
            )[-1].path
        model, tokenizer = load_model(case.model, adapter, device="cpu")
        losses = {task: test_loss(model, tokenizer, case.tests[task], case.max_length) for task in training.tasks}
        shutil.rmtree(out, ignore_errors=True)
        return {"losses": losses, "seconds": time.perf_counter() - started}

    return space.result(f"trainings/{training.name}", make)


@torch.no_grad()
def test_loss(model: torch.nn.Module, tokenizer: Any, file: Path, max_length: int) -> float:
    """Mean over the examples of the mean cross-entropy of an example's answer tokens, in nats."""
    encoded = [item for item in encode_all(load_examples(file), tokenizer, "tulu", max_length) if item.n_labels]
    losses = []
    for batch in plan_batches([len(item.input_ids) for item in encoded], TOKEN_BUDGET):
        inputs = Inputs.of(collate([encoded[i] for i in batch], 0), torch.device("cpu"), packed=False)
        losses += example_losses(label_logits(model, inputs.input_ids, inputs.labels), inputs.labels).tolist()
    return statistics.mean(losses)
