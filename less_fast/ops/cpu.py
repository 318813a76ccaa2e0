"""The ``cpu`` backend: calls into the C++ module with addresses and sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops import native
from less_fast.ops.reference import global_index
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

# Entries and features of the tile of +-1s or normals that a dense sketch generates at a time: 1 MB, to stay in a cache.
_TILE_ENTRIES, _TILE_FEATURES = 256, 1024
_ENTRIES_PER_THREAD = 1 << 17

_cpu, _reason = native.CPU, native.MISSING


def supports(features: Tensor, grads: Tensor, projection: Projection, rule: Rule = NONE) -> str | None:
    """None where this backend can run the call, else the reason why not."""
    if _reason is not None:
        return _reason
    for name, tensor in (("features", features), ("gradients", grads)):
        if tensor.device.type != "cpu":
            return f"{name} are on {tensor.device}, and this backend runs on the CPU"
        if tensor.dtype != torch.float32:
            return f"{name} are {tensor.dtype}, and this backend computes in float32"
    return None


def _module() -> Any:
    assert _cpu is not None, _reason
    return _cpu


def accumulate_cpu(
    features: Tensor, grads: Tensor, parameter: Parameter, run_base: int, projection: Projection, rule: Rule
) -> None:
    """Features (N, K) += sketch of rule(grads): float32, rows of features contiguous, each example's (S, L) too."""
    module, threads = _module(), _threads(grads)
    gradients = module.Gradients(grads.data_ptr(), grads.shape[0], grads.stride(0), grads.shape[1], grads.shape[2])
    if projection.kind in ("srht", "sjlt"):
        target = module.Features(features.data_ptr(), features.shape[1], features.stride(0))
        if projection.kind == "srht":
            module.accumulate_srht(target, gradients, _rule(rule), run_base, projection.block, projection.seed, threads)
        else:
            strides = parameter.short_stride, parameter.long_stride
            module.accumulate_sjlt(
                target, gradients, _rule(rule), parameter.offset, *strides, projection.nnz, projection.seed, threads
            )
        return
    if projection.kind == "identity":
        index = global_index(parameter, 0, parameter.long, grads.device).flatten()
        features[:, index] += preconditioned(grads.contiguous(), rule).flatten(1)
        return
    width, scale = max(1, _TILE_ENTRIES // parameter.short), 1 / math.sqrt(projection.dim)
    for start in range(0, parameter.long, width):
        stop = min(start + width, parameter.long)
        u = preconditioned(grads[:, :, start:stop].contiguous(), rule.columns(start, stop)).flatten(1)
        index = global_index(parameter, start, stop, grads.device).flatten()
        for first in range(0, projection.dim, _TILE_FEATURES):
            strip = features[:, first : first + _TILE_FEATURES]
            strip.addmm_(u, dense_columns(index, projection, first, strip.shape[1]), alpha=scale)


def preconditioned(grads: Tensor, rule: Rule) -> Tensor:
    """rule(grads) for contiguous float32 (N, S, L)."""
    if rule.kind == "none":
        return grads
    module, out = _module(), torch.empty_like(grads)
    gradients = module.Gradients(grads.data_ptr(), grads.shape[0], grads.stride(0), grads.shape[1], grads.shape[2])
    module.precondition(out.data_ptr(), gradients, _rule(rule), _threads(grads))
    return out


def dense_columns(index: Tensor, projection: Projection, first: int, count: int) -> Tensor:
    """Features [first, first + count) of columns of sqrt(K)·Pi for ``rademacher`` and ``gaussian``: float32 (n, count).

    ``index`` int64 (n,), contiguous: the columns. ``first`` is a multiple of 128.
    """
    generate = getattr(_module(), f"{projection.kind}_columns")
    out, n = torch.empty(index.numel(), count), index.numel()
    generate(out.data_ptr(), index.data_ptr(), n, first, count, projection.seed, torch.get_num_threads())
    return out


def _threads(grads: Tensor) -> int:
    # Waking a thread costs as much as some 100,000 entries; the bits do not depend on the number.
    return max(1, min(torch.get_num_threads(), grads.numel() // _ENTRIES_PER_THREAD))


def _rule(rule: Rule) -> Any:
    a, b = (0, 0) if rule.a is None or rule.b is None else (rule.a.data_ptr(), rule.b.data_ptr())
    return _module().Precondition(rule.code, a, b, rule.alpha, rule.gamma, rule.e)
