"""How the modules of this package end as commands: what a user can cause is one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from less_fast.cli.output import print_warnings
from less_fast.errors import LessFastError


def run_command(main: Callable[[], None]) -> None:
    """Call ``main``; a LessFastError is printed and ends the process with status 2, Ctrl-C with 130."""
    print_warnings()
    try:
        main()
    except LessFastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept", file=sys.stderr)
        sys.exit(130)
