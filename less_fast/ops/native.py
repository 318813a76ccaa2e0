"""The C++ module of CPU operations, or the reason why there is none."""

from __future__ import annotations

import importlib
from types import ModuleType


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("less_fast._cpu"), None
    except ImportError as error:
        return None, f"the C++ module less_fast._cpu is not available ({error}); reinstall with a C++ compiler"


CPU, MISSING = _load()
