"""Find the optimizer state of a checkpoint, whichever trainer wrote it, and read Adam's moments by parameter name."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from less_fast.errors import LessFastError
from less_fast.optim.align import align
from less_fast.optim.deepspeed import SHARDS, is_deepspeed, read_deepspeed
from less_fast.optim.distributed import METADATA, read_distributed
from less_fast.optim.inert import unreadable
from less_fast.optim.moments import Moments, SavedState, clean_name, constants, make_moments
from less_fast.optim.others import refuse_others

_FILES = ("optimizer.pt", "optimizer.bin")
_FORMATS = (
    "optimizer.pt (Trainer), optimizer.bin (FSDP), optimizer_0/.metadata (distributed checkpoint) or global_step* "
    "(DeepSpeed)"
)


def read_moments(path: Path, model: nn.Module) -> tuple[dict[str, Moments], dict[str, set[float]]]:
    """Moments of the model's parameters by name, and the values of beta1, beta2 and eps in the state's groups.

    Raises LessFastError for whatever is wrong with the checkpoint.
    """
    shapes = {clean_name(name): parameter.shape for name, parameter in model.named_parameters()}
    try:
        return _read_moments(path, model, shapes)
    except LessFastError:
        raise
    except Exception as error:  # what a damaged file holds may be of any type in any place
        raise unreadable(path, error) from error


def _read_moments(
    path: Path, model: nn.Module, shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Moments], dict[str, set[float]]]:
    saved = _read(path, shapes)
    refuse_others(saved)
    named = _by_name(saved, model)
    _check_adapter(saved, named)
    kept = {name: entry for name, entry in named.items() if name in shapes}
    if not kept:
        raise LessFastError(
            f"{saved.source}: none of the state's parameters ({next(iter(named), 'it has none')} is the first) is in "
            f"the model ({next(iter(shapes), 'it has none')}); load the model and adapter that it was saved with"
        )
    moments = {
        name: make_moments(saved.source, name, entry, shapes[name], copy=saved.mapped) for name, entry in kept.items()
    }
    return moments, constants(saved.groups)


def _read(path: Path, shapes: Mapping[str, torch.Size]) -> SavedState:
    place = _find(path)
    if place.is_file():
        return _read_file(place)
    return read_distributed(place, shapes) if (place / METADATA).is_file() else read_deepspeed(place, shapes)


def _find(path: Path) -> Path:
    """The file, or the folder of files, that holds the state: ``path`` itself or something in it."""
    if path.is_file():
        in_parts = path.name == METADATA or path.suffix == ".distcp" or path.match(SHARDS)
        return path.parent if in_parts else path
    if not path.is_dir():
        raise LessFastError(f"{path}: no such file or folder; expected a checkpoint with {_FORMATS}; check the path")
    if (path / METADATA).is_file() or is_deepspeed(path):
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    found += sorted(file.parent for file in path.glob(f"optim*/{METADATA}"))
    found += _deepspeed_folders(path)
    if len(found) > 1:
        raise LessFastError(
            f"{path}: holds several optimizer states ({', '.join(place.name for place in found)}); expected one; name "
            "the one to read"
        )
    if not found:
        raise LessFastError(f"{path}: {_why_none(path)}")
    return found[0]


def _deepspeed_folders(path: Path) -> list[Path]:
    """The one that DeepSpeed's file ``latest`` names; without that file, all."""
    latest = path / "latest"
    if latest.is_file() and is_deepspeed(path / latest.read_text().strip()):
        return [path / latest.read_text().strip()]
    return sorted(folder for folder in path.glob("global_step*") if is_deepspeed(folder))


def _why_none(path: Path) -> str:
    if per_process := sorted([*path.glob("optimizer_*_rank*.bin"), *path.glob("rank*-of-*-optimizer.pt")]):
        return (
            f"the optimizer is saved as one file per process ({per_process[0].name}), which is not read; expected a "
            "distributed checkpoint (use_dcp=True) or a full state"
        )
    if (path / "zero").is_dir():
        return (
            "is a universal checkpoint of DeepSpeed, which is not read; name the global_step* folder it was made from"
        )
    return (
        f"no {' or '.join(_FILES)} there, nor another optimizer state; expected {_FORMATS}; save checkpoints with "
        "their optimizer (save_only_model must be off)"
    )


def _read_file(file: Path) -> SavedState:
    try:
        # Mapped from disk where the format allows it, so that only what the model needs is ever in memory.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged file may raise anything
        raise unreadable(file, error) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("state"), Mapping):
        raise LessFastError(f"{file}: expected a dictionary with the key 'state', as torch optimizers save it")
    return SavedState(file, file.parent, content["state"], content.get("param_groups") or [], mapped=True)


def _by_name(saved: SavedState, model: nn.Module) -> dict[str, Any]:
    """Entries by clean parameter name, each with its group's step where it has none of its own."""
    state: Mapping[Any, Any] = saved.state
    if not state:
        raise LessFastError(
            f"{saved.source}: the optimizer state is empty or of none of the model's parameters; was it saved before "
            "the first step, or with another model?"
        )
    steps = {key: group["step"] for group in saved.groups if "step" in group for key in group.get("params", ())}
    if all(isinstance(key, int) for key in state):
        names = {key: name for key, name in align(saved, model).items() if key in state}
    elif all(isinstance(key, str) for key in state):
        names = {key: clean_name(key) for key in state}
        if len(set(names.values())) != len(state):
            raise LessFastError(
                f"{saved.source}: several entries mean the same parameter once wrappers' prefixes are dropped; "
                "expected one each; save the state of one model"
            )
    else:
        raise LessFastError(
            f"{saved.source}: expected all integer or all string keys in the optimizer state; found a mixture"
        )
    return {
        name: {"step": steps.get(key), **state[key]} if isinstance(state[key], Mapping) else state[key]
        for key, name in names.items()
    }


def _check_adapter(saved: SavedState, named: Mapping[str, Any]) -> None:
    """Where the adapter lies beside the optimizer, its weights must be the parameters that were trained.

    Integer-keyed states carry no names: with shapes alone, an adapter on q and k would pass for one on q and v.
    """
    adapter = saved.folder / "adapter_model.safetensors"
    if not adapter.exists():
        return
    from safetensors import safe_open

    try:
        with safe_open(adapter, framework="numpy") as tensors:
            weights = {name for name in tensors.keys() if ".lora_" in name}  # noqa: SIM118  (not a dictionary)
    except Exception as error:  # a damaged file may raise anything
        raise LessFastError(f"{adapter}: not a readable safetensors file; copy or save the adapter again") from error
    trained = {re.sub(r"(\.lora_[AB])\.[^.]+(\.weight)$", r"\1\2", name) for name in named if ".lora_" in name}
    if trained and (different := sorted(weights ^ trained)):
        name = different[0]
        where = "the saved adapter" if name in weights else "the model"
        raise LessFastError(
            f"{saved.source}: the optimizer's checkpoint and the model have different adapters: {name} is only in "
            f"{where}; load the adapter of this checkpoint"
        )
