"""The ``cpu`` backend: calls into the C++ module with addresses and sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops import native
from less_fast.ops.reference import global_index
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

_ENTRIES_PER_THREAD = 1 << 17
_DENSE = {"rademacher": 0, "gaussian": 1}

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
    if projection.kind == "identity":
        index = global_index(parameter, 0, parameter.long, grads.device).flatten()
        features[:, index] += preconditioned(grads.contiguous(), rule).flatten(1)
        return
    module = _module()
    gradients = module.Gradients(grads.data_ptr(), grads.shape[0], grads.stride(0), grads.shape[1], grads.shape[2])
    target = module.Features(features.data_ptr(), features.shape[1], features.stride(0))
    call, numbers = (target, gradients, _rule(rule)), (parameter.offset, parameter.short_stride, parameter.long_stride)
    if projection.kind == "srht":
        module.accumulate_srht(*call, run_base, projection.block, projection.seed, _threads(grads))
    elif projection.kind == "sjlt":
        module.accumulate_sjlt(*call, *numbers, projection.nnz, projection.seed, _threads(grads))
    else:
        kind, threads = _DENSE[projection.kind], torch.get_num_threads()
        module.accumulate_dense(*call, kind, *numbers, projection.seed, projection.scale, threads)


def preconditioned(grads: Tensor, rule: Rule) -> Tensor:
    """rule(grads) for contiguous float32 (N, S, L)."""
    if rule.kind == "none":
        return grads
    module, out = _module(), torch.empty_like(grads)
    gradients = module.Gradients(grads.data_ptr(), grads.shape[0], grads.stride(0), grads.shape[1], grads.shape[2])
    module.precondition(out.data_ptr(), gradients, _rule(rule), _threads(grads))
    return out


def _threads(grads: Tensor) -> int:
    # Waking a thread costs as much as some 100,000 entries; the bits do not depend on the number.
    return max(1, min(torch.get_num_threads(), grads.numel() // _ENTRIES_PER_THREAD))


def _rule(rule: Rule) -> Any:
    a, b = (0, 0) if rule.a is None or rule.b is None else (rule.a.data_ptr(), rule.b.data_ptr())
    return _module().Precondition(rule.code, a, b, rule.alpha, rule.gamma, rule.e)
