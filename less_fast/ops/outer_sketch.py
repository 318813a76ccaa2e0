"""``outer_sketch``: from a Linear's input and output gradient to the sketch of each example's updated gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.layout import Parameter, ParameterLayout
from less_fast.ops import fused
from less_fast.ops.accumulate import accumulate, check_tables
from less_fast.ops.outer import Scratch, outer_products
from less_fast.ops.rule import NONE, Rule
from less_fast.projection import Projection
from less_fast.segments import Segments

# Float32 entries of per-example gradients that exist at a time where they are written out, whatever N is.
_BUFFER = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class Target:
    """What one matrix's gradients are added to: ``lanes`` (W, N, K) float32, W >= ``lanes_needed``.

    ``run_base``: number of the matrix's first run. ``prepared``: from :func:`prepare`, or None to make it each time.
    """

    lanes: Tensor
    run_base: int
    projection: Projection
    rule: Rule = NONE
    prepared: fused.Prepared = None


def outer_sketch(
    lanes: Tensor,
    left: Tensor,
    right: Tensor,
    segments: Segments,
    parameter: Parameter,
    run_base: int,
    projection: Projection,
    rule: Rule = NONE,
    *,
    backend: str = "auto",
) -> None:
    """Lanes += Pi · rule(G_n), G_n = Σ_t left[t] right[t]ᵀ over the tokens of example n; features are the sum of lanes.

    Parameters
    ----------
    lanes : float32 (W, N, K), contiguous, W >= :func:`lanes_needed`: partial sums, so that no two programs of a GPU
        ever add to the same number. Only their sum (:func:`sum_lanes`) means anything.
    left, right : (tokens, S) and (tokens, L), one of them the Linear's input and the other its output gradient.
        Where ``segments`` are padded rows, one of the two must be zero behind each row's tokens.
    parameter, run_base, projection, rule : as for ``accumulate``.
    backend : ``auto`` or one by name. On CUDA, ``triton`` writes no gradient to memory where its fused kernel
        can take the call (:func:`why_not_fused`), and a bounded number of them otherwise.

    Raises
    ------
    LessFastError
        for shapes that do not fit. UnsupportedBackendError where a backend asked for by name cannot run.
    """
    outer_sketches([Target(lanes, run_base, projection, rule)], left, right, segments, parameter, backend=backend)


def outer_sketches(
    targets: Sequence[Target],
    left: Tensor,
    right: Tensor,
    segments: Segments,
    parameter: Parameter,
    *,
    backend: str = "auto",
    scratch: Scratch | None = None,
) -> None:
    """:func:`outer_sketch` of the same gradients into several targets; those written out are made once for all."""
    _check(targets, left, right, segments, parameter)
    if not len(segments):
        return
    with torch.no_grad():
        written = []
        for target in targets:
            if backend in ("auto", "triton") and why_not_fused(target, left, right, parameter) is None:
                place = parameter, target.run_base, target.projection, target.rule, target.prepared
                fused.outer_sketch_triton(target.lanes, left, right, segments, *place)
            else:
                written.append(target)
        if written:
            outer_sketch_reference(written, left, right, segments, parameter, backend, scratch or Scratch(left.device))


def outer_sketch_reference(
    targets: Sequence[Target],
    left: Tensor,
    right: Tensor,
    segments: Segments,
    parameter: Parameter,
    backend: str,
    scratch: Scratch,
) -> None:
    """The definition: write the gradients of a few examples at a time, then ``accumulate`` them into lane 0."""
    dtype = targets[0].lanes.dtype
    chunk = max(1, _BUFFER.get(left.device.type, _BUFFER["cpu"]) // parameter.size)
    for start in range(0, len(segments), chunk):
        stop = min(start + chunk, len(segments))
        grads = scratch.take((stop - start, parameter.short, parameter.long), dtype)
        outer_products(left, right, segments, start, stop, grads)
        for t in targets:
            features = t.lanes[0, start:stop]
            accumulate(features, grads, parameter, t.run_base, t.projection, t.rule, backend=backend)


def why_not_fused(target: Target, left: Tensor, right: Tensor, parameter: Parameter) -> str | None:
    """None where the gradients of this call are never written to memory, else the reason why they are."""
    reason = fused.refuses(left.device, parameter, target.projection) or fused.refuses_call(
        left, right, target.projection, target.rule, target.prepared
    )
    if reason is None and target.lanes.dtype != torch.float32:
        return f"lanes are {target.lanes.dtype}, and the fused kernels add up in float32"
    if reason is None and target.lanes.shape[0] < fused.lanes(parameter, target.projection):
        return f"there are {target.lanes.shape[0]} lanes, fewer than lanes_needed says"
    return reason


def lanes_needed(
    layout: ParameterLayout, projection: Projection, device: torch.device, *, backend: str = "auto"
) -> int:
    """W of the lanes for all matrices of a layout: 1 where gradients are written out anyway."""
    if backend not in ("auto", "triton"):
        return 1
    fits = [p for p in layout.parameters if fused.refuses(device, p, projection) is None]
    return max((fused.lanes(p, projection) for p in fits), default=1)


def prepare(
    parameter: Parameter,
    run_base: int,
    projection: Projection,
    rule: Rule,
    device: torch.device,
    *,
    backend: str = "auto",
) -> fused.Prepared:
    """``Target.prepared`` of a matrix, where the fused kernel will want it; waits for the device."""
    if backend not in ("auto", "triton") or fused.refuses(device, parameter, projection) is not None:
        return None
    return fused.prepare(parameter, run_base, projection, rule, device)


def sum_lanes(lanes: Tensor) -> Tensor:
    """The features (N, K): lanes (W, N, K) added up in order; never a view of several lanes' memory."""
    features = lanes[0] if lanes.shape[0] == 1 else lanes[0].clone()
    for lane in lanes[1:]:
        features += lane
    return features


