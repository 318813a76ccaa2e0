"""How fast are products of stored codes with queries, beside unpacking them to float32 and multiplying in torch?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gpu_session import Bar, Session, Work, median_ratio, must_agree
from torch import Tensor

from less_fast.ops import device_products as products

N, DIM = 1 << 17, 8192  # 128 MiB of bits, 4 GiB of float32: more than any L2 cache
QUERIES = (1, 9, 57, 285)  # one; the subtasks of BBH and MMLU in part and whole; every example of BBH, MMLU and TyDiQA
HOST_ROWS = 1 << 14
HOST_QUERIES = 57
# Of products in float64. Those of bits with bits are exact.
TOLERANCE = 1e-5
_ROWS_AT_ONCE = 1 << 14  # that the baseline has in float32
_ROWS_CHECKED = 512


@dataclass(frozen=True)
class Case:
    """Codes of one dtype with float32 queries, or bits with bits."""

    dtype: str
    bits: bool = False

    def __str__(self) -> str:
        return "1bit x 1bit" if self.bits else self.dtype


CASES = [*map(Case, products.TORCH_DTYPES), Case("1bit", bits=True)]


def estimate(session: Session) -> float:
    """Two kernels a case to compile; the products themselves last milliseconds."""
    return 0.0 if session.tiny else 5.0 * len(CASES)


def run(session: Session) -> None:
    """Codes on the device in every dtype, and then int8 codes in host memory."""
    n, dim = (37, 72) if session.tiny else (N, DIM)
    for case in CASES:
        if session.fits(f"score {case}", estimate(session) / len(CASES)):
            with session.attempt(f"score {case}"):
                codes = random_codes(session.device, case.dtype, n, dim)
                for count in QUERIES[:2] if session.tiny else QUERIES:
                    _measure(session, case, codes, dim, count)
            codes = torch.empty(0)
        session.release()
    if session.cuda:
        with session.attempt("score from host memory"):
            _measure_host(session, HOST_ROWS, dim, HOST_QUERIES)


def random_codes(device: torch.device, dtype: str, n: int, dim: int) -> Tensor:
    """Codes as rows of a store of ``dtype`` have them."""
    generator = torch.Generator(device).manual_seed(5)
    if dtype == "1bit":
        return torch.randint(0, 256, (n, -(-dim // 8)), generator=generator, device=device, dtype=torch.uint8)
    if dtype == "int8":
        return torch.randint(-127, 128, (n, dim), generator=generator, device=device, dtype=torch.int8)
    return torch.randn(n, dim, generator=generator, device=device, dtype=products.TORCH_DTYPES[dtype])


def unpacked(codes: Tensor, values: Tensor, factor: Tensor, out: Tensor) -> None:
    """The baseline: float32 codes in memory, some rows at a time, times the queries' ``values`` (Q, K)."""
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        torch.matmul(products.code_values(codes[rows], values.shape[1], torch.float32), values.T, out=out[rows])
    out.mul_(factor[:, None])


def _measure(session: Session, case: Case, codes: Tensor, dim: int, count: int) -> None:
    n, device = len(codes), session.device
    random = np.random.default_rng(6)
    queries: products.Queries
    if case.bits:
        packed = random.integers(0, 256, (count, -(-dim // 8)), np.uint8)
        values = products.code_values(torch.from_numpy(packed).to(device), dim, torch.float32)
    else:
        floats = random.standard_normal((count, dim), np.float32)
        values = torch.from_numpy(floats).to(device)
    factor, out = torch.rand(n, device=device), torch.empty(n, count, device=device)
    run_of: dict[str, Callable[[int], None]] = {"torch, unpacked": lambda i: unpacked(codes, values, factor, out)}
    if session.cuda:
        queries = (
            products.DeviceBits(packed, np.ones(count, np.float32), dim, device)
            if case.bits
            else products.DeviceQueries(floats, device)
        )
        run_of["less_fast"] = lambda i: products.device_inner_products(codes, case.dtype, dim, queries, factor, out)
    errors = {}
    checked = torch.arange(0, n, max(1, n // _ROWS_CHECKED), device=device)
    exact = products.code_values(codes[checked], dim, torch.float64) @ values.double().T * factor[checked, None]
    for name, call in run_of.items():
        out.fill_(torch.nan)
        call(0)
        errors[name] = must_agree(f"{case}, {count} queries, {name}", out[checked], exact, TOLERANCE)
        first = out.clone()
        call(0)
        if name == "less_fast" and not torch.equal(first, out):
            raise AssertionError(f"{case}, {count} queries: other bits when called again")
    seconds = session.interleaved(run_of)
    flops, n_bytes = products.device_inner_products_cost(n, case.dtype, dim, count)
    judged = "less_fast" if session.cuda else "torch, unpacked"
    rows = []
    for name, times in seconds.items():
        ratio = median_ratio(seconds, name, "torch, unpacked")
        rows.append(
            session.row(
                f"score {case}",
                name,
                times,
                shape=f"{n} x {dim}, {count} queries",
                dtype=case.dtype,
                work=Work(n_bytes, flops),
                baseline="torch, unpacked",
                ratio_to_baseline=ratio,
                bar=Bar("of torch, unpacked", ratio, 1.0) if name == judged else None,
                examples=n,
                check_error=errors[name],
            )
        )
    session.write("score", rows)


def _measure_host(session: Session, n: int, dim: int, count: int) -> None:
    """Against copying as many bytes from pinned memory."""
    codes = random_codes(torch.device("cpu"), "int8", n, dim)
    floats = np.random.default_rng(6).standard_normal((count, dim), np.float32)
    factor, out = np.ones(n, np.float32), np.empty((n, count), np.float32)
    host = products.HostProducts(products.DeviceQueries(floats, session.device))

    def add(i: int) -> None:
        host.add(codes.numpy(), "int8", dim, factor, out, accumulate=False)

    add(0)
    exact = codes[:_ROWS_CHECKED].double() @ torch.from_numpy(floats).double().T
    error = must_agree("codes in host memory", torch.from_numpy(out[:_ROWS_CHECKED]), exact, TOLERANCE)
    pinned, target = codes.pin_memory(), torch.empty_like(codes, device=session.device)
    seconds = session.interleaved({"less_fast": add, "torch copy": lambda i: target.copy_(pinned)}, calls=1)
    flops, n_bytes = products.device_inner_products_cost(n, "int8", dim, count)
    rows = [
        session.row(
            "score from host memory",
            name,
            times,
            shape=f"{n} x {dim}, {count} queries",
            dtype="int8",
            work=Work(n_bytes, flops),
            baseline="torch copy",
            ratio_to_baseline=median_ratio(seconds, name, "torch copy"),
            examples=n,
            check_error=error if name == "less_fast" else None,
        )
        for name, times in seconds.items()
    ]
    session.write("score", rows)
