"""Optimizer states in torch.distributed.checkpoint's format, read without a process group and without running code.

The layout is that of ``torch.distributed.checkpoint.FileSystemWriter``: ``.metadata`` is a pickle that says which chunk
of which tensor lies where in which ``*.distcp`` file; each chunk is a small ``torch.save`` of its own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.optim.inert import shown, unpickle, unreadable
from less_fast.optim.moments import SavedState, clean_name

METADATA = ".metadata"
_READ_OF_A_PARAMETER = {
    *("exp_avg", "exp_avg_sq", "step"),
    *(f"{name}{number}" for name in ("state", "qmap", "absmax") for number in (1, 2)),
}
_READ_OF_A_GROUP = {"params", "param_names", "betas", "eps", "step"}


def read_distributed(folder: Path, parameters: Mapping[str, torch.Size]) -> SavedState:
    """The optimizer state in a folder with ``.metadata``; of named parameters only ``parameters`` are read.

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
            if owner.isdigit() or clean_name(owner) in parameters:
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
        files = {self._file(place, where.fqn) for where, place in places.items()}
        # No byte is read twice, so that a small folder cannot fill the memory.
        self.n_left = sum(file.stat().st_size for file in files if file.is_file())

    def read(self, key: str, kind: Any) -> Any:
        if not isinstance(getattr(kind, "chunks", None), list):
            return self._load(key, ())
        shape = tuple(kind.size)
        n_read = sum(math.prod(chunk.sizes) for chunk in kind.chunks)
        if not kind.chunks or n_read != math.prod(shape):
            raise LessFastError(
                f"{self.folder}: the chunks of {key} hold {n_read} of its {math.prod(shape)} entries; the checkpoint "
                "is not whole; copy the files of all processes"
            )
        # All are read before memory is taken for the whole, whose size is known from the metadata alone until then.
        parts = [self._part(key, shape, tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kind.chunks]
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(shape, dtype=parts[0][1].dtype)
        covered = torch.zeros(shape, dtype=torch.bool)
        for where, part in parts:
            if covered[where].any():
                raise LessFastError(
                    f"{self.folder}: the chunks of {key} overlap; the checkpoint is damaged; save it again"
                )
            whole[where] = part
            covered[where] = True
        return whole

    def _part(
        self, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> tuple[tuple[slice, ...], Tensor]:
        """A chunk and where it lies in its tensor."""
        if not len(offsets) == len(sizes) == len(shape) or any(
            start < 0 or size < 0 or start + size > length for start, size, length in zip(offsets, sizes, shape)
        ):
            raise LessFastError(
                f"{self.folder}: a chunk of {key} lies outside the tensor: offsets {shown(offsets)}, sizes "
                f"{shown(sizes)}, shape {shown(shape)}; the checkpoint is damaged; save it again"
            )
        part = self._load(key, offsets)
        # A view of fewer entries than its shape has would be a way to fill the memory.
        if (
            not isinstance(part, Tensor)
            or tuple(part.shape) != sizes
            or part.untyped_storage().nbytes() < part.numel() * part.element_size()
        ):
            raise LessFastError(
                f"{self.folder}: the chunk of {key} at {offsets} is no full tensor of shape {sizes}, which the "
                "metadata gives; the checkpoint is damaged; save it again"
            )
        return tuple(slice(start, start + size) for start, size in zip(offsets, sizes)), part

    def _file(self, place: Any, key: str) -> Path:
        """The file named in the metadata. Links are followed: a download's files are links to a cache elsewhere."""
        relative = Path(place.relative_path)
        if relative.anchor or ".." in relative.parts:
            raise LessFastError(f"{self.folder / METADATA}: {key} lies outside the checkpoint, in {relative}")
        return self.folder / relative

    def _load(self, key: str, offsets: tuple[int, ...]) -> Any:
        place = self.places.get((key, offsets))
        if place is None:
            raise LessFastError(
                f"{self.folder / METADATA}: does not tell where {key} at {offsets} lies; the checkpoint is damaged"
            )
        if getattr(place, "transform_descriptors", None):
            raise LessFastError(
                f"{self.folder}: {key} is stored with the transform {shown(place.transform_descriptors)}; expected "
                "plain files; save the checkpoint without compression"
            )
        file = self._file(place, key)
        if not file.is_file():
            raise LessFastError(f"{file}: missing, though {METADATA} names it; copy the files of all processes")
        with file.open("rb") as stream:
            stream.seek(place.offset)
            content = stream.read(min(place.length, file.stat().st_size))
        self.n_left -= len(content)
        if self.n_left < 0:
            raise LessFastError(
                f"{self.folder / METADATA}: names more bytes than its files have, {key} among them; the checkpoint is "
                "damaged; save it again"
            )
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise unreadable(file, error) from error
