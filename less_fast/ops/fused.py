"""The fused form of ``outer_sketch`` on CUDA devices: gradient, rule and sketch in one Triton kernel."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops.rule import Rule
from less_fast.ops.triton import too_old
from less_fast.projection import Projection
from less_fast.segments import Segments

# Partial sums of (N, K) that may exist at a time; plans of unusual ranks need one per short index.
MAX_LANES = 64
# Where Adam's update may be larger, sjlt's unit would be coarse for the others; real states stay below 100.
MAX_BOUND = 1024.0

Prepared = Tensor | float | None


def refuses(device: torch.device, parameter: Parameter, projection: Projection) -> str | None:
    """None where the fused kernel can take this matrix on this device, else the reason why not."""
    if device.type != "cuda":
        return f"the tensors are on {device}, and the fused kernel runs on CUDA devices"
    if projection.kind not in ("srht", "sjlt"):
        return f"the projection is {projection.kind}, and the fused kernels make srht and sjlt"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'less_fast[triton]'"
    if (old := too_old(device)) is not None:
        return old
    from less_fast.kernels import outer_sketch as kernels

    reason = kernels.refuses(parameter.short, parameter.long)
    if reason is None and projection.kind == "srht":
        reason = kernels.refuses_block(projection.block)
    if reason is None and lanes(parameter, projection) > MAX_LANES:
        return f"a rank of {parameter.short} needs more than {MAX_LANES} partial sums of {projection.dim} features"
    return reason


def refuses_call(
    left: Tensor, right: Tensor, projection: Projection, rule: Rule, prepared: Prepared = None
) -> str | None:
    """None where the kernel can take these operands and this rule, else the reason why not."""
    if left.dtype != right.dtype or left.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the operands are {left.dtype} and {right.dtype}; the fused kernels take one of bf16, fp16, fp32"
    if projection.kind == "sjlt" and rule.kind == "adam":
        if rule.gamma <= 0:
            return "Adam's update has no bound without a second moment (beta2 = 1), which fixed point needs"
        if isinstance(prepared, float) and prepared > MAX_BOUND:
            return f"an update may be as large as {prepared:.0f}, beside which fixed point loses small ones"
    return None


def lanes(parameter: Parameter, projection: Projection) -> int:
    """Partial sums (N, K) that the kernel adds this matrix to."""
    if projection.kind == "sjlt":
        return 1
    from less_fast.kernels import outer_sketch as kernels

    return kernels.plan(parameter.short, parameter.long, projection.dim, projection.block).lanes


def prepare(parameter: Parameter, run_base: int, projection: Projection, rule: Rule, device: torch.device) -> Prepared:
    """What the kernel needs to know of a matrix, made once.

    ``srht``: packed sign bits, 2 a gradient entry for blocks of 32 and more. ``sjlt`` with Adam: a bound on updates.
    """
    from less_fast.kernels.outer_sjlt import update_bound
    from less_fast.kernels.outer_sketch import sign_table

    if projection.kind == "srht":
        return sign_table(run_base, parameter.runs(projection.block), projection.block, projection.seed, device)
    if rule.a is None or rule.b is None or rule.gamma <= 0:
        return None
    return update_bound(rule.a, rule.b, rule.alpha, rule.gamma, rule.e)


def outer_sketch_triton(
    lanes: Tensor,
    left: Tensor,
    right: Tensor,
    segments: Segments,
    parameter: Parameter,
    run_base: int,
    projection: Projection,
    rule: Rule,
    prepared: Prepared,
) -> None:
    """Lanes (W, N, K) += sketch of rule(left ᵀ right of each segment); operands as for ``outer_sketch``."""
    if prepared is None:
        prepared = prepare(parameter, run_base, projection, rule, lanes.device)
    from less_fast.kernels.outer_sjlt import outer_sjlt
    from less_fast.kernels.outer_sketch import outer_sketch

    if right.stride(1) != 1:
        right = right.contiguous()
    operands = left.contiguous(), right, segments.table[0], segments.table[1]
    update = rule.code, rule.a, rule.b, rule.alpha, rule.gamma, rule.e
    if projection.kind == "sjlt":
        place = parameter.offset, parameter.short_stride, parameter.long_stride
        outer_sjlt(lanes[0], *operands, *place, projection.nnz, projection.seed, *update, prepared)
    else:
        outer_sketch(lanes, *operands, prepared, run_base, projection.block, *update)
