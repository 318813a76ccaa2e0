"""How fast is each flat projection on gradients that exist, beside a copy of them and torch's dense product?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_dense import dense_projection
from gpu_session import ASSUMED_BYTES_PER_S, ASSUMED_FLOPS_PER_S, Bar, Session, Work, median_ratio, must_agree
from torch import Tensor

from less_fast import Projection, project
from less_fast.errors import LessFastError
from less_fast.layout import ParameterLayout
from less_fast.ops.accumulate import accumulate_cost
from less_fast.ops.philox import sjlt_columns
from less_fast.ops.rule import NONE

N, P, K = 16, 1 << 27, 8192  # P: LoRA of rank 128 on q, k, v and o of Llama-2-7B
KINDS, DTYPES = ("srht", "sjlt", "rademacher"), (torch.bfloat16, torch.float32)
# Least share of the copy ceiling, counting the matrix once; rademacher: least factor over torch's product.
LEAST_SHARE = {"srht": 0.7, "sjlt": 0.5}
LEAST_FACTOR = 3.0
_COLUMNS_CHECKED = 1 << 16
_CHUNK = 1 << 22


def estimate(session: Session) -> float:
    """All kinds in both dtypes."""
    return sum(_seconds(session, kind, dtype) for kind in KINDS for dtype in DTYPES)


def _seconds(session: Session, kind: str, dtype: torch.dtype) -> float:
    """Making and checking take 3 s; torch's dense product moves each of its P·K signs five times, repeats + 2 times."""
    if session.tiny:
        return 0.0
    signs = _columns(P, kind, dtype) * K if kind == "rademacher" else 0
    dense = 5.0 * dtype.itemsize * signs / ASSUMED_BYTES_PER_S + 2.0 * N * signs / ASSUMED_FLOPS_PER_S
    return 3.0 + (session.repeats + 2) * 1.25 * dense


def _columns(size: int, kind: str, dtype: torch.dtype) -> int:
    """P; an eighth of it where torch's baseline would take tens of seconds a call, whose time is linear in P."""
    return size // 8 if kind == "rademacher" and dtype == torch.float32 else size


def run(session: Session) -> None:
    """Both dtypes, every kind, every backend of the device."""
    n, size, dim = (3, 5000, 128) if session.tiny else (N, P, K)
    for dtype in DTYPES:
        generator = torch.Generator(session.device).manual_seed(4)
        grads = torch.randn(n, size, generator=generator, device=session.device, dtype=dtype)
        for kind in KINDS:
            if session.fits(f"sketch {kind} {dtype}", _seconds(session, kind, dtype)):
                with session.attempt(f"sketch {kind} {dtype}"):
                    _measure(session, grads[:, : _columns(size, kind, dtype)].contiguous(), Projection(kind, dim))
        del grads
        session.release()


def _measure(session: Session, grads: Tensor, projection: Projection) -> None:
    n, size = grads.shape
    shape = f"{n} x {size} to {projection.dim}"
    dtype = str(grads.dtype).removeprefix("torch.")
    run_of: dict[str, Any] = {}
    errors: dict[str, float] = {}
    for backend in ("triton", "cuda") if session.cuda else ("cpu", "reference"):
        try:
            project(grads[:, :64], projection, backend=backend)
        except LessFastError as reason:
            session.skip(f"sketch {projection.kind} {dtype} on {backend}", str(reason))
            continue
        with session.attempt(f"sketch {projection.kind} {dtype} on {backend}"):
            errors[backend] = max(_check(grads, projection, backend))
            run_of[backend] = lambda i, backend=backend: project(grads, projection, backend=backend)
    if not run_of:
        return
    dense = projection.kind == "rademacher"
    if dense:
        baseline, run_of["torch dense"] = "torch dense", lambda i: dense_projection(grads, projection.dim)
    else:
        target = torch.empty_like(grads)
        baseline, run_of["torch copy"] = "torch copy", lambda i: target.copy_(grads)
    seconds = session.interleaved(run_of)
    read = grads.numel() * grads.dtype.itemsize
    out = 4 * n * projection.dim
    flops, _ = accumulate_cost(n, ParameterLayout.flat(size).parameters[0], projection, NONE)
    rows = []
    for name, times in seconds.items():
        ours = name in errors
        ratio = median_ratio(seconds, name, baseline)
        share = read / sorted(times)[len(times) // 2] / session.ceilings.bytes_per_s
        bar = None
        if ours and dense:
            bar = Bar("x faster than torch dense", 1 / ratio, LEAST_FACTOR, at_least=True)
        elif ours:
            bar = Bar("share of copy bandwidth", share, LEAST_SHARE[projection.kind], at_least=True)
        work = Work(2 * read, 0) if name == "torch copy" else Work(read + out, flops if dense else 0)
        rows.append(
            session.row(
                f"sketch {projection.kind}",
                name,
                times,
                shape=shape,
                dtype=dtype,
                work=work,
                baseline=baseline,
                ratio_to_baseline=ratio,
                bar=bar,
                examples=n,
                share_of_copy=share,
                check_error=errors.get(name),
            )
        )
    session.write("sketch", rows)


def _check(grads: Tensor, projection: Projection, backend: str) -> Iterator[float]:
    """Against the definition: some columns of every row in float64, and all of the last row where that is quick."""
    same = partial(project, projection=projection)
    name = f"{projection.kind} on {backend}"
    part = grads[:, :_COLUMNS_CHECKED]
    yield must_agree(name, same(part, backend=backend), same(part.double(), backend="reference"))
    whole = same(grads, backend=backend)
    if not torch.equal(whole, same(grads, backend=backend)):
        raise AssertionError(f"{name} gives other bits when called again")
    if projection.kind != "rademacher":
        yield must_agree(f"{name}, last row", whole[-1], _sketch_of_row(grads[-1].float(), projection))


def _sketch_of_row(row: Tensor, projection: Projection) -> Tensor:
    """The definition for one long row; the reference backend would cut an sjlt of so many columns too finely."""
    if projection.kind == "srht":
        return project(row[None], projection, backend="reference")[0]
    out = torch.zeros(projection.dim, device=row.device, dtype=torch.float64)
    for start in range(0, len(row), _CHUNK):
        values = row[start : start + _CHUNK].double()
        index = torch.arange(start, start + len(values), device=row.device)
        buckets, negative = sjlt_columns(index, projection.dim, projection.nnz, projection.seed)
        signed = values[:, None] * (1 - 2 * negative.double()) / projection.nnz**0.5
        out.index_add_(0, buckets.flatten(), signed.flatten())
    return out
