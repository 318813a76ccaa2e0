"""bergson's random matrices, the same on every device, and its two-sided projection of a module's gradient."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from less_fast.errors import LessFastError
from less_fast.ops.philox import sign_bits, words

Distribution = Literal["rademacher", "normal"]
Scale = Literal["jl", "row_norm"]

VERSION = 2  # bergson's number for these matrices
_PER_CALL = {"rademacher": 128, "normal": 4}  # entries of a row that one call of Philox gives
_AT_ONCE = 1 << 18  # entries in the making: a few MB


def random_matrix(
    identifier: str,
    m: int,
    n: int,
    device: torch.device | str,
    projection_type: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix that bergson calls so: (m, n), entries ±1 (``rademacher``) or standard normals (``normal``).

    Philox4x32-10 with the first 8 bytes of the name's MD5 as key and (call, row, 0, 0) as counter. ±1 are equal bit for
    bit on every device. Normals are computed on the host, in float32 by NumPy as bergson's CPU path does: with the same
    NumPy they are equal bit for bit, and the same for every device, where its CUDA kernels round differently.

    Raises LessFastError, a ValueError, for another distribution and for 2^31 rows or columns.
    """
    if projection_type not in _PER_CALL:
        raise LessFastError(f"Unknown projection type: {projection_type!r}; expected {' or '.join(_PER_CALL)}")
    if max(m, n) >= 1 << 31:
        raise LessFastError(f"a matrix of {m} x {n} is too large; expected fewer than 2^31 rows and columns")
    key = int.from_bytes(hashlib.md5(identifier.encode(), usedforsecurity=False).digest()[:8], "little")
    per_call, make = _PER_CALL[projection_type], _signs if projection_type == "rademacher" else _normals
    place = torch.device(device if projection_type == "rademacher" else "cpu")
    out = torch.empty(m, n, dtype=dtype, device=device)
    n_calls = -(-n // per_call)
    width = max(1, min(n_calls, _AT_ONCE // per_call))
    height = max(1, _AT_ONCE // (width * per_call))
    for top in range(0, m, height):
        rows = torch.arange(top, min(m, top + height), device=place)[:, None] << 32
        for first in range(0, n_calls, width):
            calls = torch.arange(first, min(n_calls, first + width), device=place)
            part = out[top : top + height, first * per_call : (first + width) * per_call]
            part.copy_(make(rows | calls, key).flatten(1)[:, : part.shape[1]])
    return out


def _signs(counter: Tensor, key: int) -> Tensor:
    """(rows, calls) -> (rows, calls, 128) of ±1: a set bit is +1."""
    return 2 * sign_bits(counter, 128, 0, key).to(torch.int8) - 1


def _normals(counter: Tensor, key: int) -> Tensor:
    """(rows, calls) -> (rows, calls, 2, 2): Box-Muller, two normals of each pair of words."""
    drawn = words(counter, torch.zeros_like(counter), 0, key).numpy()
    unit = np.float32(2.0**-32)
    radius = np.sqrt(np.float32(-2.0) * np.log((drawn[..., 0::2].astype(np.float32) + np.float32(0.5)) * unit))
    angle = np.float32(2.0 * math.pi) * (drawn[..., 1::2].astype(np.float32) * unit)
    return torch.from_numpy(np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1))


@dataclass(frozen=True)
class ModuleProjection:
    """What bergson makes of a module's gradient G (D_out, D_in): L G R^T, where L and R have ``dim`` rows.

    ``scale``: ``jl`` divides the entries by sqrt(dim), ``row_norm`` the rows by their norms. ``seed``: part of the
    matrices' names, or None. The fields are those of bergson's ``IndexConfig`` that begin with ``projection_``.
    """

    dim: int = 16
    type: Distribution = "rademacher"
    scale: Scale = "jl"
    seed: int | None = None

    def __post_init__(self) -> None:
        for field, choices in (("type", Distribution), ("scale", Scale)):
            if getattr(self, field) not in get_args(choices):
                found, expected = getattr(self, field), " or ".join(get_args(choices))
                raise LessFastError(f"projection {field} is {found!r}; expected {expected}")
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 1 <= self.dim < 1 << 31:
            raise LessFastError(f"projection dim is {self.dim!r}; expected an integer from 1 to 2^31 - 1")

    def matrix(
        self, module: str, side: Literal["left", "right"], width: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """L (``left``, of the output) or R (``right``, of the input) of a module: (dim, width)."""
        name = f"{module}/{side}" if self.seed is None else f"{module}/{side}/seed{self.seed}"
        entries = random_matrix(name, self.dim, width, device, self.type, dtype)
        return entries / (entries.norm(dim=1, keepdim=True) if self.scale == "row_norm" else math.sqrt(self.dim))
