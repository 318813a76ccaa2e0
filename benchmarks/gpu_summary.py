"""One page of Markdown from the rows of a run: every bar, what was skipped and why, what failed, and where it ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_VERDICTS = {True: "yes", False: "**no**", None: "not judged"}


def summary(rows: Sequence[dict[str, Any]], command: str) -> str:
    """The page."""
    if not rows:
        return "# Nothing was measured\n"
    last = rows[-1]
    versions = ("driver", "torch", "triton", "transformers", "less_fast", "commit", "date")
    parts = [
        f"# {last['device']}",
        f"`{command}`",
        ", ".join(f"{name} {last.get(name) or 'not known'}" for name in versions),
        *_ceilings(rows),
        *_tests(rows),
        *_measured(rows),
        *_list("Skipped", rows, "skipped", "reason"),
        *_list("Failed", rows, "failed", "error"),
        *_list("Stages", rows, "done", "took"),
    ]
    return "\n\n".join(parts) + "\n"


def _ceilings(rows: Sequence[dict[str, Any]]) -> list[str]:
    found = {row["implementation"]: row for row in rows if row["op"] == "ceilings"}
    if not {"copy", "matmul"} <= set(found):
        return []
    copied, multiplied = found["copy"]["bytes_per_s"] / 1e12, found["matmul"]["flops_per_s"] / 1e12
    return [f"Ceilings: a copy moves {copied:.3g} TB/s (read + written), a bf16 product does {multiplied:.3g} TFLOP/s."]


def _tests(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["op"] == "tests":
            names = ("passed", "failed", "errors", "skipped", "unreadable")
            counts = ", ".join(f"{row[name]} {name}" for name in names if name in row)
            facts = [counts, row["reason"], *row.get("summaries", [])]
            head = f"{row['implementation']}: {'; '.join(filter(None, facts))} ({row['ms_50'] / 1e3:.0f} s)"
            lines.append("\n".join([head, *(f"- `{problem[:200]}`" for problem in row.get("problems", []))]))
    return lines


def _measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row["op"] in ("run", "ceilings", "tests"):
            continue
        cells = [
            row["op"],
            row["implementation"],
            f"{row['shape']}, {row['dtype']}",
            _number(row["ms_50"]),
            _number(row["floor_ms"]),
            _number(row["ratio_to_floor"]),
            _number(row["ratio_to_baseline"]),
            _number(row["examples_per_s"]),
            f"{row['peak_bytes'] / 2**30:.2f}",
            f"{row['bar']}: {row['bar_value']:.3f}" if row["bar"] else "",
            _VERDICTS[row["met"]] if row["bar"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    head = "| what | by | shape | ms | floor ms | of floor | of baseline | examples/s | peak GiB | bar | met |"
    return ["\n".join([head, "|" + "---|" * 11, *lines])]


def _list(title: str, rows: Sequence[dict[str, Any]], status: str, field: str) -> list[str]:
    lines = [f"- {row['implementation']}: {row[field]}" for row in rows if row.get("status") == status]
    return [f"{title}:\n\n" + "\n".join(lines)] if lines else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
