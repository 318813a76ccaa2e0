"""The ``triton`` backend: launches the kernels of less_fast.kernels on CUDA tensors."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops.reference import accumulate_reference
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of gradients


def supports(features: Tensor, grads: Tensor, projection: Projection, rule: Rule = NONE) -> str | None:
    """None where this backend can run the call, else the reason why not."""
    for name, tensor in (("features", features), ("gradients", grads)):
        if tensor.device.type != "cuda":
            return f"{name} are on {tensor.device}, and this backend runs on CUDA devices"
    if features.dtype != torch.float32 or grads.dtype not in DTYPES:
        return f"{features.dtype} features of {grads.dtype} gradients: it adds float32, float16 or bfloat16 to float32"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'less_fast[triton]'"
    if (reason := too_old(grads.device)) is not None:
        return reason
    from less_fast.kernels.accumulate import MAX_ENTRIES, MAX_MATRIX_ENTRIES
    from less_fast.kernels.srht import MAX_BLOCK

    _, short, long = grads.shape
    most = MAX_ENTRIES if short == 1 else MAX_MATRIX_ENTRIES
    if short * long > most:
        return f"a gradient ({short}, {long}) has more entries than the {most} that this backend numbers"
    if projection.kind == "srht" and projection.block > MAX_BLOCK:
        return f"block is {projection.block}, and this backend mixes runs of up to {MAX_BLOCK}"
    return None


@functools.cache
def too_old(device: torch.device) -> str | None:
    """None where the device has the instructions that the kernels are compiled to, else the reason why not."""
    if device.type != "cuda" or not torch.cuda.is_available():  # tests ask on behalf of a device that is not there
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80, which the Triton kernels need"
    return None


def accumulate_triton(
    features: Tensor, grads: Tensor, parameter: Parameter, run_base: int, projection: Projection, rule: Rule
) -> None:
    """Features (N, K) += sketch of rule(grads): rows of features float32, contiguous, and so each example's (S, L)."""
    if projection.kind == "identity":  # a copy: nothing to fuse
        accumulate_reference(features, grads, parameter, run_base, projection, rule)
        return
    from less_fast.kernels.dense import accumulate_dense
    from less_fast.kernels.sjlt import accumulate_sjlt
    from less_fast.kernels.srht import accumulate_srht

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
        accumulate_srht(features, grads, run_base, projection.block, projection.seed, **update)
    elif projection.kind == "sjlt":
        accumulate_sjlt(features, grads, *strides, projection.nnz, projection.seed, **update)
    else:
        accumulate_dense(features, grads, *strides, projection.seed, projection.kind, scale=projection.scale, **update)
