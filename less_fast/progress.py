"""The progress bar that all long work shows: a rate, the time left, and few lines where the output is no terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, *, unit: str, desc: str, show: bool, initial: int = 0) -> tqdm[Any]:
    """A bar on standard error; ``initial`` units are done already and don't count in the rate."""
    interval = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, initial=initial, unit=unit, desc=desc, disable=not show, mininterval=interval)
