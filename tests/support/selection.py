"""Selection written out plainly: every pick looks at every row that is left, and at every row selected so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

Chooser = Callable[[list[int], list[int], list[int]], tuple[int, int] | None]
"""(rows left, rows selected, columns that took them) -> the next row and its column, or None at the end."""


def naive_turns(columns: Sequence[np.ndarray], quotas: Sequence[int] | None) -> Chooser:
    """Round-robin (no quotas), quotas, or with one column the best rows."""

    def choose(left: list[int], rows: list[int], taken_by: list[int]) -> tuple[int, int] | None:
        candidates = []
        for column, values in enumerate(columns):
            own = [row for row in left if np.isfinite(values[row])]
            taken = taken_by.count(column)
            if own and (quotas is None or taken < quotas[column]):
                row = min(own, key=lambda row: (-values[row], row))
                candidates.append((taken / (quotas[column] if quotas else 1), column, row))
        if not candidates:
            return None
        _, column, row = min(candidates)
        return row, column

    return choose


def naive_gains(matrix: np.ndarray) -> Chooser:
    """Balanced: the formula over all rows and columns; ``matrix`` (N, J)."""
    valid = np.isfinite(matrix).all(axis=1)
    scores = np.zeros_like(matrix)
    for j in range(matrix.shape[1]):
        values = matrix[valid, j]
        if len(set(values.tolist())) > 1:
            scores[valid, j] = (values - values.mean()) / values.std()

    def choose(left: list[int], rows: list[int], taken_by: list[int]) -> tuple[int, int] | None:
        left = [row for row in left if valid[row]]
        if not left:
            return None
        total = np.zeros(matrix.shape[1])
        for row in rows:
            total = total + scores[row]
        gains = scores[left] - total / max(1, len(rows))
        return left[int(np.argmax(gains.max(axis=1)))], -1

    return choose


def naive_selection(
    choose: Chooser,
    n_rows: int,
    n: int,
    *,
    sources: Sequence[str] = (),
    limits: Mapping[str, int] | None = None,
    cosines: np.ndarray | None = None,
    threshold: float = 1.0,
) -> tuple[list[int], list[int]]:
    """Rows, and the columns that took them."""
    left, rows, columns = list(range(n_rows)), [], []
    while len(rows) < n and (next_ := choose(left, rows, columns)) is not None:
        row, column = next_
        left.remove(row)
        of_source = [other for other in rows if sources and sources[other] == sources[row]]
        if limits is not None and len(of_source) >= limits.get(sources[row], n_rows):
            continue
        if cosines is not None and any(cosines[row, other] > threshold for other in rows):
            continue
        rows.append(row)
        columns.append(column)
    return rows, columns


def naive_cosines(features: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over stores of the cosines of all pairs, float64 (N, N); 0 where a row is 0."""
    total = np.zeros((len(features[0]),) * 2)
    for rows in features:
        wide = rows.astype(np.float64)
        norms = np.linalg.norm(wide, axis=1)
        unit = wide / np.where(norms > 0, norms, 1)[:, None]
        total += unit @ unit.T
    return total / len(features)
