"""Which stores may be compared: features of other projections, parameters or examples give scores that mean nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from less_fast.errors import LessFastError
from less_fast.store import FeatureStore


def check_pair(train: FeatureStore, target: FeatureStore) -> None:
    """Raise LessFastError unless both stores hold functions of the same gradient entries in the same features.

    Warns where they were made with different models or adapters: legal, but seldom meant.
    """
    if not train.projection.same_matrix(target.projection):
        raise _differ(train, target, "projection", train.projection, target.projection)
    if train.dim != target.dim:
        raise _differ(train, target, "dim", train.dim, target.dim)
    # Features of another program: +-1s too, but not these.
    ours, theirs = (store.facts.get("projector", "less_fast") for store in (train, target))
    if ours != theirs:
        raise _differ(train, target, "projector", ours, theirs)
    for name, ours, theirs in _shared_facts(train, target, "layout_hash"):
        layouts = train.facts.get("layout", []), target.facts.get("layout", [])
        differing = next((pair for pair in zip_longest(*layouts) if pair[0] != pair[1]), None)
        if differing is None:
            raise _differ(train, target, name, ours, theirs)
        raise _differ(train, target, "the first matrix that differs", *map(_matrix, differing))
    for name, _, _ in _shared_facts(train, target, "model", "adapter"):
        warnings.warn(f"{train.path} and {target.path} were made with different {name}s", stacklevel=3)
    kinds = [(store.facts.get("precondition") or {}).get("kind") for store in (train, target)]
    if kinds == ["sgd", "adam"]:
        warnings.warn(
            f"{train.path} holds plain gradients and {target.path} Adam's; LESS has it the other way round: "
            "were pool and target swapped?",
            stacklevel=3,
        )
    if target.dtype == "1bit":
        warnings.warn(
            f"target {target.path} holds 1bit features, which exaggerate large cosines; float32 costs little there",
            stacklevel=3,
        )


def check_checkpoints(stores: Sequence[FeatureStore]) -> None:
    """Raise LessFastError unless all stores hold the same examples in the same order."""
    first = stores[0]
    for other in stores[1:]:
        if len(first) != len(other):
            raise _differ(first, other, "number of rows", len(first), len(other))
        if first.rows_hash != other.rows_hash:
            raise _differ(first, other, "ids, datasets or subtasks of the rows", first.rows_hash, other.rows_hash)
        for name, ours, theirs in _shared_facts(first, other, "examples"):
            raise _differ(first, other, name, ours, theirs)
    made_by = [tuple(str(store.facts.get(name)) for name in ("model", "adapter", "precondition")) for store in stores]
    for number, origin in enumerate(made_by):
        if origin in made_by[:number] and "adapter" in stores[number].facts:
            twin = stores[made_by.index(origin)]
            warnings.warn(f"{twin.path} and {stores[number].path} are of the same checkpoint", stacklevel=3)


def _matrix(entry: Mapping[str, Any] | None) -> str:
    return "none" if entry is None else f"{entry['name']}, {entry['rows']} x {entry['cols']}"


def _shared_facts(a: FeatureStore, b: FeatureStore, *names: str) -> Iterator[tuple[str, Any, Any]]:
    for name in names:
        if name in a.facts and name in b.facts and a.facts[name] != b.facts[name]:
            yield name, a.facts[name], b.facts[name]


def _differ(a: FeatureStore, b: FeatureStore, name: str, ours: Any, theirs: Any) -> LessFastError:
    return LessFastError(
        f"{a.path} and {b.path} cannot be compared: {name} is ({ours}) in the first and ({theirs}) in the second; "
        "extract one of them again with the settings of the other"
    )
