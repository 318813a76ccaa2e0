"""The whole of LESS from one ``RunConfig``: warm-up, features, scores, selection; each part is made once and kept."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from less_fast.checkpoints import Checkpoint, checkpoint_folders, discover_checkpoints, read_state
from less_fast.config import RunConfig
from less_fast.data import Examples, encode_all, load_examples
from less_fast.errors import LessFastError
from less_fast.extraction import extract
from less_fast.model.load import load_model, load_tokenizer, pick_device
from less_fast.model.lora import LoraSettings
from less_fast.ops.accumulate import resolve
from less_fast.optim import AdamState
from less_fast.optim.adam import Precondition
from less_fast.projection import Projection
from less_fast.report import checkpoint_table, composition_table, read_groups
from less_fast.run_folder import RunFolder, write_json
from less_fast.score_table import read_scores
from less_fast.scoring import ScoreStream, Share, composition, select, stream_scores
from less_fast.store import FeatureStore
from less_fast.store.codec import CODECS
from less_fast.store.files import check_free_space, is_locked
from less_fast.warmup import warmup
from less_fast.workers import Worker, alone

Say = Callable[[str], None]

_QUANTISED = ("int8", "1bit")
# Seconds: how often the others of several processes look how far rank 0 has come, and how long they wait for its start.
_POLL_SECONDS = 0.5
_START_SECONDS = 600.0
# How long rank 0 tries to get the folder, while the others look.
_PATIENCE = 5.0


@dataclass(frozen=True)
class RunResult:
    """What a run ends with.

    ``out``: its folder. ``checkpoints``, ``weights``: those that were used; the weights sum to 1. ``selected``: task ->
    rows of the pool, best first, int64. ``report``: the content of report.json. ``table``: the same for people.
    ``made``: what this call made, in order; empty where everything was there already.
    """

    out: Path
    checkpoints: list[Checkpoint]
    weights: list[float]
    selected: dict[str, NDArray[np.int64]]
    report: dict[str, Any]
    table: str
    made: list[str]


def say_to_stderr(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=sys.stderr, flush=True)


def run(config: RunConfig, *, progress: bool = True, say: Say = say_to_stderr) -> RunResult:
    """Warm up, extract, score and select as the settings say; go on where an earlier call with the same ones stopped.

    Under ``torchrun`` all processes make the features together, and rank 0 the rest; all end with the same result.
    ``progress``: show bars. ``say``: gets the lines that tell what is done; rank 0's only. Raises LessFastError for
    missing or wrong input, all of which is read before anything is made, for an ``out`` that holds a run with other
    settings, and on the other ranks where rank 0 ends early.
    """
    worker = Worker.from_environment()
    config.require_complete()
    config = config.resolved()
    pick_device(config.device)
    projection = Projection(config.projection, config.dim, config.seed, config.block, config.nnz)
    pool = load_examples(list(config.train))
    targets = {task: load_examples(file) for task, file in config.targets.items()}
    groups = read_groups(config.groups) if config.groups else None
    _choose(config, np.zeros(len(pool)))  # a fraction that selects nothing is an error now, not after hours
    folder = RunFolder(Path(config.out))
    if worker.rank:
        return _Run(config, folder, projection, pool, targets, groups, worker, False, _say_nothing).follow()
    with folder.writing(_PATIENCE if worker.size > 1 else 0.0):
        folder.adopt(config, say)
        return _Run(config, folder, projection, pool, targets, groups, worker, progress, say).finish()


def _say_nothing(line: str) -> None:
    pass


@dataclass
class _Run:
    """One run, its input read, and its folder locked by this process or, where it follows, by rank 0."""

    config: RunConfig
    folder: RunFolder
    projection: Projection
    pool: Examples
    targets: dict[str, Examples]
    groups: dict[str, str] | None
    worker: Worker
    progress: bool
    say: Say
    made: list[str] = field(default_factory=list)

    def finish(self) -> RunResult:
        self._check_room()
        if not self.folder.features.exists():
            self._check_targets()
        checkpoints, weights = self._checkpoints()
        self.say(checkpoint_table(checkpoints, weights))
        for checkpoint in checkpoints:
            self._features(checkpoint)
        self._scores(checkpoints, weights)
        selected = self._select()
        report, shown = self._report(checkpoints, weights, selected)
        if not self.made:
            self.say(f"{self.folder.path}: everything was there already; nothing was made again")
        return RunResult(self.folder.path, checkpoints, weights, selected, report, shown, self.made)

    def follow(self) -> RunResult:
        """Do a share of the features of the run that rank 0 makes."""
        self._wait(self._has_begun, "it had its checkpoints", running=False)
        checkpoints, weights = self._checkpoints()
        for checkpoint in checkpoints:
            self._features(checkpoint)
        self._wait(self._has_ended, "it had made its selection", running=True)
        selected = self._select()
        report, shown = self._report(checkpoints, weights, selected)
        return RunResult(self.folder.path, checkpoints, weights, selected, report, shown, self.made)

    def _wait(self, happened: Callable[[], bool], what: str, running: bool) -> None:
        """Return once it has happened; raise LessFastError where rank 0, ``running`` or not, is gone or never comes."""
        start = time.monotonic()
        while not happened():
            was_running, running = running, is_locked(self.folder.path)
            if was_running and not running and not happened():
                raise LessFastError(
                    f"{self.folder.path}: rank 0 of the run ended before {what}, and tells why; what was finished is "
                    "kept, repeat the command to go on"
                )
            if not running and time.monotonic() - start > _START_SECONDS:
                raise LessFastError(f"{self.folder.path}: rank 0 of the run did not begin; start all of its ranks")
            time.sleep(_POLL_SECONDS)

    def _has_begun(self) -> bool:
        if not is_locked(self.folder.path) or not self.folder.checkpoints.exists():
            return False
        recorded = json.loads(self.folder.checkpoints.read_text())
        return RunConfig.load(self.folder.settings) == self.config and recorded["examples"] == self.pool.fingerprint

    def _has_ended(self) -> bool:
        made = [self.folder.report, *map(self.folder.selected, self.targets), *map(self.folder.scores, self.targets)]
        return not is_locked(self.folder.path) and all(file.exists() for file in made)

    def _note(self, what: str) -> None:
        self.made.append(what)
        self.say(f"{what}: done")

    def _check_room(self) -> None:
        if self.folder.features.exists():
            return
        run_dir = self.config.checkpoints
        n_checkpoints = len(checkpoint_folders(Path(run_dir))) if run_dir else self.config.warmup_epochs
        needed = 0
        for examples in (self.pool, *self.targets.values()):
            row = CODECS[self._store_dtype(examples)].tensors(1, self.config.dim).values()
            needed += n_checkpoints * len(examples) * sum(spec.nbytes for spec in row)
        check_free_space(self.folder.path, needed)

    def _store_dtype(self, examples: Examples) -> str:
        """A pool of int8 or 1bit features is compared with targets in full precision: they are few, and it is free."""
        dtype = self.config.store_dtype
        return "float32" if examples is not self.pool and dtype in _QUANTISED else dtype

    def _check_targets(self) -> None:
        """Raise LessFastError for what would fail only after the warm-up: a backend, a target without any label."""
        features = torch.empty(1, self.projection.dim, device=pick_device(self.worker.device(self.config.device)))
        resolve(features, features.view(1, 1, -1), self.projection, self.config.backend)
        tokenizer = load_tokenizer(self.config.model)
        for task, examples in self.targets.items():
            encoded = encode_all(examples, tokenizer, self.config.template, self.config.max_length)
            labelled = {subtask for subtask, item in zip(examples.subtasks, encoded) if item.n_labels}
            if empty := sorted({str(subtask) for subtask in examples.subtasks if subtask not in labelled}):
                part = "" if empty == ["None"] else f" of subtask {empty[0]}"
                raise LessFastError(
                    f"{self.config.targets[task]}: no example{part} has an answer within "
                    f"{self.config.max_length} tokens; "
                    "raise max_length or remove it"
                )

    # Checkpoints

    def _checkpoints(self) -> tuple[list[Checkpoint], list[float]]:
        """The checkpoints and their weights, which sum to 1; recorded, so that a finished warm-up is left alone."""
        file = self.folder.checkpoints
        recorded = json.loads(file.read_text()) if file.exists() else None
        if self.config.checkpoints:
            checkpoints = self._existing(Path(self.config.checkpoints))
        elif recorded and recorded["examples"] == self.pool.fingerprint:
            checkpoints = [
                Checkpoint(**{**entry, "path": self.folder.path / entry["path"]}) for entry in recorded["checkpoints"]
            ]
        else:
            with alone():
                checkpoints = self._warmup()
        given = self.config.checkpoint_weights
        weights = list(given) if given else [checkpoint.learning_rate for checkpoint in checkpoints]
        if len(weights) != len(checkpoints):
            raise LessFastError(
                f"setting checkpoint_weights has {len(weights)} weights for {len(checkpoints)} checkpoints; "
                "expected one each"
            )
        if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise LessFastError(f"checkpoint weights are {weights}; expected numbers of at least 0, not all of them 0")
        weights = [weight / sum(weights) for weight in weights]
        record = {
            "examples": self.pool.fingerprint,
            "checkpoints": [
                {**asdict(checkpoint), "path": self.folder.relative(checkpoint.path)} for checkpoint in checkpoints
            ],
            "weights": weights,
        }
        if recorded is None:
            write_json(file, record)
        elif recorded != record:
            raise LessFastError(
                f"{self.folder.path}: was begun with other examples or checkpoints than there are now "
                f"(compare {file}); restore them, or choose another out"
            )
        return checkpoints, weights

    def _existing(self, run_dir: Path) -> list[Checkpoint]:
        given = self.config.checkpoint_weights
        if given is None or not checkpoint_folders(run_dir):
            return discover_checkpoints(run_dir)
        # With weights of their own, checkpoints need no Trainer state.
        return [
            Checkpoint(path, step, float((read_state(path) or {}).get("epoch", number)), weight)
            for number, ((step, path), weight) in enumerate(zip(checkpoint_folders(run_dir), given), start=1)
        ]

    def _warmup(self) -> list[Checkpoint]:
        config = self.config
        modules = config.lora_modules
        checkpoints = warmup(
            config.model,
            self.pool,
            self.folder.warmup,
            fraction=config.warmup_fraction,
            epochs=config.warmup_epochs,
            learning_rate=config.warmup_learning_rate,
            batch_size=config.warmup_batch_size,
            micro_batch_size=config.warmup_micro_batch_size,
            lora=LoraSettings(
                config.lora_rank,
                config.lora_alpha,
                config.lora_dropout,
                modules if modules == "auto" else list(modules),
            ),
            template=config.template,
            max_length=config.max_length,
            seed=config.warmup_seed,
            subset_seed=config.warmup_subset_seed,
            dtype=config.dtype,
            device=config.device,
            progress=self.progress,
        )
        self._note("warm-up")
        return checkpoints

    # Features

    def _features(self, checkpoint: Checkpoint) -> None:
        """The stores of one checkpoint that are not whole; the model is loaded once for all of them."""
        jobs = {self.folder.train_store(checkpoint): self.pool}
        jobs |= {self.folder.target_store(checkpoint, task): examples for task, examples in self.targets.items()}
        todo = {path: examples for path, examples in jobs.items() if not self._is_whole(path, examples)}
        if not todo:
            return
        model, tokenizer = self._load(checkpoint)
        for path, examples in todo.items():
            precondition: Precondition = "sgd"
            if examples is self.pool:
                precondition = AdamState.from_checkpoint(checkpoint.path, model, self.config.adam_rule)
            self.say(f"features at checkpoint {checkpoint.step}: {path.name}, {len(examples):,} examples")
            extract(
                model,
                examples,
                path,
                projection=self.projection,
                precondition=precondition,
                tokenizer=tokenizer,
                template=self.config.template,
                max_length=self.config.max_length,
                dtype=self._store_dtype(examples),
                token_budget=self.config.token_budget,
                shard_size=self.config.shard_size,
                targets=self.config.modules,
                backend=self.config.backend,
                packing=self.config.packing,
                compile_model=self.config.compile_model,
                checkpoint_activations=self.config.checkpoint_activations,
                progress=self.progress,
            )
            self.made.append(f"features of checkpoint {checkpoint.step}, {path.name}")

    def _load(self, checkpoint: Checkpoint) -> tuple[Any, Any]:
        config = self.config
        options: dict[str, Any] = {
            "dtype": config.dtype,
            "device": self.worker.device(config.device) if config.device_map is None else config.device,
            "device_map": config.device_map,
            "quantization": config.quantization,
        }
        if (checkpoint.path / "adapter_config.json").exists() or self.config.modules is None:
            return load_model(self.config.model, checkpoint.path, **options)
        return load_model(checkpoint.path, **options)

    def _is_whole(self, path: Path, examples: Examples) -> bool:
        """Whether a store is there and of these examples; whatever else is wrong with it, the extraction will say."""
        try:
            store = FeatureStore(path)
        except LessFastError:
            return False
        files = [(path / shard["file"], shard["bytes"]) for shard in store.manifest["shards"]]
        there = all(file.exists() and file.stat().st_size == size for file, size in files)
        return there and store.facts.get("examples") == examples.fingerprint

    # Scores, selection, report

    def _scores(self, checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> None:
        suffixes = [".parquet", ".csv"] if self.config.scores_csv else [".parquet"]
        todo = [task for task in self.targets if not all(self.folder.scores(task, s).exists() for s in suffixes)]
        if not todo:
            return
        train = [FeatureStore(self.folder.train_store(checkpoint), verify=True) for checkpoint in checkpoints]
        stores = {
            task: [FeatureStore(self.folder.target_store(checkpoint, task), verify=True) for checkpoint in checkpoints]
            for task in todo
        }
        tables = {task: [self.folder.scores(task, suffix) for suffix in suffixes] for task in todo}
        stream = ScoreStream(train, stores, weights)
        stream_scores(stream, tables, how=self.config.aggregate, progress=self.progress)
        for task in todo:
            self._note(f"scores for {task}")

    def _select(self) -> dict[str, NDArray[np.int64]]:
        selected = {}
        for task in self.targets:
            rows = selected[task] = _choose(self.config, read_scores(self.folder.scores(task)).scores)
            file = self.folder.selected(task)
            if not file.exists():
                file.parent.mkdir(exist_ok=True)
                self.pool.write_lines(rows, file)
                self._note(f"selection of {len(rows):,} examples for {task}")
        return selected

    def _report(
        self, checkpoints: Sequence[Checkpoint], weights: Sequence[float], selected: dict[str, NDArray[np.int64]]
    ) -> tuple[dict[str, Any], str]:
        datasets = self._shares(self.pool.datasets, selected)
        report: dict[str, Any] = {
            "examples": len(self.pool),
            "checkpoints": [
                {"step": checkpoint.step, "learning_rate": checkpoint.learning_rate, "weight": weight}
                for checkpoint, weight in zip(checkpoints, weights)
            ],
            "targets": {
                task: {"selected": len(rows), "datasets": _plain(datasets[task])} for task, rows in selected.items()
            },
        }
        shown, name = datasets, "dataset"
        if self.groups is not None:
            names = [self.groups.get(dataset, dataset) for dataset in self.pool.datasets]
            shown, name = self._shares(names, selected), "group"
            for task, shares in shown.items():
                report["targets"][task]["groups"] = _plain(shares)
        file = self.folder.report
        if not file.exists() or json.loads(file.read_text()) != report:
            write_json(file, report)
        return report, composition_table(shown, name)

    def _shares(self, sources: list[str], selected: dict[str, NDArray[np.int64]]) -> dict[str, list[Share]]:
        return {
            task: composition(sources, rows, {task: read_scores(self.folder.scores(task)).scores})
            for task, rows in selected.items()
        }


def _choose(config: RunConfig, scores: NDArray[Any]) -> NDArray[np.int64]:
    return select(scores, n=config.n) if config.n is not None else select(scores, fraction=config.fraction)


def _plain(shares: Sequence[Share]) -> list[dict[str, Any]]:
    return [asdict(share) for share in shares]
