"""Read Adam's moments from the optimizer files that trainers write, aligned with a model by name and shape."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError

FILES = ("optimizer.pt", "optimizer.bin")
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")


class Moments(NamedTuple):
    """First and second moment, in the parameter's shape, and the number of steps taken (None: the file has none)."""

    m: Tensor
    v: Tensor
    step: int | None


def read_moments(path: Path, model: nn.Module) -> tuple[dict[str, Moments], dict[str, float]]:
    """Moments by parameter name, and the beta1, beta2 and eps that the file holds (empty where it holds none)."""
    file = _find(path)
    content = _load(file)
    state, groups = content["state"], content.get("param_groups") or []
    steps = {key: group["step"] for group in groups if "step" in group for key in group["params"]}
    if not state:
        raise LessFastError(f"{file}: the optimizer state is empty; was the checkpoint saved before the first step?")
    if all(isinstance(key, str) for key in state):
        named = {clean_name(key): {"step": steps.get(key), **entry} for key, entry in state.items()}
        if len(named) != len(state):
            raise LessFastError(f"{file}: several entries mean the same parameter once wrappers' prefixes are dropped")
    elif all(isinstance(key, int) for key in state):
        names = _align(file, state, groups, model)
        named = {name: {"step": steps.get(key), **state[key]} for key, name in names.items() if key in state}
    else:
        raise LessFastError(f"{file}: expected all integer or all string keys in the optimizer state; found a mixture")
    _check_adapter(file, named)
    moments = {name: _moments(file, name, entry) for name, entry in named.items()}
    saved: dict[str, float] = {}
    if groups and "betas" in groups[0]:
        saved = {"beta1": float(groups[0]["betas"][0]), "beta2": float(groups[0]["betas"][1])}
        saved["eps"] = float(groups[0].get("eps", 1e-8))
    return moments, saved


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise LessFastError(f"{path}: no such file or folder; expected a checkpoint with {' or '.join(FILES)}")
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise LessFastError(
        f"{path}: no {' or '.join(FILES)} there; save checkpoints with their optimizer (save_only_model must be off)"
    )


def _load(file: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LessFastError(f"{file}: not a readable optimizer file ({reason})") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("state"), Mapping):
        raise LessFastError(f"{file}: expected a dictionary with the key 'state', as torch optimizers save it")
    return content


def clean_name(name: str) -> str:
    """A parameter's name without the path components that wrappers (DDP, FSDP, torch.compile) put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _check_adapter(file: Path, named: Mapping[str, Any]) -> None:
    """Where the adapter lies beside the optimizer, its weights must be the parameters that were trained.

    Integer-keyed states carry no names: with shapes alone, an adapter on q and k would pass for one on q and v.
    """
    adapter = file.parent / "adapter_model.safetensors"
    if not adapter.exists():
        return
    from safetensors import safe_open

    with safe_open(adapter, framework="numpy") as tensors:
        saved = {name for name in tensors.keys() if ".lora_" in name}  # noqa: SIM118  (not a dictionary)
    trained = {re.sub(r"(\.lora_[AB])\.[^.]+(\.weight)$", r"\1\2", name) for name in named if ".lora_" in name}
    if trained and (different := sorted(saved ^ trained)):
        name = different[0]
        where = "the saved adapter" if name in saved else "the model"
        raise LessFastError(
            f"{file}: the optimizer's checkpoint and the model have different adapters: {name} is only in {where}"
        )


def _moments(file: Path, name: str, entry: Mapping[str, Any]) -> Moments:
    if not isinstance(entry, Mapping) or "exp_avg" not in entry or "exp_avg_sq" not in entry:
        keys = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise LessFastError(f"{file}: the state of {name} has {keys}; expected Adam's exp_avg and exp_avg_sq")
    m, v = entry["exp_avg"], entry["exp_avg_sq"]
    if not (m.is_floating_point() and v.is_floating_point()) or m.shape != v.shape:
        raise LessFastError(
            f"{file}: the moments of {name} are {m.dtype} {tuple(m.shape)} and {v.dtype} {tuple(v.shape)}; "
            "expected two floating-point tensors of one shape"
        )
    if not (torch.isfinite(m).all() and torch.isfinite(v).all()) or bool((v < 0).any()):
        raise LessFastError(f"{file}: the moments of {name} are not finite or the second is negative")
    step = entry.get("step")
    return Moments(m.float(), v.float(), None if step is None else int(step))


def _align(
    file: Path, state: Mapping[int, Any], groups: Sequence[Mapping[str, Any]], model: nn.Module
) -> dict[int, str]:
    """Integer keys -> names. Optimizers number their parameters group by group, in the order they were given."""
    sizes = [len(group["params"]) for group in groups] or [len(state)]
    keys = [key for group in groups for key in group["params"]] or sorted(state)
    if all("param_names" in group for group in groups) and groups:
        return dict(zip(keys, (clean_name(name) for group in groups for name in group["param_names"])))
    best: str | None = None
    for candidates in _candidates(model):
        names = _grouped(candidates, sizes)
        if names is None:
            best = best or (
                f"its groups have {', '.join(map(str, sizes))} parameters, the model trains {len(candidates)} "
                f"(the first is {next(iter(candidates))}) in one group, or two by weight decay"
            )
            continue
        wrong = _first_mismatch(keys, names, state, candidates)
        if wrong is None:
            return dict(zip(keys, names))
        best = wrong
    raise LessFastError(f"{file}: the optimizer state does not fit the model: {best}")


def _candidates(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """What may have been trained, most likely first: the adapter, what requires a gradient now, everything."""
    every = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    adapter = {name: p for name, p in every.items() if "lora_" in name or "modules_to_save" in name}
    trainable = {name: p for name, p in every.items() if p.requires_grad}
    return [candidate for candidate in (adapter, trainable, every) if candidate]


def _grouped(parameters: Mapping[str, Tensor], sizes: Sequence[int]) -> list[str] | None:
    """Names in the optimizer's order: weight-decayed parameters first where there are two groups."""
    names = list(parameters)
    if sum(sizes) != len(names):
        return None
    filled = [size for size in sizes if size]
    if len(filled) == 1:
        return names
    plain = [name for name in names if parameters[name].ndim < 2 or name.endswith("bias") or "norm" in name.lower()]
    decayed = [name for name in names if name not in set(plain)]
    return decayed + plain if filled == [len(decayed), len(plain)] else None


def _first_mismatch(
    keys: Sequence[int], names: Sequence[str], state: Mapping[int, Any], parameters: Mapping[str, Tensor]
) -> str | None:
    for key, name in zip(keys, names):
        entry = state.get(key)
        moment = entry.get("exp_avg") if isinstance(entry, Mapping) else None
        if isinstance(moment, Tensor) and moment.shape != parameters[name].shape:
            return f"its entry {key} has shape {tuple(moment.shape)}, but {name} is {tuple(parameters[name].shape)}"
    return None
