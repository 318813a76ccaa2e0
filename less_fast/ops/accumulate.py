"""``accumulate``: add the sketch of one parameter's preconditioned per-example gradients to the features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.layout import Parameter
from less_fast.ops import cpu, cuda, triton
from less_fast.ops.reference import accumulate_reference
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection

Accumulate = Callable[[Tensor, Tensor, Parameter, int, Projection, Rule], None]


class Backend(NamedTuple):
    """``supports(features, grads, projection, rule)`` answers None or a reason; ``run`` is the operation."""

    supports: Callable[[Tensor, Tensor, Projection, Rule], str | None]
    run: Accumulate


# "auto" takes the first that supports the call. Triton's kernels take every kind and shape; until both have been timed
# on a GPU, those in CUDA C++ stand in where Triton is not installed, or are asked for by name.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton.supports, triton.accumulate_triton),
    "cuda": Backend(cuda.supports, cuda.accumulate_cuda),
    "cpu": Backend(cpu.supports, cpu.accumulate_cpu),
    "reference": Backend(lambda features, grads, projection, rule: None, accumulate_reference),
}


def resolve(features: Tensor, grads: Tensor, projection: Projection, backend: str = "auto", rule: Rule = NONE) -> str:
    """The name of the backend that will run the call.

    Raises UnsupportedBackendError, with the reason, where an explicitly requested backend cannot.
    """
    if backend != "auto":
        if backend not in BACKENDS:
            raise LessFastError(f"backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
        reason = BACKENDS[backend].supports(features, grads, projection, rule)
        if reason is not None:
            raise UnsupportedBackendError(f"backend {backend!r} cannot run this call: {reason}")
        return backend
    return next(name for name, entry in BACKENDS.items() if entry.supports(features, grads, projection, rule) is None)


def accumulate(
    features: Tensor,
    grads: Tensor,
    parameter: Parameter,
    run_base: int,
    projection: Projection,
    rule: Rule = NONE,
    *,
    backend: str = "auto",
) -> None:
    """Features += Pi · rule(grads), the columns of Pi being those of ``parameter``.

    Parameters
    ----------
    features : (N, K), rows contiguous; float32 for the fast backends, any floating dtype for the reference.
    grads : (N, S, L): the gradients of N examples with the parameter's short side first; (S, L) contiguous. Of any
        floating dtype that the backend takes: ``cpu`` float32, backends on GPUs also float16 and bfloat16.
    run_base : number of the parameter's first run (``ParameterLayout.run_bases``); used by ``srht`` only.
    rule : the preconditioner; its tables are (S, L) on the gradients' device.
    backend : ``auto`` takes the fastest that supports the call.

    Additions to each feature happen in an order that depends on nothing but the arguments, so equal calls give
    equal bits. Sources: docs/projections.md.
    """
    n, short, long = grads.shape
    if (short, long) != (parameter.short, parameter.long):
        raise LessFastError(
            f"gradients of {parameter.name} have shape {tuple(grads.shape)}; "
            f"expected (N, {parameter.short}, {parameter.long})"
        )
    if features.shape != (n, projection.dim):
        raise LessFastError(f"features have shape {tuple(features.shape)}; expected ({n}, {projection.dim})")
    if not features.stride(1) == 1 or not (grads.stride(2) == 1 and (short == 1 or grads.stride(1) == long)):
        raise LessFastError(f"features or gradients of {parameter.name} are not contiguous in their last dimensions")
    if rule.kind == "adam":
        check_tables(rule, (short, long), grads.device)
    if n == 0:
        return
    with torch.no_grad():
        name = resolve(features, grads, projection, backend, rule)
        BACKENDS[name].run(features, grads, parameter, run_base, projection, rule)


def check_tables(rule: Rule, shape: tuple[int, int], device: torch.device) -> None:
    """Raise LessFastError unless Adam's tables are float32 (S, L), contiguous and on the device."""
    for name, table in (("a", rule.a), ("b", rule.b)):
        if table is None or table.shape != shape or table.dtype != torch.float32:
            found = "missing" if table is None else f"{table.dtype} {tuple(table.shape)}"
            raise LessFastError(f"Adam's table {name} is {found}; expected float32 {shape}")
        if table.device != device or not table.is_contiguous():
            raise LessFastError(f"Adam's table {name} is on {table.device}; expected it contiguous on {device}")


def accumulate_cost(n: int, parameter: Parameter, projection: Projection, rule: Rule) -> tuple[int, int]:
    """(floating-point operations, least bytes moved) of one call with float32 gradients and tables."""
    entries = n * parameter.size
    per_entry = {
        "identity": 1,
        "sjlt": projection.nnz,
        "srht": projection.block.bit_length() + 1,
        "rademacher": 2 * projection.dim,
        "gaussian": 2 * projection.dim,
    }[projection.kind]
    flops = entries * (per_entry + (8 if rule.kind == "adam" else 0))
    tables = 8 * parameter.size if rule.kind == "adam" else 0
    return flops, 4 * entries + tables + 8 * n * projection.dim
