"""Gradient indexes on disk in bergson's format: of a feature store, or of a data set through a ``ModuleCollector``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from less_fast.compat.bergson.collector import ModuleCollector, Sink
from less_fast.compat.bergson.matrix import VERSION, ModuleProjection
from less_fast.errors import LessFastError
from less_fast.store import FeatureStore
from less_fast.store.files import check_free_space

# The one module of an index of a store's features; bergson names that of its own global projection so.
GRADIENTS = "gradients"

_BLOCK_ROWS = 1024
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def build_index(
    collector: ModuleCollector,
    data: Any,
    folder: str | Path,
    *,
    model_path: str | Path | None = None,
    dtype: str = "float32",
    token_budget: int = 2048,
    progress: bool = True,
) -> Path:
    """Write the index that ``bergson build`` writes, with our capture; ``bergson query`` and ``score`` take it.

    Returns the folder.

    Parameters
    ----------
    data : as for :meth:`ModuleCollector.collect`; kept in ``data.hf`` with a column ``loss``. ``bergson query`` prints
        its column ``text``.
    folder : of the index, which appears whole or not at all; it may not be there yet.
    model_path : where ``bergson query`` is to load the model (or the adapter) from. Without it no ``config.yaml`` is
        written, which that command needs.
    dtype : of the gradients on disk: float32, float16 or bfloat16.
    token_budget : tokens of a batch, padding included.
    """
    folder, projection = Path(folder), collector.projection or ModuleProjection()
    settings = {
        "projection_dim": projection.dim if collector.projection else None,
        "projection_type": projection.type,
        "projection_scale": projection.scale,
        "projection_seed": projection.seed,
    }
    with _new_index(folder, len(data), collector.grad_sizes, dtype, settings) as (part, put):
        losses = collector.collect(data, put, token_budget=token_budget, progress=progress)
        kept = data.remove_columns([name for name in ("loss",) if name in data.column_names])
        kept.add_column("loss", losses).save_to_disk(str(part / "data.hf"))
        _save_token_count(part, [len(tokens) for tokens in data["input_ids"]])
        if model_path is not None:
            config = {
                "run_path": str(folder.resolve()),
                "model": str(model_path),
                "precision": _PRECISIONS.get(next(collector.model.parameters()).dtype, "auto"),
                "data": {"dataset": str(folder.resolve() / "data.hf")},
                **settings,
                "projection_dim": settings["projection_dim"] or 0,
                "loss_reduction": collector.loss_reduction,
                "token_batch_size": token_budget,
            }
            steps = [{"build": {"index_cfg": config, "preprocess_cfg": {}}}]
            _write_yaml(part / "config.yaml", {"steps": steps})
    return folder


def write_index(store: FeatureStore | str | Path, folder: str | Path, *, dtype: str = "float32") -> Path:
    """Write a store's features as a bergson index of one module, ``gradients``; returns the folder.

    bergson's ``Attributor`` and ``load_gradient_dataset`` read it. Its commands compute gradients with bergson's
    matrices: ``score`` refuses the index, whose ``processor_config.yaml`` names our projection, and ``query`` finds no
    ``config.yaml`` in it. ``data.hf`` has the columns ``id``, ``dataset``, ``subtask``, ``status``, ``length`` and
    ``n_labels``. Rows that are not OK are zeros.

    Parameters
    ----------
    folder : of the index, which appears whole or not at all; it may not be there yet.
    dtype : of the features on disk: float32, float16 or bfloat16.
    """
    import datasets

    store, folder = store if isinstance(store, FeatureStore) else FeatureStore(store), Path(folder)
    settings = {"projection_dim": store.dim, "projection_type": f"less_fast {store.projection}"}
    strings = dict.fromkeys(("id", "dataset", "subtask"), "string")
    types = {**strings, "status": "uint8", "length": "int32", "n_labels": "int32"}
    columns = (store.rows.ids, store.rows.datasets, store.rows.subtasks, store.status, store.n_tokens, store.n_labels)
    with _new_index(folder, len(store), {GRADIENTS: store.dim}, dtype, settings) as (part, put):
        for start, block in store.blocks(_BLOCK_ROWS):
            put(list(range(start, start + len(block))), {GRADIENTS: torch.from_numpy(block)})
        features = datasets.Features({name: datasets.Value(kind) for name, kind in types.items()})
        datasets.Dataset.from_dict(dict(zip(types, columns)), features=features).save_to_disk(str(part / "data.hf"))
        _save_token_count(part, store.n_tokens)
    return folder


@contextmanager
def _new_index(
    folder: Path, n_rows: int, grad_sizes: Mapping[str, int], dtype: str, settings: Mapping[str, Any]
) -> Iterator[tuple[Path, Sink]]:
    """A folder that becomes ``folder`` when the block ends well, and what writes rows to its ``gradients.bin``.

    ``settings``: of bergson's ``GradientProcessor``, where they differ from ours.
    """
    if dtype not in _DTYPES:
        raise LessFastError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if not n_rows:
        raise LessFastError(f"there are no rows to write to {folder}; an index needs one at least")
    if folder.exists():
        raise LessFastError(f"{folder} exists already; remove it, or choose another folder")
    kind, limits = _DTYPES[dtype], torch.finfo(_DTYPES[dtype])
    width = sum(grad_sizes.values()) * kind.itemsize
    check_free_space(folder, n_rows * width)
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise LessFastError(
            f"{part} is there, from a run that goes on or was interrupted; wait, or remove it"
        ) from None
    try:
        file = np.memmap(part / "gradients.bin", np.uint8, "w+", shape=(n_rows, width))

        def put(rows: list[int], gradients: dict[str, Tensor]) -> None:
            found = torch.cat([gradients[name] for name in grad_sizes], -1)
            file[rows] = found.clamp(limits.min, limits.max).to("cpu", kind).contiguous().view(torch.uint8).numpy()

        yield part, put
        file.flush()
        info = {
            "attribute_tokens": False,
            "num_items": n_rows,
            "num_grads": n_rows,
            "grad_sizes": dict(grad_sizes),
            "base_dtype": dtype,
        }
        (part / "info.json").write_text(json.dumps(info, indent=2))
        processor = {
            "reshape_to_square": False,
            "projection_target": "per_module",
            "projection_scale": "jl",
            "include_bias": False,
            "projection_seed": None,
            "projection_version": VERSION,
            **settings,
        }
        _write_yaml(part / "processor_config.yaml", processor)
        for name in ("normalizers", "hessians", "hessians_eigen"):
            torch.save({}, part / f"{name}.pth")
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _save_token_count(part: Path, lengths: Any) -> None:
    """The tokens that predict another: what bergson counts."""
    torch.save(torch.tensor(int(np.maximum(np.asarray(lengths, np.int64) - 1, 0).sum())), part / "total_processed.pt")


def _write_yaml(path: Path, fields: Mapping[str, Any]) -> None:
    import yaml

    path.write_text(yaml.safe_dump(dict(fields), sort_keys=False))
