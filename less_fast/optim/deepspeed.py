"""Adam's moments from DeepSpeed's checkpoints, put together from the flat partitions that its processes save.

The layout is that of DeepSpeed's own ``zero_to_fp32.py``: ``param_shapes`` in the model's file lists names and shapes
in the order in which they were flattened. ZeRO-1 and -2 cut the flat vector of each parameter group into one piece per
process, with padding at its end; ZeRO-3 cuts every parameter by itself, so that each process holds a piece of each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.optim.inert import Inert, load_inert, shown
from less_fast.optim.moments import SavedState, check_shape, clean_name

SHARDS = "*_optim_states.pt"
_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is one that DeepSpeed saves (``global_step*``)."""
    return any(folder.glob(SHARDS)) or any((folder / name).is_file() for name in _MODEL_FILES)


def read_deepspeed(folder: Path, parameters: Mapping[str, torch.Size]) -> SavedState:
    """The optimizer state in a ``global_step*`` folder; only the moments of ``parameters`` are put together.

    ``parameters``: the model's shapes by name. Raises LessFastError for other shapes in the checkpoint, for one that
    is not whole, and for those of tensor, pipeline or expert parallelism.
    """
    model = _model_states(folder)
    files = _shards(folder)
    if not files:
        return _without_zero(folder, model)
    shapes = model.get("param_shapes")
    if not isinstance(shapes, list):
        raise LessFastError(f"{folder}: the model's file has no param_shapes; expected them; save the checkpoint again")
    shards = [_optimizer(file) for file in files]
    stage = shards[0].get("zero_stage")
    stage = stage.args[0] if isinstance(stage, Inert) and stage.args else stage
    counts = shards[0].get("partition_count")
    if any(count != len(files) for count in (counts if isinstance(counts, (list, tuple)) else [counts])):
        raise LessFastError(
            f"{folder}: found {len(files)} files {SHARDS}, but the state is cut into {shown(counts)} parts; expected "
            "one file for each part; copy the files of all processes (partitions of expert parallelism and MiCS are "
            "not read)"
        )
    if "ds_zero_partition_groups" in shards[0]:
        raise LessFastError(
            f"{folder}: parameters are partitioned over different groups of processes, which is not read"
        )
    if stage in (1, 2):
        return _Flat(folder, files, shards, parameters).zero_1_and_2(shapes)
    if stage == 3:
        return _Flat(folder, files, shards, parameters).zero_3(shapes)
    raise LessFastError(
        f"{files[0]}: zero_stage is {shown(stage)}; expected 1, 2 or 3; use a checkpoint of DeepSpeed's ZeRO"
    )


def _model_states(folder: Path) -> Mapping[str, Any]:
    file = next((folder / name for name in _MODEL_FILES if (folder / name).is_file()), None)
    if file is None:
        raise LessFastError(
            f"{folder}: has no {' or '.join(_MODEL_FILES)}, which tells the parameters' names and shapes; copy it too"
        )
    if (folder / "mp_rank_01_model_states.pt").exists() or any(folder.glob("layer_*_model_states.pt")):
        raise LessFastError(
            f"{folder}: is a checkpoint of tensor, pipeline or expert parallelism; expected one of data parallelism "
            "(ZeRO) alone; convert it with DeepSpeed first"
        )
    content = load_inert(file)
    if not isinstance(content, Mapping):
        raise LessFastError(f"{file}: expected DeepSpeed's model state; save the checkpoint again")
    return content


def _shards(folder: Path) -> list[Path]:
    """The processes' files in order of their rank."""
    ranks: dict[int, Path] = {}
    for file in folder.glob(SHARDS):
        match = _SHARD.fullmatch(file.name)
        if match is None or int(match[2]) != 0 or int(match[1]) in ranks:
            raise LessFastError(
                f"{file}: belongs to a checkpoint of tensor, pipeline or expert parallelism, or of two runs; expected "
                "one zero_pp_rank_<n>_mp_rank_00_optim_states.pt per process"
            )
        ranks[int(match[1])] = file
    missing = next((rank for rank in range(len(ranks)) if rank not in ranks), None)
    if missing is not None:
        raise LessFastError(f"{folder}: the file of process {missing} is missing; copy the files of all processes")
    return [ranks[rank] for rank in range(len(ranks))]


