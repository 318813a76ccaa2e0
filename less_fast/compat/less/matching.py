"""``python -m less_fast.compat.less.matching``: LESS's influence scores from folders of ``.pt`` files."""

from __future__ import annotations

import argparse
import math
import string
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from less_fast.checkpoints import Checkpoint, discover_checkpoints
from less_fast.compat.less.command import run_command
from less_fast.compat.less.files import NORMALISED, Sidecar, read_folder, read_sidecar, save_tensor
from less_fast.errors import LessFastError
from less_fast.progress import progress_bar
from less_fast.report import checkpoint_table
from less_fast.scoring.targets import WHOLE_TARGET
from less_fast.store.files import failed_write

# Validation rows of LESS's own tasks come subtask by subtask, as many of each.
N_SUBTASKS = {"mmlu": 57, "bbh": 27, "tydiqa": 9}

_Path = str | PathLike[str]
_BLOCK_BYTES = 64 << 20


def influence_scores(
    train: Sequence[_Path],
    targets: Mapping[str, Sequence[_Path]],
    weights: Sequence[float],
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """LESS's score of every training row for each task: float32 (N,) on the CPU.

    score = max over subtasks of the mean over the subtask's rows t of sum_c w_c · <train_c, target_c[t]>

    in LESS's own order of operations. ``train``, and each of ``targets`` (task -> paths): the folder, or file, of every
    checkpoint; their rows are expected to be normalised. ``weights``: one per checkpoint; made to sum to 1. Subtasks
    are those that the target's folder names; else LESS's counts for its three tasks; else the task is one subtask.
    Training rows are read block by block, once for all tasks. A row without a finite gradient has score -inf.

    Raises LessFastError for a target row without a finite gradient, and for folders that cannot be compared.
    """
    weights = normalised_weights(weights)
    if len(weights) != len(train):
        raise LessFastError(f"{len(weights)} checkpoint weights for {len(train)} checkpoints; expected one each")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [read_folder(path) for path in train]
    for path, tensor in zip(train, rows):
        if len(tensor) != len(rows[0]):
            raise LessFastError(f"{train[0]} has {len(rows[0])} rows and {path} {len(tensor)}; expected the same rows")
    _check_same_examples(train)
    for paths in targets.values():
        _check_same_examples(paths)
    opened = {task: _open_target(task, paths, train, rows, device) for task, paths in targets.items()}
    excluded = _excluded(train)
    scores = {task: torch.full((len(rows[0]),), -math.inf) for task in targets}
    step = max(1, _BLOCK_BYTES // (4 * max(1, rows[0].shape[1])))
    with progress_bar(len(rows[0]), unit="ex", desc="scores", show=progress) as bar:
        for start in range(0, len(rows[0]), step):
            window = slice(start, min(start + step, len(rows[0])))
            blocks = [tensor[window].to(device).float() for tensor in rows]
            usable = torch.stack([block.isfinite().all(1) for block in blocks]).all(0).cpu()
            for task, target in opened.items():
                found = target.scores(blocks, weights).cpu()
                scores[task][window] = found.where(usable, torch.tensor(-math.inf))
            bar.update(window.stop - start)
    for task_scores in scores.values():
        task_scores[excluded] = -math.inf
    return scores


def normalised_weights(weights: Sequence[float]) -> list[float]:
    """The weights as LESS takes them: divided by their sum unless that is 1; LessFastError where that is senseless."""
    total = sum(weights)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise LessFastError(
            f"checkpoint weights are {list(weights)}; expected numbers of at least 0, not all of them 0"
        )
    return list(weights) if total == 1 else [weight / total for weight in weights]


@dataclass(frozen=True)
class _Target:
    """One task. ``checkpoints``: its rows at each, float32 (n, D). ``subtasks``: row numbers of each subtask."""

    checkpoints: list[Tensor]
    subtasks: list[list[int]]

    def scores(self, blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Float32 (b,), of training rows that are given as one (b, D) per checkpoint."""
        total = sum(w * (block @ rows.T) for w, block, rows in zip(weights, blocks, self.checkpoints))
        assert isinstance(total, Tensor)
        size = len(self.subtasks[0])
        in_order = [row for rows in self.subtasks for row in rows] == list(range(total.shape[1]))
        if in_order and all(
            len(rows) == size for rows in self.subtasks
        ):  # as LESS's are, and in its order of additions
            means = total.reshape(len(total), len(self.subtasks), -1).mean(-1)
        else:
            means = torch.stack([total[:, rows].mean(-1) for rows in self.subtasks], 1)
        return means.max(-1)[0]


def _open_target(
    task: str, paths: Sequence[_Path], train: Sequence[_Path], rows: Sequence[Tensor], device: torch.device
) -> _Target:
    if len(paths) != len(train):
        raise LessFastError(f"task {task} has {len(paths)} folders for {len(train)} checkpoints; expected one each")
    checkpoints: list[Tensor] = []
    for path, train_path, train_rows in zip(paths, train, rows):
        _check_pair(train_path, path)
        tensor = read_folder(path).to(device).float()
        if tensor.shape[1] != train_rows.shape[1]:
            raise LessFastError(
                f"{train_path} has rows of {train_rows.shape[1]} features and {path} of {tensor.shape[1]}; "
                "they were made with different projections and cannot be compared"
            )
        if checkpoints and len(tensor) != len(checkpoints[0]):
            raise LessFastError(
                f"{paths[0]} has {len(checkpoints[0])} rows and {path} {len(tensor)}; collect one again"
            )
        checkpoints.append(tensor)
        _refuse_unusable(task, path, tensor)
    return _Target(checkpoints, _subtasks(task, len(checkpoints[0]), read_sidecar(paths[0])))


def _check_same_examples(paths: Sequence[_Path]) -> None:
    """Raise LessFastError where what is known of two checkpoints' folders says that their rows are other examples."""
    first = read_sidecar(paths[0])
    for path in paths[1:]:
        other = read_sidecar(path)
        if first is None or other is None:
            continue
        same_rows = first.rows == other.rows
        if not same_rows or first.facts.get("examples") != other.facts.get("examples"):
            raise LessFastError(
                f"{paths[0]} and {path} hold the rows of different examples; collect one again from the other's file"
            )


def _check_pair(train: _Path, target: _Path) -> None:
    """Raise LessFastError where what is known of two folders says that their features mean different things."""
    ours, theirs = read_sidecar(train), read_sidecar(target)
    if ours is None and theirs is None:
        return
    if ours is None or theirs is None:
        made, other = (target, train) if ours is None else (train, target)
        raise LessFastError(
            f"less_fast made {made} and not {other}, so their projections differ and they cannot be compared; "
            "collect both with the same program"
        )
    for name in ("projection", "projector", "layout_hash"):
        a, b = ours.facts.get(name), theirs.facts.get(name)
        if a != b:
            raise LessFastError(
                f"{train} and {target} cannot be compared: {name} is {a} in the first and {b} in the second; "
                "collect one of them again with the settings of the other"
            )
    for name in ("model", "adapter"):
        if ours.facts.get(name) != theirs.facts.get(name):
            warnings.warn(f"{train} and {target} were made with different {name}s", stacklevel=4)


def _refuse_unusable(task: str, path: _Path, rows: Tensor) -> None:
    if not len(rows):
        raise LessFastError(f"{path}: has no rows; task {task} needs at least one")
    sidecar = read_sidecar(path)
    reasons = dict.fromkeys((~rows.isfinite().all(1)).nonzero().flatten().tolist(), "not finite")
    reasons |= sidecar.excluded if sidecar else {}
    if bad := sorted(reasons):
        name = f" ({sidecar.rows.ids[bad[0]]})" if sidecar else ""
        short = reasons[bad[0]] == "no labels"
        remedy = "raise max_length, or leave it out of the examples," if short else "leave it out of the examples"
        more = f", and so are {len(bad) - 1} more" if len(bad) > 1 else ""
        raise LessFastError(
            f"{path}: row {bad[0]}{name} of task {task} is unusable ({reasons[bad[0]]}){more}, so that scores would "
            f"mean nothing; {remedy} and collect the task's gradients again"
        )


def _subtasks(task: str, n_rows: int, sidecar: Sidecar | None) -> list[list[int]]:
    """The row numbers of each subtask."""
    names = sidecar.rows.subtasks if sidecar else []
    if any(name is not None for name in names):
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(WHOLE_TARGET if name is None else name, []).append(row)
        return list(groups.values())
    count = N_SUBTASKS.get(task, 1)
    if n_rows % count:
        raise LessFastError(
            f"task {task} has {n_rows} rows, which are not {count} subtasks of equal size; collect all of its "
            "examples, or give the task another name to score it as one"
        )
    size = n_rows // count
    return [list(range(start, start + size)) for start in range(0, n_rows, size)]


def _excluded(paths: Sequence[_Path]) -> list[int]:
    sidecars = [read_sidecar(path) for path in paths]
    return sorted({row for sidecar in sidecars if sidecar for row in sidecar.excluded})


# Paths


def find_paths(template: str, names: Sequence[str], ckpts: Sequence[int]) -> tuple[dict[str, list[Path]], str]:
    """The path of every name at every checkpoint, name -> paths; and how the template's placeholders were read.

    ``{name}`` and ``{ckpt}`` mean what they say. Of two ``{}`` LESS's code fills the first with the checkpoint, while
    the templates in its README have the name first: whichever gives files that exist is taken, LESS's code's first.
    Raises LessFastError where neither does, naming a file that is missing.
    """
    fields = {field for _, field, _, _ in _parsed(template) if field is not None}
    if fields & {"name", "ckpt"}:
        readings = {"by name": lambda name, ckpt: template.format(name=name, ckpt=ckpt)}
    else:
        readings = {
            "checkpoint first": lambda name, ckpt: template.format(ckpt, name),
            "name first": lambda name, ckpt: template.format(name, ckpt),
        }
    missing = []
    for reading, fill in readings.items():
        try:
            paths = {name: [Path(fill(name, ckpt)) for ckpt in ckpts] for name in names}
        except (IndexError, KeyError, ValueError) as error:
            raise _bad_template(template) from error
        every = [path for of_name in paths.values() for path in of_name]
        absent = [path for path in every if not _is_there(path)]
        if not absent:
            if len(set(every)) < len(names) * len(ckpts):
                raise LessFastError(
                    f"path template {template!r} gives the same path twice ({every[0]}); expected places for both the "
                    "name and the checkpoint, {} {} or {name} {ckpt}, and every name and checkpoint once"
                )
            return paths, reading
        missing.append(absent[0])
    tried = " nor ".join(str(path) for path in dict.fromkeys(missing))
    raise LessFastError(
        f"path template {template!r}: there is no {tried} (a file, or a folder with {NORMALISED}); collect the "
        "gradients first, or correct the template"
    )


def _parsed(template: str) -> Iterable[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise _bad_template(template) from error


def _bad_template(template: str) -> LessFastError:
    return LessFastError(
        f"path template {template!r} cannot be filled in; expected places for the name and the checkpoint, "
        "{} {} or {name} {ckpt}"
    )


def _is_there(path: Path) -> bool:
    return path.is_file() or (path / NORMALISED).is_file()


def find_run(gradients: Path) -> Path | None:
    """The training run of a folder of gradients in the layout of LESS's README: out/JOB beside grads/JOB/..."""
    for folder in gradients.absolute().parents:
        if folder.parent.name == "grads" and (run := folder.parent.parent / "out" / folder.name).is_dir():
            return run
    return None


# The command


def _weights(arguments: argparse.Namespace, gradients: Path) -> list[float]:
    """The weights that were given, or those of the training run; they are shown before they are used."""
    ckpts = arguments.ckpts
    if arguments.checkpoint_weights is not None:
        weights = normalised_weights(arguments.checkpoint_weights)
        if len(weights) != len(ckpts):
            raise LessFastError(f"{len(weights)} checkpoint weights for {len(ckpts)} checkpoints; expected one each")
        print("\n".join(f"checkpoint {ckpt}: weight {weight:.4f}" for ckpt, weight in zip(ckpts, weights)))
        return weights
    run = arguments.run_dir or find_run(gradients)
    if run is None:
        raise LessFastError(
            "the checkpoints have no weights: give --checkpoint_weights, or --run_dir, the folder of the training run, "
            "to take the mean learning rate of each checkpoint's epoch"
        )
    return _shown(discover_checkpoints(run, ckpts), run)


def _shown(checkpoints: Sequence[Checkpoint], run: Path) -> list[float]:
    weights = normalised_weights([checkpoint.learning_rate for checkpoint in checkpoints])
    print(f"weights from the learning rates of {run}:\n{checkpoint_table(checkpoints, weights)}")
    return weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m less_fast.compat.less.matching", description=__doc__)
    add = parser.add_argument
    add("--gradient_path", default="{} ckpt{}", help="template of the training gradients' paths")
    add("--train_file_names", nargs="+", required=True, help="names of the training files")
    add("--ckpts", type=int, nargs="+", help="checkpoints; default: all of --run_dir")
    add("--checkpoint_weights", type=float, nargs="+", help="their weights; default: from the run's learning rates")
    add("--target_task_names", nargs="+", required=True, help="names of the target tasks")
    add("--validation_gradient_path", default="{} ckpt{}", help="template of the validation gradients' paths")
    add("--output_path", type=Path, default=Path("selected_data"), help="folder for the scores")
    add("--run_dir", type=Path, help="folder of the training run, with checkpoint-N in it (not in LESS)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``{output_path}/{task}/{name}_influence_score.pt`` for every task and training file."""
    arguments = _parser().parse_args(argv)
    if arguments.ckpts is None:
        if arguments.run_dir is None:
            raise LessFastError("no checkpoints were named: give --ckpts, or --run_dir to take all of a training run")
        arguments.ckpts = [checkpoint.step for checkpoint in discover_checkpoints(arguments.run_dir)]
    train, reading = find_paths(arguments.gradient_path, arguments.train_file_names, arguments.ckpts)
    print(f"training gradients: {arguments.gradient_path!r} read {reading}, such as {next(iter(train.values()))[0]}")
    template = arguments.validation_gradient_path
    targets, reading = find_paths(template, arguments.target_task_names, arguments.ckpts)
    print(f"validation gradients: {template!r} read {reading}, such as {next(iter(targets.values()))[0]}")
    weights = _weights(arguments, next(iter(train.values()))[0])
    for name, paths in train.items():
        for task, scores in influence_scores(paths, targets, weights, progress=True).items():
            file = arguments.output_path / task / f"{name}_influence_score.pt"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                save_tensor(scores, file)
            except OSError as error:
                raise failed_write(file, error, "the gradients are as they were") from error
            unusable = int(scores.isinf().sum())
            note = f", {unusable:,} of them without a usable gradient" if unusable else ""
            print(f"{file}: scores of {len(scores):,} examples{note}")


if __name__ == "__main__":
    run_command(main)
