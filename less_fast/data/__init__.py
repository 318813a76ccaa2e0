"""Examples, templates with their label masks, and batches: everything from a user's file to padded token tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from less_fast.data.examples import Examples, load_examples
from less_fast.data.templates import IGNORED, TEMPLATES, Encoded, encode, encode_all

if TYPE_CHECKING:
    from less_fast.data.batches import CPU_BATCH_COST, collate, plan_batches

# Loaded when first used: they need torch, which reading and selecting examples do without.
_OF_BATCHES = ("CPU_BATCH_COST", "collate", "plan_batches")

__all__ = [
    "CPU_BATCH_COST",
    "IGNORED",
    "TEMPLATES",
    "Encoded",
    "Examples",
    "collate",
    "encode",
    "encode_all",
    "load_examples",
    "plan_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _OF_BATCHES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from less_fast.data import batches

    return getattr(batches, name)
