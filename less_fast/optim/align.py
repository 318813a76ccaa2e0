"""Which parameter each integer of a torch optimizer's state means: by names where saved, else by groups and shapes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from less_fast.errors import LessFastError
from less_fast.optim.moments import SavedState, clean_name, saved_shape

Shape = torch.Size | None  # None: the state does not tell
# Groups that hold different parameters of one shape can be dealt out in exponentially many ways: then none is sought.
_MOST_WAYS = 1000


def align(saved: SavedState, model: nn.Module) -> dict[int, str]:
    """Integer keys -> parameter names.

    Optimizers number their parameters group by group. Where the groups carry ``param_names``, those count. Otherwise
    each group must hold its parameters in the model's order, and the groups be the known ones (a single group, by
    weight decay, by LoRA+'s sides), in any order, or such that the shapes leave one assignment only.

    Raises LessFastError where no assignment fits, or more than one.
    """
    groups = [group for group in saved.groups if group.get("params")] or [{"params": sorted(saved.state)}]
    keys = [list(group["params"]) for group in groups]
    if all("param_names" in group for group in groups):
        return {key: clean_name(name) for group in groups for key, name in zip(group["params"], group["param_names"])}
    shapes = [[saved_shape(saved.state.get(key)) for key in group] for group in keys]
    first_reason: str | None = None
    for parameters in _candidates(model):
        if sum(map(len, keys)) != len(parameters):
            first_reason = first_reason or (
                f"its groups have {', '.join(str(len(group['params'])) for group in saved.groups or groups)} "
                f"parameters, the model trains {len(parameters)} (the first is {next(iter(parameters))})"
            )
            continue
        found = _assignments(shapes, parameters)
        if len(found) == 1:
            return {key: name for group, names in zip(keys, found[0]) for key, name in zip(group, names)}
        if found:
            raise LessFastError(f"{saved.source}: {_difference(keys, found)}")
        first_reason = _mismatch(keys, shapes, parameters)
    raise LessFastError(
        f"{saved.source}: the optimizer state does not fit the model: {first_reason}; load the model and adapter that "
        "it was saved with"
    )


def _candidates(model: nn.Module) -> list[dict[str, nn.Parameter]]:
    """What may have been trained, most likely first: the adapter, what requires a gradient now, everything."""
    every = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    adapter = {name: p for name, p in every.items() if "lora_" in name or "modules_to_save" in name}
    trainable = {name: p for name, p in every.items() if p.requires_grad}
    return [candidate for candidate in (adapter, trainable, every) if candidate]


def _is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether the Trainer decays a parameter: neither a bias nor of a norm."""
    return parameter.ndim > 1 and not name.endswith("bias") and "norm" not in name.lower()


def _lora_plus(name: str, parameter: Tensor) -> Hashable:
    """LoRA+'s groups: A, B with and without weight decay, embeddings."""
    if "lora_embedding_" in name:
        return "embedding"
    return ("B", _is_decayed(name, parameter)) if "lora_B" in name or parameter.ndim == 1 else "A"


_GROUPINGS: Sequence[Callable[[str, Tensor], Hashable]] = (lambda name, parameter: 0, _is_decayed, _lora_plus)


def _assignments(shapes: Sequence[Sequence[Shape]], parameters: Mapping[str, Tensor]) -> list[list[list[str]]]:
    """At most two different ways to give each group its names: by known groupings, failing that by shapes alone."""
    found: list[list[list[str]]] = []
    for grouping in _GROUPINGS:
        cells: dict[Hashable, list[str]] = {}
        for name, parameter in parameters.items():
            cells.setdefault(grouping(name, parameter), []).append(name)
        for assignment in islice(_permutations(shapes, list(cells.values()), parameters), 2):
            if assignment not in found:
                found.append(assignment)
    return found[:2] if found else _by_shapes(shapes, parameters)


def _permutations(
    shapes: Sequence[Sequence[Shape]], cells: list[list[str]], parameters: Mapping[str, Tensor]
) -> Iterator[list[list[str]]]:
    if len(shapes) != len(cells):
        return
    if not shapes:
        yield []
        return
    for number, cell in enumerate(cells):
        if len(cell) == len(shapes[0]) and all(map(_fits, shapes[0], (parameters[name] for name in cell))):
            for rest in _permutations(shapes[1:], cells[:number] + cells[number + 1 :], parameters):
                yield [cell, *rest]


def _by_shapes(shapes: Sequence[Sequence[Shape]], parameters: Mapping[str, Tensor]) -> list[list[list[str]]]:
    """At most two ways to deal the parameters out in the model's order, each to a group that waits for its shape."""
    # How many each group has got -> at most two ways to get there, each a chain (chain before, group, name).
    ways: dict[tuple[int, ...], list[Any]] = {(0,) * len(shapes): [None]}
    for name, parameter in parameters.items():
        longer: dict[tuple[int, ...], list[Any]] = {}
        for dealt, chains in ways.items():
            for number, group in enumerate(shapes):
                if dealt[number] < len(group) and _fits(group[dealt[number]], parameter):
                    more = (*dealt[:number], dealt[number] + 1, *dealt[number + 1 :])
                    reached = longer.setdefault(more, [])
                    reached.extend((chain, number, name) for chain in chains[: 2 - len(reached)])
        ways = longer
        if len(ways) > _MOST_WAYS:
            break
    found = islice((chain for chains in ways.values() for chain in chains), 2)
    return [_unchained(chain, len(shapes)) for chain in found]


def _unchained(chain: Any, n_groups: int) -> list[list[str]]:
    groups: list[list[str]] = [[] for _ in range(n_groups)]
    while chain is not None:
        chain, number, name = chain
        groups[number].insert(0, name)
    return groups


def _fits(shape: Shape, parameter: Tensor) -> bool:
    return shape is None or shape == parameter.shape


def _difference(keys: Sequence[Sequence[int]], ways: Sequence[list[list[str]]]) -> str:
    """Why two assignments cannot be told apart, by the first parameter that goes to different groups."""
    group_of = [{name: number for number, group in enumerate(way) for name in group} for way in ways]
    name = next(name for name in group_of[0] if group_of[0][name] != group_of[1].get(name))
    return (
        f"the state numbers its parameters, and its {len(keys)} groups fit the model in more than one way ({name} may "
        f"be in group {group_of[0][name]} or {group_of[1][name]}); expected one; save the state with param_names, by "
        "giving the optimizer (name, parameter) pairs"
    )


def _mismatch(
    keys: Sequence[Sequence[int]], shapes: Sequence[Sequence[Shape]], parameters: Mapping[str, Tensor]
) -> str:
    names = sorted(parameters, key=lambda name: not _is_decayed(name, parameters[name]))
    if len(keys) == 1:
        names = list(parameters)
    elif len(keys) != 2 or len(keys[0]) != sum(_is_decayed(*pair) for pair in parameters.items()):
        return f"the shapes in its {len(keys)} groups fit no order of the model's parameters"
    pairs = zip((key for group in keys for key in group), (shape for group in shapes for shape in group), names)
    key, shape, name = next((k, s, n) for k, s, n in pairs if not _fits(s, parameters[n]))
    return f"its entry {key} has shape {tuple(shape or ())}, but {name} is {tuple(parameters[name].shape)}"
