"""What every reader of optimizer files hands over, and Adam's moments made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.optim import bitsandbytes
from less_fast.optim.inert import shown

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Moments(NamedTuple):
    """First and second moment, in the parameter's shape, and the number of steps taken (None: the file has none)."""

    m: Tensor
    v: Tensor
    step: int | None


@dataclass(frozen=True)
class SavedState:
    """An optimizer's state as it was saved.

    ``source``: the file or folder read, for errors. ``folder``: the checkpoint it belongs to. ``state``: what the
    optimizer kept of each parameter, by name or, as torch optimizers number them, by integer. ``groups``: the
    parameter groups, with the keys of ``state`` under ``params``. ``mapped``: whether its tensors are mapped from the
    file, which may be overwritten, and the process then be killed when it reads them.
    """

    source: Path
    folder: Path
    state: Mapping[int, Mapping[str, Any]] | Mapping[str, Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    mapped: bool = False


def clean_name(name: str) -> str:
    """A parameter's name without the path components that wrappers (DDP, FSDP, torch.compile) put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def saved_shape(entry: Any) -> torch.Size | None:
    """The shape of the parameter that an entry belongs to, or None where the entry does not tell."""
    entry = bitsandbytes.unwrap(entry) if isinstance(entry, Mapping) else {}
    moment = entry.get("exp_avg", entry.get("state1"))
    return moment.shape if isinstance(moment, Tensor) else None


def check_shape(source: Path, name: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raise LessFastError where saved moments have not the shape of the model's parameter."""
    if tuple(found) != tuple(expected):
        raise LessFastError(
            f"{source}: the moments of {name} have shape {shown(tuple(found))}, the parameter {tuple(expected)}; "
            "expected the same; load the model and adapter that it was saved with"
        )


def make_moments(source: Path, name: str, entry: Any, shape: torch.Size, copy: bool) -> Moments:
    """Adam's moments in float32 from an entry of torch, Apex, DeepSpeed or bitsandbytes; a copy where asked for.

    Raises LessFastError where the entry has none, has them in another ``shape``, or in no usable form.
    """
    entry = bitsandbytes.unwrap(entry) if isinstance(entry, Mapping) else {}
    in_bitsandbytes = "state1" in entry and "state2" in entry
    m, v = (entry.get(key) for key in (("state1", "state2") if in_bitsandbytes else ("exp_avg", "exp_avg_sq")))
    if not (isinstance(m, Tensor) and isinstance(v, Tensor)):
        raise LessFastError(
            f"{source}: the state of {name} has {shown(list(entry)) if entry else 'nothing'}; expected Adam's exp_avg "
            "and exp_avg_sq (bitsandbytes: state1 and state2); use a state of Adam or AdamW"
        )
    # Before anything is computed: a tensor of a few bytes may be a view of billions of entries.
    for moment in (m, v):
        check_shape(source, name, moment.shape, shape)
    if in_bitsandbytes:
        m, v = bitsandbytes.moments(source, name, entry)
    if not (m.is_floating_point() and v.is_floating_point()):
        raise LessFastError(
            f"{source}: the moments of {name} are {m.dtype} and {v.dtype}; expected two floating-point tensors; the "
            "file is damaged or not of an Adam"
        )
    if not (torch.isfinite(m).all() and torch.isfinite(v).all()) or bool((v < 0).any()):
        raise LessFastError(
            f"{source}: the moments of {name} are not finite or the second is negative; expected finite moments; "
            "use a checkpoint from before the run diverged"
        )
    step = entry.get("step")
    m, v = (moment.detach().to(torch.float32, copy=copy) for moment in (m, v))
    return Moments(m, v, None if step is None else int(step))


def constants(groups: Sequence[Mapping[str, Any]]) -> dict[str, set[float]]:
    """beta1, beta2 and eps as the groups hold them; several values where groups differ, none where none is saved."""
    found: dict[str, set[float]] = {"beta1": set(), "beta2": set(), "eps": set()}
    for group in groups:
        if isinstance(group.get("betas"), (tuple, list)):
            for name, beta in zip(("beta1", "beta2"), group["betas"]):
                found[name].add(float(beta))
        if isinstance(group.get("eps"), (int, float)):
            found["eps"].add(float(group["eps"]))
    return found
