"""``less-fast score`` and ``less-fast select``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from less_fast.cli.output import numbers, only_results_on_stdout, show
from less_fast.config import RunConfig
from less_fast.errors import LessFastError

_Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("score")(_score)
    app.command("select")(_select)


def _score(
    train: Annotated[list[Path], typer.Option(help="Store of the pool, one per checkpoint. Repeatable.")],
    target: Annotated[list[Path], typer.Option(help="Store of the target, one per checkpoint. Repeatable.")],
    out: Annotated[Path, typer.Option(help="Where the scores go: a .parquet or .csv file.")],
    weights: Annotated[
        str | None, typer.Option(help="Weights of the checkpoints, such as 0.6,0.4.", show_default="all the same")
    ] = None,
    weights_from: Annotated[
        Path | None, typer.Option(help="Training run whose learning rates weigh its checkpoints, as in LESS.")
    ] = None,
    aggregate: Annotated[
        str, typer.Option(help="How the scores of subtasks become one.", metavar="max|mean")
    ] = RunConfig.aggregate,
    verify: Annotated[bool, typer.Option(help="Compare every file of the stores with its checksum first.")] = True,
    as_json: _Json = False,
) -> None:
    """Score every example of the pool by how its gradient points along the target's."""
    if weights and weights_from:
        raise LessFastError("--weights and --weights-from were both given; expected one of them")
    if out.suffix not in (".parquet", ".csv"):
        raise LessFastError(f"{out}: expected a name that ends in .parquet or .csv")
    with only_results_on_stdout():
        from less_fast.checkpoints import discover_checkpoints
        from less_fast.report import checkpoint_table
        from less_fast.scoring import influence, write_scores
        from less_fast.store import FeatureStore

        given = numbers(weights, "--weights")
        if weights_from:
            found = discover_checkpoints(weights_from)
            given = [checkpoint.learning_rate for checkpoint in found]
            print(checkpoint_table(found, [rate / sum(given) for rate in given]))
        stores, targets = [FeatureStore(path) for path in train], [FeatureStore(path) for path in target]
        for store in [*stores, *targets] if verify else []:
            store.require_intact()
        scores = influence(stores, targets, given)
        write_scores(out, stores[0].rows, scores, how=aggregate)
    valid = int(scores.valid.sum())
    show(
        {"out": str(out), "rows": len(scores), "valid": valid, "subtasks": scores.subtasks},
        f"{out}: scores of {valid:,} of {len(scores):,} examples for {len(scores.subtasks)} subtask(s)",
        as_json,
    )


def _select(
    scores: Annotated[Path, typer.Option(help="File that 'less-fast score' or 'less-fast run' wrote.")],
    data: Annotated[list[str], typer.Option(help="File of the pool, in the order they were scored in. Repeatable.")],
    out: Annotated[Path, typer.Option(help="Where the selected lines go: a .jsonl file.")],
    fraction: Annotated[float | None, typer.Option(help="Share of the pool to select.", show_default=False)] = None,
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="Number of examples to select.", show_default=False)
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="JSON file, dataset name -> group, to report by.", show_default=False)
    ] = None,
    as_json: _Json = False,
) -> None:
    """Write the best-scored examples of the pool, best first; lines of JSON Lines files stay byte for byte."""
    if (fraction is None) == (n is None):
        raise LessFastError("give either --fraction or -n, and not both")
    with only_results_on_stdout():
        from dataclasses import asdict

        from less_fast.data import load_examples
        from less_fast.report import composition_table, read_groups
        from less_fast.score_table import read_scores
        from less_fast.scoring import composition, select

        table = read_scores(scores)
        examples = load_examples(data)
        table.check_rows(examples)
        group_of = read_groups(groups) if groups else {}
        rows = select(table.scores, fraction=fraction, n=n)
        out.parent.mkdir(parents=True, exist_ok=True)
        examples.write_lines(rows, out)
        shares = composition([group_of.get(name, name) for name in examples.datasets], rows.tolist())
    name = "groups" if groups else "datasets"
    show(
        {"out": str(out), "selected": len(rows), name: [asdict(share) for share in shares]},
        "\n".join(
            [composition_table({"selected": shares}, name.removesuffix("s")), "", f"{out}: {len(rows):,} examples"]
        ),
        as_json,
    )
