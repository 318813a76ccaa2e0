"""LESS's scoring and selection, written plainly from their description, and a call of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from less_fast.compat.less import write_selected_data


def less_matching(
    train: Mapping[str, Sequence[Path]], targets: Mapping[str, Sequence[Path]], weights: Sequence[float], out: Path
) -> None:
    """Name -> folders with all_orig.pt, one per checkpoint; whole matrices, one task and file after the other."""
    if sum(weights) != 1:
        weights = [weight / sum(weights) for weight in weights]
    for task in targets:
        for name in train:
            influence = torch.zeros(())
            for weight, train_folder, target_folder in zip(weights, train[name], targets[task]):
                rows = torch.load(train_folder / "all_orig.pt").float()
                target = torch.load(target_folder / "all_orig.pt").float()
                influence = influence + weight * torch.matmul(rows, target.transpose(0, 1))
            per_subtask = influence.reshape(len(influence), {"mmlu": 57, "bbh": 27, "tydiqa": 9}[task], -1).mean(-1)
            (out / task).mkdir(parents=True, exist_ok=True)
            torch.save(per_subtask.max(-1)[0], out / task / f"{name}_influence_score.pt")


def less_write(folder: Path, files: Mapping[str, Path], percentage: float | None, max_samples: int | None) -> None:
    """sorted.csv and top_*.jsonl of one task from its scores; ``files``: name -> JSON Lines file."""
    every, number = [], []
    for name in files:
        scores = torch.load(folder / f"{name}_influence_score.pt")
        every += scores.tolist()
        number += [(name, index) for index in range(len(scores))]
    order = sorted(range(len(every)), key=lambda row: every[row], reverse=True)
    with open(folder / "sorted.csv", "w", encoding="utf-8") as table:
        table.write("file name, index, score\n")
        for row in order:
            table.write(f"{number[row][0]}, {number[row][1]}, {round(every[row], 6)}\n")
    count, amount = max_samples, f"num{max_samples}"
    if percentage is not None:
        count, amount = int(percentage * len(every)), f"p{percentage}"
    lines = {}
    for name, path in files.items():
        with open(path, encoding="utf-8", errors="ignore") as file:
            lines[name] = file.readlines()
    with open(folder / f"top_{amount}.jsonl", "w", encoding="utf-8") as selected:
        for row in order[:count]:
            name, index = number[row]
            selected.write(lines[name][index])


def select(out: Path, files: Mapping[str, Path], *flags: str, tasks: Iterable[str] = ("t",)) -> None:
    """Our command."""
    named = ["--train_file_names", *files, "--train_files", *map(str, files.values())]
    write_selected_data.main([*named, "--target_task_names", *tasks, "--output_path", str(out), *flags])
