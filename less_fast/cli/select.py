"""``less-fast select``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from less_fast.cli.output import n_bytes_of, only_results_on_stdout, require_other_file, show
from less_fast.errors import LessFastError
from less_fast.paths import to_path

if TYPE_CHECKING:
    from less_fast.score_table import ScoreTable
    from less_fast.scoring import Duplicates, Ranking
    from less_fast.scoring.selection import Filter

STRATEGIES = ("best", "round-robin", "quotas", "balanced")


def select(
    scores: Annotated[
        list[str],
        typer.Option(
            help="File that 'less-fast score' or 'less-fast run' wrote, or NAME=FILE. Repeatable: one a task."
        ),
    ],
    data: Annotated[list[str], typer.Option(help="File of the pool, in the order they were scored in. Repeatable.")],
    out: Annotated[str, typer.Option(help="Where the selected examples go: a .jsonl or .parquet file.")],
    fraction: Annotated[float | None, typer.Option(help="Share of the pool to select.", show_default=False)] = None,
    n: Annotated[
        int | None, typer.Option("-n", "--n", help="Number of examples to select.", show_default=False)
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How tasks share the selection.", metavar="|".join(STRATEGIES), show_default="best, for one task"
        ),
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="With quotas: TASK=500 (examples) or TASK=0.25 (of the selection). Repeatable."),
    ] = None,
    cap: Annotated[
        list[str] | None,
        typer.Option(
            help="Most that a dataset (or group) may have: DATASET=500 (examples) or DATASET=0.2 (of the selection); "
            "0.2 alone is for all others. Repeatable."
        ),
    ] = None,
    dedupe: Annotated[
        list[str] | None,
        typer.Option(help="Store of the pool: skip what is too similar there. Repeatable: the mean of checkpoints."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Highest cosine of two selected examples, with --dedupe.")] = 0.95,
    memory: Annotated[str, typer.Option(help="Memory that --dedupe may take, such as 512M or 2G.")] = "1G",
    groups: Annotated[
        str | None,
        typer.Option(help="JSON file, dataset name -> group, to report and cap by.", show_default=False),
    ] = None,
    report: Annotated[
        str | None, typer.Option(help="JSON file for the shares and mean scores.", show_default=False)
    ] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar, with --dedupe.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write the best-scored examples of the pool, best first; lines of JSON Lines files stay byte for byte."""
    files = _files_by_task(scores)
    chosen = _strategy(strategy, files, bool(quota))
    sizes, of_all = _amounts(quota or [], "--quota")
    caps, default_cap = _amounts(cap or [], "--cap")
    if of_all is not None:
        raise LessFastError(f"--quota is {of_all}, of no task; expected TASK=500 or TASK=0.25")
    unsized = fraction is None and n is None
    if (unsized and chosen != "quotas") or (fraction is not None and n is not None):
        raise LessFastError("give either --fraction or -n, and not both")
    n_bytes = n_bytes_of(memory)
    place, report_place = to_path(out), None if report is None else to_path(report)
    if place.suffix not in (".jsonl", ".json", ".parquet") and not place.is_dir():
        raise LessFastError(f"{out}: expected a name that ends in .jsonl or .parquet")
    if report_place == place:
        raise LessFastError(f"{out}: is the name of both --out and --report; expected two files")
    for option, file in (("--out", place), ("--report", report_place)):
        require_other_file(file, option, [*files.values(), *(dedupe or [])])
    with only_results_on_stdout():
        from dataclasses import asdict

        from less_fast.data import load_examples
        from less_fast.report import mixture_table, read_groups
        from less_fast.run_folder import write_json
        from less_fast.score_table import read_scores
        from less_fast.scoring import Caps, composition, pick
        from less_fast.scoring.selection import n_selected

        tables = {task: read_scores(file, with_subtasks=chosen == "balanced") for task, file in files.items()}
        examples = load_examples(data)
        for table in tables.values():
            table.check_rows(examples)
        group_of = read_groups(groups) if groups else {}
        sources = [group_of.get(name, name) for name in examples.datasets]
        count = None if unsized else n_selected(len(examples), fraction, n)
        ranking = _ranking(chosen, tables, sizes, count)
        filters: dict[str, Filter] = {}
        if cap:
            filters["caps"] = Caps(sources, caps, default_cap)
        if dedupe:
            filters["duplicates"] = _duplicates(dedupe, next(iter(tables.values())), threshold, n_bytes)
        wanted = count or ranking.size or 0
        selection = pick(ranking, wanted, list(filters.values()), progress=progress and bool(dedupe))
        place.parent.mkdir(parents=True, exist_ok=True)
        (examples.write_parquet if place.suffix == ".parquet" else examples.write_lines)(selection.rows, place)
        shares = composition(sources, selection.rows, {task: table.scores for task, table in tables.items()})
        name = "groups" if groups else "datasets"
        result: dict[str, Any] = {"out": out, "selected": len(selection.rows)}
        if len(ranking.names) > 1:
            taken = [int((selection.columns == column).sum()) for column in range(len(ranking.names))]
            result["taken_by"] = dict(zip(ranking.names, taken))
        if filters:
            result["rejected"] = dict(zip(filters, selection.n_rejected))
        result[name] = [asdict(share) for share in shares]
        if report_place is not None:
            report_place.parent.mkdir(parents=True, exist_ok=True)
            write_json(report_place, result)
    lines = [mixture_table(shares, name.removesuffix("s")), "", *_notes(result)]
    show(result, "\n".join([*lines, f"{out}: {len(selection.rows):,} examples"]), as_json)


