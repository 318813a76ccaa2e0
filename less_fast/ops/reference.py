"""Every sketch in pure torch, for any floating dtype and device: the definition that other backends are tested on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops import philox
from less_fast.ops.rule import Rule
from less_fast.projection import TAG_SRHT_IN, TAG_SRHT_OUT, Projection

# Entries of a temporary (columns x K, or N x columns) that a dense or sparse sketch may hold at a time.
_TEMPORARY = 1 << 22


def hadamard(x: Tensor) -> Tensor:
    """Sylvester-Hadamard transform of the last dimension n, a power of two; unnormalised: twice gives n·x."""
    n = x.shape[-1]
    h = 1
    while h < n:
        pairs = x.unflatten(-1, (n // (2 * h), 2, h))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        h *= 2
    return x


def global_index(parameter: Parameter, start: int, stop: int, device: torch.device) -> Tensor:
    """Global index j of entries (s, l), l in [start, stop): int64 (S, stop − start)."""
    short = torch.arange(parameter.short, dtype=torch.int64, device=device) * parameter.short_stride
    long = torch.arange(start, stop, dtype=torch.int64, device=device) * parameter.long_stride
    return parameter.offset + short[:, None] + long[None, :]


def accumulate_reference(
    features: Tensor, grads: Tensor, parameter: Parameter, run_base: int, projection: Projection, rule: Rule
) -> None:
    """Features (N, K) += sketch of rule(grads), grads (N, S, L) of one parameter, in features' dtype."""
    if projection.kind == "srht":
        _srht(features, grads, parameter, run_base, projection, rule)
        return
    per_column = parameter.short * max(grads.shape[0], projection.dim if projection.kind != "identity" else 1)
    width = max(1, _TEMPORARY // per_column)
    for start in range(0, parameter.long, width):
        stop = min(start + width, parameter.long)
        u = rule.columns(start, stop).reference(grads[:, :, start:stop].to(features.dtype)).flatten(1)  # (N, S·width)
        index = global_index(parameter, start, stop, grads.device).flatten()
        if projection.kind == "identity":
            features[:, index] += u
        elif projection.kind == "sjlt":
            _sjlt(features, u, index, projection)
        else:
            columns = dense_columns(index, projection, features.dtype)
            features.addmm_(u, columns, alpha=projection.scale)


def dense_columns(index: Tensor, projection: Projection, dtype: torch.dtype) -> Tensor:
    """Columns of sqrt(K)·Pi for ``rademacher`` and ``gaussian``: (n, K)."""
    generate = philox.rademacher_columns if projection.kind == "rademacher" else philox.gaussian_columns
    return generate(index, projection.dim, projection.seed, dtype)


def _sjlt(features: Tensor, u: Tensor, index: Tensor, projection: Projection) -> None:
    buckets, bits = philox.sjlt_columns(index, projection.dim, projection.nnz, projection.seed)
    scale = (1 - 2 * bits.to(u.dtype)) / math.sqrt(projection.nnz)
    for t in range(projection.nnz):
        features.index_add_(1, buckets[:, t], u * scale[:, t])


def _srht(
    features: Tensor, grads: Tensor, parameter: Parameter, run_base: int, projection: Projection, rule: Rule
) -> None:
    block, slots, short = projection.block, projection.slots, parameter.short
    n_runs = -(-parameter.long // block)
    per_run = max(1, grads.shape[0]) * short * block
    step = max(1, _TEMPORARY // per_run)
    slotted = features.unflatten(1, (slots, block))
    for q in range(0, n_runs, step):
        count = min(step, n_runs - q)
        start, stop = q * block, min((q + count) * block, parameter.long)
        u = rule.columns(start, stop).reference(grads[:, :, start:stop].to(features.dtype))
        u = torch.nn.functional.pad(u, (0, count * block - (stop - start)))
        runs = u.unflatten(2, (count, block)).transpose(1, 2)  # (N, count, S, B), in order of rho
        rho = run_base + torch.arange(q * short, (q + count) * short, device=grads.device, dtype=torch.int64)
        signs_in = philox.signs(rho, block, TAG_SRHT_IN, projection.seed, u.dtype)  # (count·S, B)
        signs_out = philox.signs(rho, block, TAG_SRHT_OUT, projection.seed, u.dtype)
        mixed = hadamard(runs.flatten(1, 2) * signs_in) * signs_out / math.sqrt(block)
        slotted.index_add_(1, rho % slots, mixed)