def outer_sketch_cost(
    tokens: int, n: int, parameter: Parameter, projection: Projection, rule: Rule, item_size: int = 2
) -> tuple[int, int]:
    """(floating-point operations, least bytes moved) of one call with operands of ``item_size`` bytes."""
    mixing = {"srht": projection.block.bit_length() + 1, "sjlt": projection.nnz, "identity": 1}
    per_entry = mixing.get(projection.kind, 2 * projection.dim) + (8 if rule.kind == "adam" else 0)
    flops = 2 * tokens * parameter.size + n * parameter.size * per_entry
    tables = 8 * parameter.size if rule.kind == "adam" else 0
    return flops, item_size * tokens * (parameter.short + parameter.long) + tables + 8 * n * projection.dim


def _check(targets: Sequence[Target], left: Tensor, right: Tensor, segments: Segments, parameter: Parameter) -> None:
    n = len(segments)
    if left.ndim != 2 or left.shape[1] != parameter.short or right.shape != (left.shape[0], parameter.long):
        raise LessFastError(
            f"left {tuple(left.shape)} and right {tuple(right.shape)} do not fit {parameter.name}; "
            f"expected (tokens, {parameter.short}) and (tokens, {parameter.long})"
        )
    if segments.row_length is not None and n * segments.row_length != left.shape[0]:
        raise LessFastError(f"{n} rows of {segments.row_length} tokens were announced, but there are {left.shape[0]}")
    if segments.end > left.shape[0]:
        raise LessFastError(f"the segments end at token {segments.end}, but there are {left.shape[0]} tokens")
    for target in targets:
        if target.lanes.ndim != 3 or target.lanes.shape[1:] != (n, target.projection.dim):
            raise LessFastError(
                f"lanes have shape {tuple(target.lanes.shape)}; expected (W, {n}, {target.projection.dim})"
            )
        if not target.lanes.is_contiguous():
            raise LessFastError("lanes are not contiguous")
        if target.rule.kind == "adam":
            check_tables(target.rule, (parameter.short, parameter.long), left.device)
        if left.device != target.lanes.device:
            raise UnsupportedBackendError(f"lanes are on {target.lanes.device}, the operands on {left.device}")
