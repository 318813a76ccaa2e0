"""Optimizer states in torch.distributed.checkpoint's format, read without a process group and without running code.

The layout is that of ``torch.distributed.checkpoint.FileSystemWriter``: ``.metadata`` is a pickle that says which chunk
of which tensor lies where in which ``*.distcp`` file; each chunk is a small ``torch.save`` of its own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.optim.inert import unpickle, unreadable
from less_fast.optim.moments import SavedState, clean_name

METADATA = ".metadata"
_READ_OF_A_PARAMETER = {
    *("exp_avg", "exp_avg_sq", "step"),
    *(f"{name}{number}" for name in ("state", "qmap", "absmax") for number in (1, 2)),
}
_READ_OF_A_GROUP = {"params", "param_names", "betas", "eps", "step"}


def read_distributed(folder: Path, wanted: Callable[[str], bool]) -> SavedState:
    """The optimizer state in a folder with ``.metadata``; of named parameters only those ``wanted`` are read.

    Takes nested and flattened states alike (``optimizer.state.<name>.exp_avg`` under any prefix). What is not needed
    is listed in the state with the value None. Raises LessFastError for a folder that holds no optimizer state or is
    not whole.
    """
    metadata = unpickle(folder / METADATA)
    known, places = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    if not isinstance(known, Mapping) or not isinstance(places, Mapping):
        raise LessFastError(
            f"{folder / METADATA}: no metadata of a distributed checkpoint; expected a folder that "
            "torch.distributed.checkpoint wrote with FileSystemWriter; name the folder of the optimizer"
        )
    reader = _Reader(folder, places)
    state: dict[Any, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    prefixes = set()
    for key, kind in known.items():
        prefix, section, owner, field = _split(key)
        if section == "state":
            if owner.isdigit() or wanted(clean_name(owner)):
                read = field in _READ_OF_A_PARAMETER
                entry = state.setdefault(int(owner) if owner.isdigit() else owner, {})
                entry[field] = reader.read(key, kind) if read else None
        elif section == "param_groups":
            groups.setdefault(owner, {})[field] = reader.read(key, kind) if field in _READ_OF_A_GROUP else None
        else:
            continue
        prefixes.add(prefix)
    if not prefixes:
        raise LessFastError(
            f"{folder}: the distributed checkpoint holds no optimizer state (its first entry is "
            f"{next(iter(known), 'missing')}); expected entries such as optimizer.state.<name>.exp_avg; name the "
            "folder of the optimizer"
        )
    if len(prefixes) > 1:
        raise LessFastError(
            f"{folder}: the distributed checkpoint holds several optimizers ({', '.join(sorted(prefixes))}); expected "
            "one; save the one wanted in a folder of its own"
        )
    # A flattened state has a group of its own for every parameter.
    listed = [{"params": [] if owner.isdigit() else [owner], **group} for owner, group in groups.items()]
    return SavedState(folder, folder.parent, state, listed)


def _split(key: str) -> tuple[str, str, str, str]:
    """A flattened key as (prefix, ``state`` or ``param_groups``, parameter or group, field); empty where it is none."""
    parts = [part for part in key.split(".") if part != "__bnb_optimizer_quant_state__"]
    for at, part in enumerate(parts[:-2]):
        if part in ("state", "param_groups"):
            return ".".join(parts[:at]), part, ".".join(parts[at + 1 : -1]), parts[-1]
    return "", "", "", ""


class _Reader:
    def __init__(self, folder: Path, places: Mapping[Any, Any]) -> None:
        self.folder = folder
        # (key, offsets of the chunk) -> where it lies; a key that is no tensor has no offsets.
        self.places = {
            (where.fqn, tuple(getattr(where, "offset", None) or ())): place for where, place in places.items()
        }

    def read(self, key: str, kind: Any) -> Any:
        if not isinstance(getattr(kind, "chunks", None), list):
            return self._load(key, ())
        shape = tuple(kind.size)
        whole: Tensor | None = None
        n_read = 0
        for chunk in kind.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            part = self._load(key, offsets)
            if not isinstance(part, Tensor) or tuple(part.shape) != sizes:
                raise LessFastError(
                    f"{self.folder}: the chunk of {key} at {offsets} is no tensor of shape {sizes}, which the metadata "
                    "gives; the checkpoint is damaged; save it again"
                )
            if sizes == shape:
                return part
            whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
            whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes))] = part
            n_read += part.numel()
        if whole is None or n_read != math.prod(shape):
            raise LessFastError(
                f"{self.folder}: the chunks of {key} hold {n_read} of its {math.prod(shape)} entries; the checkpoint "
                "is not whole; copy the files of all processes"
            )
        return whole

    def _load(self, key: str, offsets: tuple[int, ...]) -> Any:
        place = self.places.get((key, offsets))
        if place is None:
            raise LessFastError(
                f"{self.folder / METADATA}: does not tell where {key} at {offsets} lies; the checkpoint is damaged"
            )
        if getattr(place, "transform_descriptors", None):
            raise LessFastError(
                f"{self.folder}: {key} is stored with the transform {place.transform_descriptors}; expected plain "
                "files; save the checkpoint without compression"
            )
        file = self.folder / place.relative_path
        if not file.resolve().is_relative_to(self.folder.resolve()):
            raise LessFastError(f"{self.folder / METADATA}: {key} lies outside the checkpoint, in {file}")
        if not file.is_file():
            raise LessFastError(f"{file}: missing, though {METADATA} names it; copy the files of all processes")
        try:
            with file.open("rb") as stream:
                stream.seek(place.offset)
                content = io.BytesIO(stream.read(place.length))
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise unreadable(file, error) from error
