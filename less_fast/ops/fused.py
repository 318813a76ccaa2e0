"""The fused form of ``outer_sketch`` on CUDA devices: gradient, rule and sketch in one Triton kernel."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from less_fast.layout import Parameter
from less_fast.ops.rule import Rule
from less_fast.projection import Projection
from less_fast.segments import Segments

# Partial sums of (N, K) that may exist at a time; plans of unusual ranks need one per short index.
MAX_LANES = 64


def refuses(device: torch.device, parameter: Parameter, projection: Projection) -> str | None:
    """None where the fused kernel can take this matrix on this device, else the reason why not."""
    if device.type != "cuda":
        return f"the tensors are on {device}, and the fused kernel runs on CUDA devices"
    if projection.kind != "srht":
        return f"the projection is {projection.kind}, and the fused kernel makes srht"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'less_fast[triton]'"
    from less_fast.kernels import outer_sketch as kernels

    reason = kernels.refuses(parameter.short, parameter.long, projection.block)
    if reason is None and lanes(parameter, projection) > MAX_LANES:
        return f"a rank of {parameter.short} needs more than {MAX_LANES} partial sums of {projection.dim} features"
    return reason


def refuses_operands(left: Tensor, right: Tensor) -> str | None:
    """None where the kernel can multiply these operands, else the reason why not."""
    if left.dtype != right.dtype or left.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the operands are {left.dtype} and {right.dtype}; the fused kernel takes one of bf16, fp16, fp32"
    return None


def lanes(parameter: Parameter, projection: Projection) -> int:
    """Partial sums (N, K) that the kernel adds this matrix to."""
    from less_fast.kernels import outer_sketch as kernels

    return kernels.plan(parameter.short, parameter.long, projection.dim, projection.block).lanes


def sign_table(parameter: Parameter, run_base: int, projection: Projection, device: torch.device) -> Tensor:
    """The matrix's packed sign bits: 2 bits a gradient entry for blocks of 32 and more."""
    from less_fast.kernels import outer_sketch as kernels

    return kernels.sign_table(run_base, parameter.runs(projection.block), projection.block, projection.seed, device)


def outer_sketch_triton(
    lanes: Tensor,
    left: Tensor,
    right: Tensor,
    segments: Segments,
    parameter: Parameter,
    run_base: int,
    projection: Projection,
    rule: Rule,
    signs: Tensor | None,
) -> None:
    """Lanes (W, N, K) += sketch of rule(left ᵀ right of each segment); operands as for ``outer_sketch``."""
    from less_fast.kernels import outer_sketch as kernels

    if signs is None:
        signs = sign_table(parameter, run_base, projection, lanes.device)
    if right.stride(1) != 1:
        right = right.contiguous()
    kernels.outer_sketch(
        lanes,
        left.contiguous(),
        right,
        segments.table[0],
        segments.table[1],
        signs,
        run_base,
        projection.block,
        rule.code,
        rule.a,
        rule.b,
        rule.alpha,
        rule.gamma,
        rule.e,
    )
