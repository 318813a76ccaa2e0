"""LESS's commands and Python functions under their own names: ``less.data_selection`` becomes this package.

``get_training_dataset`` is a module here, as it is in LESS; the function is in it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from less_fast.compat.less.collect_grad_reps import (
        collect_grads,
        collect_reps,
        get_loss,
        merge_and_normalize_info,
        merge_info,
        prepare_optimizer_state,
    )
    from less_fast.compat.less.get_validation_dataset import get_dataloader, get_dataset

# Loaded when first used: `python -m less_fast.compat.less.get_info --help` needs neither torch nor transformers.
_MODULES = {
    "collect_grads": "collect_grad_reps",
    "collect_reps": "collect_grad_reps",
    "get_dataloader": "get_validation_dataset",
    "get_dataset": "get_validation_dataset",
    "get_loss": "collect_grad_reps",
    "merge_and_normalize_info": "collect_grad_reps",
    "merge_info": "collect_grad_reps",
    "prepare_optimizer_state": "collect_grad_reps",
}

__all__ = [
    "collect_grads",
    "collect_reps",
    "get_dataloader",
    "get_dataset",
    "get_loss",
    "merge_and_normalize_info",
    "merge_info",
    "prepare_optimizer_state",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