def _files_by_task(values: Sequence[str]) -> dict[str, str]:
    """``NAME=FILE`` values, or files whose stems are the names."""
    files: dict[str, str] = {}
    for value in values:
        name, mark, file = value.partition("=")
        if not mark or "/" in name:
            name, file = Path(value).stem, value
        if name in files:
            raise LessFastError(
                f"two tasks are named {name!r} ({files[name]} and {file}); name them by --scores NAME=FILE"
            )
        files[name] = file
    return files


def _strategy(given: str | None, files: Mapping[str, str], with_quotas: bool) -> str:
    if given is not None and given not in STRATEGIES:
        raise LessFastError(f"--strategy is {given!r}; expected one of {', '.join(STRATEGIES)}")
    if given in (None, "best") and len(files) > 1:
        raise LessFastError(
            f"--scores was given for {len(files)} tasks ({', '.join(files)}); "
            "choose --strategy round-robin, quotas or balanced"
        )
    if with_quotas != (given == "quotas"):
        raise LessFastError("--quota and --strategy quotas go together, and only one was given")
    return given or "best"


def _amounts(values: Sequence[str], option: str) -> tuple[dict[str, int | float], int | float | None]:
    """``NAME=500`` and ``NAME=0.2`` values, and the amount that was given alone."""
    amounts: dict[str | None, int | float] = {}
    for value in values:
        name, mark, text = value.rpartition("=")
        key = name if mark else None
        if key in amounts:
            raise LessFastError(f"{option} was given twice for {name or 'all'}; expected it once")
        try:
            amount: int | float = int(text) if text.isdecimal() else float(text)
        except ValueError:
            amount = -1
        if not (amount > 0 and (isinstance(amount, int) or amount <= 1)):
            raise LessFastError(
                f"{option} is {value!r}; expected NAME=500 (examples) or NAME=0.2 (a share of the selection, up to 1.0)"
            )
        amounts[key] = amount
    default = amounts.pop(None, None)
    return {str(name): amount for name, amount in amounts.items()}, default


def _ranking(
    strategy: str, tables: Mapping[str, ScoreTable], sizes: Mapping[str, int | float], n: int | None
) -> Ranking:
    from less_fast.scoring import balanced, best, quotas, round_robin

    scores = {task: table.scores for task, table in tables.items()}
    if strategy == "best":
        return best(next(iter(scores.values())))
    if strategy == "round-robin":
        return round_robin(scores)
    if strategy == "quotas":
        return quotas(scores, sizes, n=n)
    if bare := [table.path for table in tables.values() if not table.subtasks]:
        raise LessFastError(f"{bare[0]}: has no columns 'score:<subtask>', which the balanced strategy compares")
    columns = {f"{task}:{name}": values for task, table in tables.items() for name, values in table.subtasks.items()}
    return balanced(columns)


def _duplicates(paths: Sequence[str], table: ScoreTable, threshold: float, memory: int) -> Duplicates:
    from less_fast.scoring import Duplicates
    from less_fast.store import FeatureStore

    stores = [FeatureStore(path, verify=True) for path in paths]
    for store in stores:
        table.check_ids(store.rows.ids, str(store.path), "give stores of the pool that was scored")
    return Duplicates(stores, threshold, memory)


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    if taken := result.get("taken_by"):
        yield "taken by " + ", ".join(f"{name}: {count:,}" for name, count in taken.items())
    if rejected := result.get("rejected"):
        yield "passed over " + ", ".join(f"{count:,} ({name})" for name, count in rejected.items())
