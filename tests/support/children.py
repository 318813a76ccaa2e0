"""The environment of the processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def child_environment(**values: str) -> dict[str, str]:
    """This process's, with tests/ ahead of what PYTHONPATH names, where less_fast itself may be found."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **values}
