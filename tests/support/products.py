"""Random stored codes and what products of them should be; device calls made in the interpreter's process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from less_fast.ops import device_products as products

DTYPES = tuple(products.TORCH_DTYPES)


def random_codes(dtype: str, n: int, dim: int, seed: int = 0) -> Tensor:
    """Codes as a store has them, rows of very different size where they are floats."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == "int8":
        return torch.randint(-127, 128, (n, dim), generator=generator, dtype=torch.int8)
    if dtype == "1bit":
        packed = torch.randint(0, 256, (n, -(-dim // 8)), generator=generator, dtype=torch.uint8)
        packed[:, -1] &= (1 << ((dim - 1) % 8 + 1)) - 1  # padding bits are 0
        return packed
    sizes = 10 ** torch.empty(n, 1).uniform_(-3, 3, generator=generator)
    if dtype == "float16":  # rows of a store reach into [2^14, 2^15)
        sizes = torch.full((n, 1), 4096.0)
    return (torch.randn(n, dim, generator=generator) * sizes).clamp(-32767, 32767).to(products.TORCH_DTYPES[dtype])


def numpy_codes(codes: Tensor) -> np.ndarray:
    """The same as numpy has it in a store: bit patterns of bfloat16."""
    return (codes.view(torch.uint16) if codes.dtype == torch.bfloat16 else codes).numpy()


def reference(codes: Tensor, queries: Tensor, factor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Products with queries, times the row's factor, in ``dtype`` and by the definition."""
    values = products.code_values(codes, queries.shape[1], dtype)
    return values @ queries.to(dtype).T * factor.to(dtype)[:, None]


def assert_close(out: Tensor, codes: Tensor, queries: Tensor, factor: Tensor) -> None:
    """As accurate as float32 products are."""
    exact = reference(codes, queries, factor)
    plain = reference(codes, queries, factor, torch.float32)
    allowed = 2 * rms(plain.double() - exact) + 1e-6 * rms(exact)
    assert rms(out.double() - exact) <= allowed


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def interpreted_host_products(blocks: list[tuple[Any, ...]], queries: tuple[Any, ...], part_bytes: int) -> np.ndarray:
    """What HostProducts adds up over ``blocks`` (codes, dtype, dim, factor), in the process of the interpreter."""
    _take_for_cuda()
    cpu = torch.device("cpu")
    held = products.DeviceQueries(*queries, cpu) if len(queries) == 1 else products.DeviceBits(*queries, cpu)
    host = products.HostProducts(held, part_bytes)
    out = np.full((len(blocks[0][0]), held.shape[0]), np.nan, np.float32)
    for number, block in enumerate(blocks):
        host.add(*block, out, accumulate=number > 0)
    return out


def products_check() -> Any:
    """The doctor's check."""
    _take_for_cuda()
    from less_fast.doctor import check_inner_products

    return check_inner_products("cpu")


def _take_for_cuda() -> None:
    products.supports = lambda device: None  # type: ignore[assignment]  # in a process of its own
