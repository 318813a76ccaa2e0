"""Inner products of stored codes with queries on a CUDA device, of codes that are there or that are in host memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from less_fast.errors import LessFastError, UnsupportedBackendError
from less_fast.ops.triton import too_old
from less_fast.transfer import Fetch, to_device

# The torch dtype of each store dtype's codes; those of 1bit are bytes of eight.
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "1bit": torch.uint8,
}
PART_BYTES = 32 << 20  # of codes that are on their way to the device at a time, in each of two pinned buffers
# A query's largest entry is brought below this power of two, so that no part of it overflows and none is lost.
_TOP_EXPONENT = {"float16": 15}
_LOWEST_EXPONENT = -100

Operands = tuple[Tensor, Tensor, Tensor | None]  # parts, factor and sum of every query, as the kernel takes them


def supports(device: torch.device) -> str | None:
    """None where this device can multiply codes with queries, else the reason why not."""
    if device.type != "cuda":
        return f"the device is {device}, and the kernels for stored codes run on CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'less_fast[triton]'"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"torch sees {torch.cuda.device_count()} CUDA devices, and none of that number"
    return too_old(device)


class DeviceQueries:
    """Float32 queries (Q, K), finite, on a device; cut into parts once for each store dtype they meet.

    Those for ``1bit`` codes are rotated already.
    """

    def __init__(self, queries: NDArray[np.float32], device: torch.device) -> None:
        self.shape: tuple[int, int] = (queries.shape[0], queries.shape[1])
        self.device = device
        self._queries = np.ascontiguousarray(queries, np.float32)
        self._operands: dict[str, Operands] = {}

    def operands(self, dtype: str) -> Operands:
        """What the kernel takes for codes of ``dtype``."""
        if dtype not in self._operands:
            from less_fast.kernels.inner_products import query_parts

            _, exponent = np.frexp(np.abs(self._queries).max(axis=1, initial=0.0))
            exponent = np.maximum(exponent, _LOWEST_EXPONENT) - _TOP_EXPONENT.get(dtype, 0)
            scaled = torch.from_numpy(np.ldexp(self._queries, -exponent[:, None])).to(self.device)
            factor = torch.from_numpy(np.ldexp(np.float32(1.0), exponent)).to(self.device)
            self._operands[dtype] = query_parts(scaled, TORCH_DTYPES[dtype]), factor, None
        return self._operands[dtype]


class DeviceBits:
    """1bit queries on a device: ``codes`` uint8 (Q, ceil(K / 8)), what each is to be multiplied by float32 (Q,)."""

    def __init__(self, codes: NDArray[np.uint8], factor: NDArray[np.float32], dim: int, device: torch.device) -> None:
        from less_fast.kernels.inner_products import MAX_SIGN_DIM, sign_parts

        if dim > MAX_SIGN_DIM:
            raise LessFastError(f"1bit queries have {dim} features; the device counts up to {MAX_SIGN_DIM}")
        self.shape = (len(codes), dim)
        self.device = device
        signs = code_values(torch.from_numpy(np.array(codes)).to(device), dim, torch.int8)
        parts, total = sign_parts(signs)
        self._operands = parts, torch.from_numpy(np.array(factor, np.float32)).to(device), total

    def operands(self, dtype: str) -> Operands:
        """What the kernel takes, for codes of dtype ``1bit``."""
        if dtype != "1bit":
            raise LessFastError(f"the codes are {dtype} and the queries 1bit; expected 1bit codes, or float32 queries")
        return self._operands


Queries = DeviceQueries | DeviceBits


def device_inner_products(
    codes: Tensor, dtype: str, dim: int, queries: Queries, factor: Tensor, out: Tensor, accumulate: bool = False
) -> None:
    """Out (n, Q) = factor (n,) · <code, query>, or += where ``accumulate``: float32, on the device of the queries.

    ``codes``: stored numbers of ``dtype`` (n, K), as ``TORCH_DTYPES`` has it, or for ``1bit`` bytes (n, ceil(K / 8)),
    lowest bit first, of which a set one stands for -1. With 1bit queries the query's own factor counts too. Rows of
    codes and of ``out`` are contiguous. Equal to float32 products within their rounding, exact but for the factors
    where both sides are 1bit; each code is read once, nothing is allocated, and equal calls give equal bits.

    Raises UnsupportedBackendError where :func:`supports` has a reason.
    """
    if (reason := supports(out.device)) is not None:
        raise UnsupportedBackendError(f"inner products of stored codes cannot run: {reason}")
    expected = (out.shape[0], _row_length(dtype, dim))
    if codes.dtype != TORCH_DTYPES[dtype] or tuple(codes.shape) != expected or out.shape[1:] != queries.shape[:1]:
        raise LessFastError(
            f"codes {tuple(codes.shape)} {codes.dtype} and out {tuple(out.shape)}; expected {expected} "
            f"{TORCH_DTYPES[dtype]} for {dtype} rows of {dim} features, and a column of out for each of "
            f"{queries.shape[0]} queries"
        )
    if queries.shape[1] != dim:
        raise LessFastError(f"queries have {queries.shape[1]} features and rows {dim}; expected as many")
    from less_fast.kernels.inner_products import inner_products

    parts, query_factor, query_sum = queries.operands(dtype)
    inner_products(out, codes, parts, factor, query_factor, query_sum, accumulate)


def code_values(codes: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The stored numbers in ``dtype``, (n, K): what :func:`device_inner_products` multiplies, by definition."""
    if codes.dtype != torch.uint8:
        return codes.to(dtype)
    bits = codes[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1
    return 1 - 2 * bits.flatten(1)[:, :dim].to(dtype)


def device_inner_products_cost(n: int, dtype: str, dim: int, n_queries: int) -> tuple[int, int]:
    """(operations, bytes) that n rows take at least: a product and a sum a feature, and everything moved once."""
    codes = n * _row_length(dtype, dim) * TORCH_DTYPES[dtype].itemsize
    return 2 * n * dim * n_queries, codes + 4 * (n + n * n_queries + dim * n_queries)


def _row_length(dtype: str, dim: int) -> int:
    return -(-dim // 8) if dtype == "1bit" else dim


class HostProducts:
    """Inner products of codes in host memory, such as views of a memory map, with queries on a device.

    Codes go through two pinned buffers of ``part_bytes``, which are kept: while the device copies and multiplies what
    is in one, the host fills the other.
    """

    def __init__(self, queries: Queries, part_bytes: int = PART_BYTES) -> None:
        self._queries, self._part_bytes = queries, part_bytes
        self._slots: list[_Slot] = []
        self._stream = torch.cuda.Stream(queries.device) if queries.device.type == "cuda" else None

    def add(
        self,
        codes: NDArray[Any],
        dtype: str,
        dim: int,
        factor: NDArray[np.float32],
        out: NDArray[np.float32],
        *,
        accumulate: bool,
    ) -> None:
        """Numpy ``out`` (n, Q) = or += what :func:`device_inner_products` makes of the same arguments.

        ``codes`` in the numpy types of a store; those of bfloat16 are their bit patterns, uint16.
        """
        device = self._queries.device
        factors = to_device(torch.from_numpy(np.ascontiguousarray(factor)), device)
        before: tuple[slice, Fetch] | None = None
        for rows, part in self._parts(codes, TORCH_DTYPES[dtype]):
            products = torch.empty(len(part), self._queries.shape[0], device=device)
            device_inner_products(part, dtype, dim, self._queries, factors[rows], products)
            if before is not None:
                _store(*before, out, accumulate)
            before = rows, Fetch([products])
        if before is not None:
            _store(*before, out, accumulate)

    def _parts(self, codes: NDArray[Any], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their codes on the device, which stay there until the part after the next is asked for."""
        n, row_length = codes.shape
        row_bytes = max(1, row_length * codes.itemsize)
        step = max(1, self._part_bytes // row_bytes)
        if not self._slots or self._slots[0].size < min(n, step) * row_bytes:
            size = max(self._part_bytes, row_bytes)
            self._slots = [_Slot(size, self._queries.device, self._stream) for _ in range(2)]
        for number, start in enumerate(range(0, n, step)):
            rows = slice(start, min(n, start + step))
            slot = self._slots[number % 2]
            yield rows, slot.fill(codes[rows]).view(dtype).view(-1, row_length)
            slot.used()


def _store(rows: slice, fetch: Fetch, out: NDArray[np.float32], accumulate: bool) -> None:
    products = fetch.wait()[0].numpy()
    if accumulate:
        out[rows] += products
    else:
        out[rows] = products


class _Slot:
    """A pinned buffer and the memory on the device that it is copied to, on a stream of its own."""

    def __init__(self, size: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.size = size
        self._stream = stream
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=stream is not None)
        self._device = self._host
        if stream is not None:
            self._device = torch.empty(size, dtype=torch.uint8, device=device)
            self._copied, self._free = torch.cuda.Event(), torch.cuda.Event()
            self._free.record(torch.cuda.current_stream(device))  # this memory may still be in use by earlier work

    def fill(self, codes: NDArray[Any]) -> Tensor:
        """The bytes of ``codes`` on the device; kernels started later see them."""
        if self._stream is not None:
            self._copied.synchronize()
        count = codes.nbytes
        np.copyto(self._host[:count].numpy().view(codes.dtype).reshape(codes.shape), codes)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._free)
                self._device[:count].copy_(self._host[:count], non_blocking=True)
                self._copied.record(self._stream)
            torch.cuda.current_stream(self._device.device).wait_event(self._copied)
        return self._device[:count]

    def used(self) -> None:
        """The kernels that read the last fill have been started."""
        if self._stream is not None:
            self._free.record(torch.cuda.current_stream(self._device.device))