def _optimizer(file: Path) -> Mapping[str, Any]:
    content = load_inert(file)
    state = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise LessFastError(f"{file}: expected the key optimizer_state_dict, as DeepSpeed's ZeRO saves it")
    return state


def _without_zero(folder: Path, model: Mapping[str, Any]) -> SavedState:
    state = model.get("optimizer")
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        raise LessFastError(
            f"{folder}: has no {SHARDS} and no plain optimizer state (DeepSpeed's 16-bit optimizers without ZeRO are "
            "not read); train with ZeRO, or save with the optimizer"
        )
    return SavedState(folder, folder.parent, state["state"], state.get("param_groups") or [], mapped=True)


class _Flat:
    """The flat vectors of all processes and where each parameter lies in them."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path],
        shards: Sequence[Mapping[str, Any]],
        parameters: Mapping[str, torch.Size],
    ) -> None:
        self.folder, self.files, self.shards, self.parameters = folder, files, shards, parameters

    def zero_1_and_2(self, shapes: Sequence[Mapping[str, Any]]) -> SavedState:
        parts = [_base_entries(file, shard) for file, shard in zip(self.files, self.shards)]
        entries, groups = [part[0] for part in parts], parts[0][1]
        if any(len(of_rank) != len(shapes) for of_rank in entries):
            raise LessFastError(
                f"{self.folder}: the optimizer has {len(entries[0])} flat vectors, param_shapes {len(shapes)} groups; "
                "expected as many; the files belong to different checkpoints"
            )
        state: dict[str, dict[str, Any]] = {}
        for number, group in enumerate(shapes):
            of_group = [of_rank[number] for of_rank in entries]
            if not self._is_flat_adam(of_group):
                return SavedState(self.folder, self.folder.parent, {next(iter(group)): of_group[0]}, groups)
            paddings = self.shards[0].get("param_alignment_paddings")
            after = paddings[number] if paddings else [0] * len(group)
            vectors = {key: [entry[key] for entry in of_group] for key in _MOMENTS}
            offset = 0
            for (name, shape), padding in zip(group.items(), after):
                size = math.prod(shape)
                if self._is_wanted(name, shape):
                    state[name] = {
                        "step": of_group[0].get("step"),
                        **{key: self._cut(vectors[key], offset, size, name).view(tuple(shape)) for key in _MOMENTS},
                    }
                offset += size + padding
            # DeepSpeed pads each vector to a multiple of twice the number of processes.
            total, unit = sum(len(piece) for piece in vectors["exp_avg"]), 2 * len(self.files)
            self._check_size(-(-offset // unit), -(-total // unit), f"group {number}", f"times {unit} ")
        return SavedState(self.folder, self.folder.parent, state, groups)

    def zero_3(self, shapes: Sequence[Mapping[str, Any]]) -> SavedState:
        names = {name: shape for group in shapes for name, shape in group.items()}
        entries = []
        for file, shard in zip(self.files, self.shards):
            if not isinstance(shard.get("optimizer_state_dict"), Mapping):
                raise LessFastError(f"{file}: holds no optimizer_state_dict of ZeRO-3; save the checkpoint again")
            entries.append(_in_order(file, shard["optimizer_state_dict"]))
        groups = _constants_only(self.shards[0]["optimizer_state_dict"]["param_groups"])
        for of_rank in entries:
            if not self._is_flat_adam(of_rank):
                return SavedState(self.folder, self.folder.parent, {next(iter(names)): of_rank[0]}, groups)
        # Sub-groups follow each other; a parameter's piece may run over the end of one.
        vectors = [{key: [entry[key] for entry in of_rank] for key in _MOMENTS} for of_rank in entries]
        state: dict[str, dict[str, Any]] = {}
        offset = 0
        for name, shape in names.items():
            size = math.prod(shape)
            piece = -(-size // len(self.files))
            if self._is_wanted(name, shape):
                state[name] = {"step": entries[0][0].get("step")}
                for key in _MOMENTS:
                    whole = torch.cat([self._cut(vector[key], offset, piece, name) for vector in vectors])
                    state[name][key] = whole[:size].view(tuple(shape))
            offset += piece
        for rank, vector in enumerate(vectors):
            self._check_size(offset, sum(len(part) for part in vector["exp_avg"]), f"process {rank}")
        return SavedState(self.folder, self.folder.parent, state, groups)

    def _is_wanted(self, name: str, shape: Sequence[int]) -> bool:
        """Whether the model has the parameter; if so, it must have its shape, which tells how much is put together."""
        expected = self.parameters.get(clean_name(name))
        if expected is not None:
            check_shape(self.folder, name, shape, expected)
        return expected is not None

    def _is_flat_adam(self, entries: Sequence[Mapping[str, Any]]) -> bool:
        return all(isinstance(entry.get(key), Tensor) and entry[key].ndim == 1 for entry in entries for key in _MOMENTS)

    def _cut(self, pieces: Sequence[Tensor], offset: int, size: int, name: str) -> Tensor:
        """Entries [offset, offset + size) of vectors laid end to end."""
        cut = list(_overlaps(pieces, offset, size))
        if sum(map(len, cut)) != size:
            raise LessFastError(
                f"{self.folder}: the moments end before those of {name} do; expected entries {offset} to "
                f"{offset + size}; the files belong to different checkpoints or are cut off"
            )
        return torch.cat(cut)  # a copy even of one piece: the file is mapped

    def _check_size(self, needed: int, found: int, where: str, unit: str = "") -> None:
        if needed != found:
            raise LessFastError(
                f"{self.folder}: the parameters of {where} take {needed} {unit}entries, the moments have {found}; "
                "expected the same; the files belong to different checkpoints"
            )


def _overlaps(pieces: Sequence[Tensor], offset: int, size: int) -> Iterator[Tensor]:
    for piece in pieces:
        if offset < len(piece) and size > 0:
            part = piece[max(offset, 0) : offset + size]
            yield part.detach()
            size -= len(part)
            offset += len(part)
        offset -= len(piece)


def _base_entries(file: Path, shard: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
    """What a process of ZeRO-1 or -2 kept of each parameter group, and the groups' constants where they were saved."""
    base = shard.get("base_optimizer_state")
    if isinstance(base, Mapping) and isinstance(base.get("state"), Mapping):
        entries = _in_order(file, base)
        return entries, _constants_only(base["param_groups"])
    # "Elastic" checkpoints: a list of the groups' entries without paddings, and no groups.
    if isinstance(base, (list, tuple)) and all(isinstance(entry, Mapping) for entry in base):
        return [{"step": shard.get("base_optimizer_state_step"), **entry} for entry in base], []
    raise LessFastError(f"{file}: holds no base_optimizer_state; expected a state saved after the first step")


def _in_order(file: Path, state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of a torch state in the groups' order, each with its group's step where it has none of its own."""
    entries: list[Mapping[str, Any]] = []
    for group in state["param_groups"]:
        for key in group["params"]:
            if not isinstance(state["state"].get(key), Mapping):
                raise LessFastError(
                    f"{file}: has no state of flat vector {key}; expected one saved after the first step and held in "
                    "memory (state offloaded to NVMe is not in the file)"
                )
            entries.append({**({"step": group["step"]} if "step" in group else {}), **state["state"][key]})
    return entries


def _constants_only(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups without their flat vectors, whose numbers mean nothing outside DeepSpeed."""
    return [{**group, "params": []} for group in groups]
