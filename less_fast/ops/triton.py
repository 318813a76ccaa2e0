"""The ``triton`` backend: launches the kernels of less_fast.kernels on CUDA tensors."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops.reference import accumulate_reference
from less_fast.ops.rule import Rule
from less_fast.projection import Projection


def supports(features: Tensor, grads: Tensor, projection: Projection) -> str | None:
    """None where this backend can run the call, else the reason why not."""
    for name, tensor in (("features", features), ("gradients", grads)):
        if tensor.device.type != "cuda":
            return f"{name} are on {tensor.device}, and this backend runs on CUDA devices"
        if tensor.dtype != torch.float32:
            return f"{name} are {tensor.dtype}, and this backend adds up in float32"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'less_fast[triton]'"
    from less_fast.kernels.accumulate import MAX_BLOCK, MAX_ENTRIES

    if grads[0].numel() > MAX_ENTRIES:
        return f"a gradient has {grads[0].numel()} entries, and this backend numbers up to {MAX_ENTRIES}"
    if projection.kind == "srht" and projection.block > MAX_BLOCK:
        return f"block is {projection.block}, and this backend mixes runs of up to {MAX_BLOCK}"
    return None


def accumulate_triton(
    features: Tensor, grads: Tensor, parameter: Parameter, run_base: int, projection: Projection, rule: Rule
) -> None:
    """Features (N, K) += sketch of rule(grads): float32, rows of features contiguous, each example's (S, L) too."""
    if projection.kind == "identity":  # a copy: nothing to fuse
        accumulate_reference(features, grads, parameter, run_base, projection, rule)
        return
    from less_fast.kernels import accumulate as kernels
    from less_fast.kernels.sjlt import accumulate_sjlt

    update: dict[str, Any] = {
        "mode": rule.code,
        "table_a": rule.a,
        "table_b": rule.b,
        "alpha": rule.alpha,
        "gamma": rule.gamma,
        "e": rule.e,
    }
    strides = parameter.offset, parameter.short_stride, parameter.long_stride
    if projection.kind == "srht":
        kernels.accumulate_srht(features, grads, run_base, projection.block, projection.seed, **update)
    elif projection.kind == "sjlt":
        accumulate_sjlt(features, grads, *strides, projection.nnz, projection.seed, **update)
    else:
        kernels.accumulate_dense(features, grads, *strides, projection.seed, projection.kind, **update)
