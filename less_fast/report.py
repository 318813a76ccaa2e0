"""The tables that commands print, and the grouping of datasets that a report may be by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from less_fast.errors import LessFastError
from less_fast.paths import PathOrUrl, to_path

if TYPE_CHECKING:
    from less_fast.checkpoints import Checkpoint
    from less_fast.scoring import Share


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        return "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def checkpoint_table(checkpoints: Sequence[Checkpoint], weights: Sequence[float]) -> str:
    """Which checkpoints are used, with the learning rates that weigh them."""
    rows = [
        (str(c.step), f"{c.epoch:g}", f"{c.learning_rate:.4e}", f"{weight:.4f}")
        for c, weight in zip(checkpoints, weights)
    ]
    return table(("checkpoint", "epoch", "learning rate", "weight"), rows)


def composition_table(shares: Mapping[str, Sequence[Share]], name: str = "dataset") -> str:
    """One line per dataset (or group): its share of the pool, and of what was selected for each task."""
    first = next(iter(shares.values()))
    by_task = [{share.dataset: share for share in task} for task in shares.values()]
    order = sorted(first, key=lambda share: (-share.n_pool, share.dataset))
    rows = [
        (share.dataset, _percent(share.pool_share), *(_percent(task[share.dataset].selected_share) for task in by_task))
        for share in order
    ]
    sizes = [sum(share.n_selected for share in task) for task in shares.values()]
    rows.append(("examples", f"{sum(share.n_pool for share in first):,}", *(f"{size:,}" for size in sizes)))
    return table((name, "pool", *shares), rows)


def mixture_table(shares: Sequence[Share], name: str = "dataset") -> str:
    """One line per dataset (or group) of one selection: shares of pool and selection, lift, and mean scores by task."""
    tasks = list(shares[0].pool_mean) if shares else []
    places = ("pool", "selected")
    means = [f"{task}: mean in {place}" if len(tasks) > 1 else f"mean in {place}" for task in tasks for place in places]
    rows = [
        (
            share.dataset,
            _percent(share.pool_share),
            _percent(share.selected_share),
            f"{share.lift:.2f} x",
            *(_mean(values[task]) for task in tasks for values in (share.pool_mean, share.selected_mean)),
        )
        for share in sorted(shares, key=lambda share: (-share.n_pool, share.dataset))
    ]
    n_pool, n_selected = sum(share.n_pool for share in shares), sum(share.n_selected for share in shares)
    rows.append(("examples", f"{n_pool:,}", f"{n_selected:,}", *[""] * (1 + len(means))))
    return table((name, *places, "lift", *means), rows)


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def read_groups(path: PathOrUrl) -> dict[str, str]:
    """The mapping dataset name -> group of a JSON file; raises LessFastError where it is none."""
    try:
        groups = json.loads(to_path(path).read_bytes().decode())
    except OSError as error:
        raise LessFastError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise LessFastError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(groups, dict) or not all(isinstance(value, str) for value in groups.values()):
        raise LessFastError(f'{path}: expected one JSON object, {{"dataset": "group", ...}}')
    return groups
