"""The command ``less-fast``: it parses, calls and prints; everything else is in the library."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from less_fast.cli import features, run, tools
from less_fast.cli.output import disk_is_full, print_warnings
from less_fast.cli.score import score
from less_fast.cli.select import select
from less_fast.errors import LessFastError

# Typer has carried a copy of click since 0.20, so the class is found by what is public in every version.
_UsageError: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """Turns what a user can cause into one line on standard error and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LessFastError as error:
            raise _exit(2, f"error: {error}") from error
        except KeyboardInterrupt:
            raise _exit(130, "interrupted: everything that was finished is kept; repeat the command to go on") from None
        except Exception as error:
            if disk_is_full(error):
                raise _exit(
                    2, "error: the disk is full; what was finished is kept, make room and repeat the command to resume"
                ) from error
            if isinstance(error, OSError) and error.filename:
                raise _exit(2, f"error: {error.filename}: {error.strerror}") from error
            raise

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            sys.exit(super().main(*args, **{**options, "standalone_mode": False}) or 0)
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx else "less-fast"
            print(f"error: {error.format_message()} ('{command} --help' shows what there is)", file=sys.stderr)
            sys.exit(2)


def _exit(status: int, line: str) -> typer.Exit:
    print(line, file=sys.stderr)
    return typer.Exit(status)


app = typer.Typer(
    name="less-fast",
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LESS data selection (Xia et al. 2024), exact and fast: from examples to gradient features, scores and a "
    "selection.",
)
for _module in (run, features, tools):
    _module.register(app)
app.command("score")(score)
app.command("select")(select)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"less_fast {version('less_fast')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _start(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main() -> None:
    """The entry point of the command."""
    # Before transformers is imported: its bars and hints are about loading weights, not about the work.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr, force=True)
    for library in ("huggingface_hub", "datasets", "httpx"):  # they tell of every retry when there is no network
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.addLevelName(logging.WARNING, "warning")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module=r"less_fast\b")
    print_warnings()
    app(prog_name="less-fast")
