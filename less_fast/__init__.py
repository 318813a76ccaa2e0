"""less_fast: LESS data selection at nearly the price of the model's own forward and backward pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from less_fast.errors import LessFastError
    from less_fast.extract_job import ExtractJob
    from less_fast.extraction import extract, extract_many
    from less_fast.features import FeatureExtractor, Output
    from less_fast.model import load_model
    from less_fast.on_ray import extract_on_ray
    from less_fast.ops.project import project
    from less_fast.optim import AdamState
    from less_fast.projection import Projection
    from less_fast.scoring import influence, select
    from less_fast.store import FeatureStore

# Loaded when first used: importing torch and transformers takes seconds, and `less-fast --help` needs neither.
_ROOMS = {
    "AdamState": "optim",
    "ExtractJob": "extract_job",
    "FeatureExtractor": "features",
    "FeatureStore": "store",
    "LessFastError": "errors",
    "Output": "features",
    "Projection": "projection",
    "extract": "extraction",
    "extract_many": "extraction",
    "extract_on_ray": "on_ray",
    "influence": "scoring",
    "load_model": "model",
    "project": "ops.project",
    "select": "scoring",
}

__all__ = [
    "AdamState",
    "ExtractJob",
    "FeatureExtractor",
    "FeatureStore",
    "LessFastError",
    "Output",
    "Projection",
    "extract",
    "extract_many",
    "extract_on_ray",
    "influence",
    "load_model",
    "project",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"less_fast.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
