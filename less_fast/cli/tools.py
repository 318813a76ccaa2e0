"""``less-fast doctor`` and ``less-fast demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from less_fast.cli.output import only_results_on_stdout, require_local, show

_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("doctor")(_doctor)
    app.command("demo")(_demo)


def _doctor(as_json: _Json = False) -> None:
    """Tell what this machine has, and check every backend that works here against the reference, in seconds.

    The exit status is 1 if a check fails.
    """
    with only_results_on_stdout():
        from less_fast.doctor import examine

        diagnosis = examine()
    show(diagnosis.to_dict(), str(diagnosis), as_json)
    if not diagnosis.ok:
        raise typer.Exit(1)


def _demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("less-fast-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the corpus and the model.")] = 0,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
    as_json: _Json = False,
) -> None:
    """Select with LESS from an invented corpus: train a small model, then find the examples of three skills.

    Takes about two minutes on two CPU cores and needs no download. OUT/summary.json holds the result.
    """
    require_local(out, "--out")
    with only_results_on_stdout():
        from less_fast.demo import DemoSettings, run_demo, summary_table

        summary = run_demo(out, DemoSettings(seed=seed), progress=progress)
    show(json.loads(json.dumps(summary)), summary_table(summary), as_json)
