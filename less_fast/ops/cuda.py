"""The ``cuda`` backend: sketches of flat gradients on CUDA devices, by the C++ module's kernels."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from less_fast.errors import UnsupportedBackendError
from less_fast.layout import Parameter
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

# Part sums of as many examples as fit are made at a time; no example's bits depend on which others those are.
_WORKSPACE = 256 << 20
_SHARE = 4  # examples that share signs and buckets
_MOST_TERMS = 2**31 - 1  # of one chunk's integer sum


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("less_fast._cuda"), None
    except ImportError as error:
        return None, f"the CUDA module less_fast._cuda is not available ({error}); reinstall with nvcc on the PATH"


_cuda, MISSING = _load()  # the module, or why there is none


def supports(features: Tensor, grads: Tensor, projection: Projection, rule: Rule = NONE) -> str | None:
    """None where this backend can run the call, else the reason why not."""
    if _cuda is None:
        return MISSING
    for name, tensor in (("features", features), ("gradients", grads)):
        if tensor.device.type != "cuda":
            return f"{name} are on {tensor.device}, and this backend runs on CUDA devices"
    if features.dtype != torch.float32 or grads.dtype not in _dtypes():
        return f"{features.dtype} features of {grads.dtype} gradients: it adds float32, float16 or bfloat16 to float32"
    if projection.kind not in ("srht", "sjlt"):
        return f"the projection is {projection.kind}, and this backend has srht and sjlt"
    if grads.ndim != 3 or grads.shape[1] != 1 or rule.kind != "none":
        return f"gradients {tuple(grads.shape)} with rule {rule.kind}: it takes flat ones, (N, 1, P), with rule none"
    if projection.kind == "srht" and not _cuda.MIN_BLOCK <= projection.block <= _cuda.MAX_BLOCK:
        return f"block is {projection.block}, and this backend mixes runs of {_cuda.MIN_BLOCK} to {_cuda.MAX_BLOCK}"
    device = features.device.index
    reason = device_reason(device)
    if reason is not None or projection.kind == "srht":
        return reason
    most = _max_dim(device)
    if projection.dim > most:
        return f"sjlt has K = {projection.dim}, and this device's shared memory holds K up to {most}"
    if _cuda.sjlt_chunk_entries(grads.shape[2]) * projection.nnz > _MOST_TERMS:
        return f"P = {grads.shape[2]} with nnz = {projection.nnz} overflows this backend's integer sums"
    return None


@functools.cache
def device_reason(device: int) -> str | None:
    """None where the kernels can run on CUDA device number ``device``, else the reason why not."""
    if _cuda is None:
        return MISSING
    try:
        _cuda.check_device(device)
    except RuntimeError as error:
        return f"less_fast._cuda cannot run on cuda:{device}: {error}"
    return None


@functools.cache
def _max_dim(device: int) -> int:
    found: int = _module().sjlt_max_dim(device)
    return found


def _module() -> Any:
    if _cuda is None:
        raise UnsupportedBackendError(f"backend 'cuda' cannot run this call: {MISSING}")
    return _cuda


def _dtypes() -> dict[torch.dtype, int]:
    module = _module()
    return {torch.float32: module.FLOAT32, torch.float16: module.FLOAT16, torch.bfloat16: module.BFLOAT16}


def accumulate_cuda(
    features: Tensor, grads: Tensor, parameter: Parameter, run_base: int, projection: Projection, rule: Rule
) -> None:
    """Features (N, K) += sketch of grads (N, 1, P): float32 += float32, float16 or bfloat16, rows contiguous.

    Runs on the current stream of the features' device. For ``sjlt`` a row that holds a non-finite entry becomes NaN
    throughout; an entry is rounded to a multiple of at most 2^-30 of the largest magnitude of its chunk of the row,
    and the rounded ones are added up exactly.
    """
    module = _module()
    n, _, size = grads.shape
    kind, dim = projection.kind, projection.dim
    sizes = (size, dim, projection.block) if kind == "srht" else (size, dim)
    needed = getattr(module, f"{kind}_workspace")
    count = min(n, max(_SHARE, _WORKSPACE // max(1, needed(1, *sizes)) // _SHARE * _SHARE))
    workspace = torch.empty(max(1, needed(count, *sizes)), dtype=torch.uint8, device=features.device)
    device = features.device.index
    place = module.Place(workspace.data_ptr(), device, torch.cuda.current_stream(device).cuda_stream)
    dtype = _dtypes()[grads.dtype]
    for start in range(0, n, max(1, count)):
        rows, out = grads[start : start + count], features[start : start + count]
        source = module.Gradients(rows.data_ptr(), dtype, rows.shape[0], size, rows.stride(0))
        target = module.Features(out.data_ptr(), dim, out.stride(0))
        if kind == "srht":
            module.srht(target, source, run_base, projection.block, projection.seed, place)
        else:
            module.sjlt(target, source, parameter.offset, projection.nnz, projection.seed, place)
