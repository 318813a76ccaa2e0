"""``less-fast score``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from less_fast.cli.output import n_bytes_of, numbers, only_results_on_stdout, require_local, require_other_file, show
from less_fast.config import RunConfig
from less_fast.errors import LessFastError
from less_fast.paths import AnyPath, to_path

_SUFFIXES = (".parquet", ".csv")


def score(
    train: Annotated[list[str], typer.Option(help="Store of the pool, one per checkpoint. Repeatable.")],
    target: Annotated[
        list[str],
        typer.Option(
            help="Store of the target, one per checkpoint. Repeatable. NAME=STORE for several targets in one pass.",
            metavar="[NAME=]STORE",
        ),
    ],
    out: Annotated[
        str, typer.Option(help="Where the scores go: a .parquet or .csv file; with named targets, a folder of them.")
    ],
    weights: Annotated[
        str | None, typer.Option(help="Weights of the checkpoints, such as 0.6,0.4.", show_default="all the same")
    ] = None,
    weights_from: Annotated[
        Path | None, typer.Option(help="Training run whose learning rates weigh its checkpoints, as in LESS.")
    ] = None,
    aggregate: Annotated[
        str, typer.Option(help="How the scores of subtasks become one.", metavar="max|mean")
    ] = RunConfig.aggregate,
    matrix: Annotated[
        str | None, typer.Option(help="Where the scores of all subtasks go as well, a .npy file.", show_default=False)
    ] = None,
    queries: Annotated[
        str,
        typer.Option(help="Type of the targets' features; 1bit counts bits, for a 1bit pool.", metavar="float32|1bit"),
    ] = "float32",
    memory: Annotated[str, typer.Option(help="Memory that the pass may take, such as 512M or 2G.")] = "256M",
    device: Annotated[str, typer.Option(help="Where the products are computed: cpu, cuda or cuda:N.")] = "cpu",
    verify: Annotated[bool, typer.Option(help="Compare every file of the stores with its checksum.")] = True,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Go on without missing or damaged shards; their rows get no score.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a bar.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score every example of the pool by how its gradient points along the target's."""
    if weights and weights_from:
        raise LessFastError("--weights and --weights-from were both given; expected one of them")
    if weights_from:
        require_local(weights_from, "--weights-from")
    targets = _targets(target)
    files = _files(to_path(out), targets)
    read: list[str] = [*train, *(path for paths in targets.values() for path in paths)]
    for option, file in (("--out", out), ("--matrix", matrix)):
        require_other_file(None if file is None else to_path(file), option, read)
    n_bytes = n_bytes_of(memory)
    with only_results_on_stdout():
        from less_fast.checkpoints import discover_checkpoints
        from less_fast.report import checkpoint_table
        from less_fast.scoring import ScoreStream, stream_scores
        from less_fast.store import FeatureStore

        given = numbers(weights, "--weights")
        if weights_from:
            found = discover_checkpoints(weights_from)
            given = [checkpoint.learning_rate for checkpoint in found]
            print(checkpoint_table(found, [rate / sum(given) for rate in given]))
        stores = [FeatureStore(path, verify=verify, allow_partial=allow_partial) for path in train]
        opened = {name: [FeatureStore(path, verify=verify) for path in paths] for name, paths in targets.items()}
        stream = ScoreStream(stores, opened, given, queries=queries, memory=n_bytes, device=device)
        valid = stream_scores(
            stream, {name: [file] for name, file in files.items()}, how=aggregate, matrix=matrix, progress=progress
        )
    damaged = [line for store in stores for line in store.damaged]
    result = {"out": str(out), "rows": stream.n_rows, "valid": valid, "subtasks": stream.subtasks, "damaged": damaged}
    if not _is_named(targets):
        result["subtasks"] = stream.subtasks[""]
    text = f"{out}: scores of {valid:,} of {stream.n_rows:,} examples for {stream.n_columns} subtask(s)"
    show(result, text + (f" of {len(targets)} targets" if _is_named(targets) else ""), as_json)


def _is_named(targets: dict[str, list[str]]) -> bool:
    return [*targets] != [""]


def _targets(values: list[str]) -> dict[str, list[str]]:
    """Stores by target, in the order of the checkpoints; the name of plain ones is empty."""
    targets: dict[str, list[str]] = {}
    for value in values:
        name, mark, path = value.partition("=")
        if not mark or "://" in name or Path(value).exists():
            name, path = "", value
        elif not path:
            raise LessFastError(f"--target {value} names no store; expected NAME=STORE")
        elif not re.fullmatch(r"\w[\w.-]*", name):
            raise LessFastError(f"--target {value}: {name!r} cannot name a file; use letters, digits, '.', '_' and '-'")
        targets.setdefault(name, []).append(path)
    if "" in targets and len(targets) > 1:
        raise LessFastError(f"--target {targets[''][0]} has no name, but others have; expected NAME=STORE for each")
    return targets


def _files(out: AnyPath, targets: dict[str, list[str]]) -> dict[str, AnyPath]:
    if _is_named(targets):
        if out.suffix in _SUFFIXES:
            raise LessFastError(f"{out} is one file, but there are named targets; expected --out FOLDER")
        return {name: out / f"{name}.parquet" for name in targets}
    if out.suffix not in _SUFFIXES:
        raise LessFastError(f"{out}: expected a name that ends in .parquet or .csv")
    return {"": out}
