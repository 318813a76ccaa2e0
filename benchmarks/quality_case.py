"""What the quality benchmark runs on: a model, a pool, targets, and exact features at the checkpoints of a warm-up."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from less_fast.checkpoints import Checkpoint
from less_fast.data import load_examples
from less_fast.demo.corpus import make_corpus
from less_fast.demo.model import plain_text, train_model, train_tokenizer
from less_fast.errors import LessFastError
from less_fast.extraction import extract
from less_fast.layout import ParameterLayout
from less_fast.model import load_model
from less_fast.model.lora import LoraSettings
from less_fast.model.sites import find_sites
from less_fast.optim import AdamState
from less_fast.projection import Projection
from less_fast.store import FeatureStore, Status, atomic_file
from less_fast.warmup import warmup

Float32 = NDArray[np.float32]
Groups = Mapping[str, list[NDArray[np.int64]]]

POOL = "pool"

# The Trainer asks PEFT's models for a property by its old name, once a training; nothing to act on.
warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)


@dataclass(frozen=True)
class Case:
    """Files and settings. The defaults are those of the README's real run; no figure was looked at to choose them.

    ``targets``, ``tests``: task -> file of the examples that say what to select for, and of those that the result is
    tested on. ``dims``, ``blocks``, ``block_dim``: the K of every kind, the runs of srht besides 64, and their K.
    ``store_dim``: the K that selections are made with. ``share``: of the pool that is selected. ``tuning_epochs``,
    ``tuning_batch``: of the trainings that a selection is judged by.
    """

    source: str
    model: Path
    pool: Path
    targets: Mapping[str, Path]
    tests: Mapping[str, Path]
    rank: int = 8
    alpha: int = 32
    learning_rate: float = 2e-4
    warmup_batch: int = 16
    warmup_epochs: int = 4
    warmup_share: float = 0.05
    max_length: int = 1024
    dims: tuple[int, ...] = (512, 1024, 4096, 8192)
    blocks: tuple[int, ...] = (1, 8, 32, 128)
    block_dim: int = 1024
    store_dim: int = 8192
    share: float = 0.05
    tuning_epochs: int = 2
    tuning_batch: int = 4

    @property
    def lora(self) -> LoraSettings:
        return LoraSettings(self.rank, self.alpha)


def real_case(folder: Path) -> Case:
    """2,000 real examples and four targets, from the folder that LESS_FAST_DATA names."""
    tasks = ("gsm8k", "bbh", "mmlu", "code")
    return Case(
        source="tiny-llama-2.4m, pool_2k",
        model=folder / "models/tiny-llama-2.4m",
        pool=folder / "pool_2k.jsonl.gz",
        targets={task: folder / f"targets/{task}_val.jsonl" for task in tasks},
        tests={task: folder / f"targets/{task}_test.jsonl" for task in tasks},
    )


def tiny_case(folder: Path) -> Case:
    """An invented corpus and a model trained for moments, made in ``folder``: tries the code out, measures nothing."""
    skills = ("dates", "logic")
    sizes = dict.fromkeys(("dates", "logic", "units"), 16)
    corpus = make_corpus(pool_sizes=sizes, target_skills=skills, n_target=12, n_pretraining=8)
    files = {"pool": corpus.pool}
    for skill in skills:
        half = [{**row, "subtask": f"{i % 2}"} for i, row in enumerate(corpus.targets[skill][:6])]
        files |= {skill: half, f"{skill}_test": corpus.targets[skill][6:]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (folder / "model/config.json").exists():
        texts = [plain_text(example) for example in corpus.pretraining]
        tokenizer = train_tokenizer(texts, folder / "model", vocab_size=300)
        train_model(texts, tokenizer, folder / "model", steps=4, hidden_size=32, layers=2, progress=False)
    return Case(
        source="invented corpus: no measurement",
        model=folder / "model",
        pool=folder / "pool.jsonl",
        targets={skill: folder / f"{skill}.jsonl" for skill in skills},
        tests={skill: folder / f"{skill}_test.jsonl" for skill in skills},
        rank=4,
        warmup_epochs=2,
        warmup_batch=4,
        warmup_share=0.25,
        dims=(128, 512),
        blocks=(1, 8),
        block_dim=128,
        store_dim=512,
        share=0.2,
        tuning_epochs=1,
    )


@dataclass(frozen=True)
class Exact:
    """Exact features at one checkpoint: N usable examples of the pool, Q usable ones of all targets, P entries.

    ``pool`` (N, P): LESS's Adam updates. ``targets`` (Q, P): gradients. ``rows``: where the pool's are in its file.
    ``groups``: task -> the rows of ``targets`` in each of its subtasks.
    """

    pool: Float32
    targets: Float32
    rows: NDArray[np.int64]
    groups: Groups


class Workspace:
    """What is made once and kept in a folder: the warm-up, the exact features, and results by name."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        settings = json.loads(json.dumps(asdict(case), default=str))
        if self.result("case", lambda: settings) != settings:
            raise LessFastError(f"{folder}: holds results of another case or other settings; choose another folder")

    def result(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returned when it was first called for this name: plain JSON values."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            made = json.dumps(make())
            with atomic_file(file) as opened:
                opened.write(made.encode())
        return json.loads(file.read_text())

    def n_selected(self) -> int:
        """Rows that a selection has."""
        return int(self.case.share * len(load_examples(self.case.pool)))

    def checkpoints(self) -> list[Checkpoint]:
        """Those of the warm-up, one per epoch."""
        case = self.case
        return warmup(
            case.model,
            load_examples(case.pool),
            self.folder / "warmup",
            fraction=case.warmup_share,
            epochs=case.warmup_epochs,
            learning_rate=case.learning_rate,
            batch_size=case.warmup_batch,
            lora=case.lora,
            max_length=case.max_length,
            device="cpu",
            progress=False,
        )

    def exact(self, checkpoint: Checkpoint) -> Exact:
        """The exact features at a checkpoint."""
        stores = self._stores(checkpoint)
        pool = stores.pop(POOL)
        usable = {name: np.flatnonzero(store.status == Status.OK) for name, store in stores.items()}
        rows = np.flatnonzero(pool.status == Status.OK)
        groups, first = {}, 0
        for task, store in stores.items():
            subtasks = np.array([store.rows.subtasks[row] or "" for row in usable[task]])
            groups[task] = [first + np.flatnonzero(subtasks == name) for name in dict.fromkeys(subtasks.tolist())]
            first += len(subtasks)
        targets = np.concatenate([store[usable[task]] for task, store in stores.items()])
        return Exact(pool[rows], targets, rows, groups)

    def _stores(self, checkpoint: Checkpoint) -> dict[str, FeatureStore]:
        """The pool's store and every target's, with all P entries of a row; those that are not there are made."""
        folder = self.folder / "features" / checkpoint.path.name
        files = {POOL: self.case.pool, **self.case.targets}
        if not all(_is_whole(folder / name) for name in files):
            model, tokenizer = load_model(self.case.model, checkpoint.path, device="cpu")
            adam = AdamState.from_checkpoint(checkpoint.path, model)
            for name, file in files.items():
                extract(
                    model,
                    file,
                    folder / name,
                    projection=Projection("identity", find_sites(model)[1].size),
                    precondition=adam if name == POOL else "sgd",
                    tokenizer=tokenizer,
                    max_length=self.case.max_length,
                    progress=False,
                )
        return {name: FeatureStore(folder / name) for name in files}

    def layout(self, checkpoint: Checkpoint) -> ParameterLayout:
        """Which entry of a row is which."""
        return ParameterLayout.from_list(self._stores(checkpoint)[POOL].facts["layout"])


def _is_whole(path: Path) -> bool:
    try:
        FeatureStore(path)
    except LessFastError:
        return False
    return True


def subtask_means(cosines: Float32, groups: Groups) -> dict[str, Float32]:
    """Task -> (N, subtasks): the mean of (N, Q) cosines over the target rows of each subtask."""
    return {
        task: np.stack([cosines[:, rows].mean(axis=1) for rows in subtasks], axis=1)
        for task, subtasks in groups.items()
    }


def top(scores: Float32, n: int) -> NDArray[np.int64]:
    """The n best rows, best first, equal ones in row order, as :func:`less_fast.select` takes them."""
    return np.argsort(-scores, kind="stable")[:n]


def unit(rows: Float32) -> Float32:
    """Rows divided by their norms; rows of zeros stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def as_tensor(rows: Float32) -> torch.Tensor:
    """The same memory, (n, P), for torch."""
    return torch.from_numpy(np.ascontiguousarray(rows))
