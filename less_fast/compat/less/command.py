"""How the modules of this package end as commands: what a user can cause is one line on standard error."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from less_fast.errors import LessFastError


def run_command(main: Callable[[], None]) -> None:
    """Call ``main``; a LessFastError is printed and ends the process with status 2, Ctrl-C with 130."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        main()
    except LessFastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept", file=sys.stderr)
        sys.exit(130)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
