"""How float32 features become the bytes of a shard and float32 again, for each dtype a store can have.

float16 and bfloat16 rows are multiplied by a power of two of their own before rounding, kept in the float32 column
``scale``, so that neither a raw SGD gradient near 1e-7 goes subnormal nor an Adam step of 1e6 overflows. Multiplying
by a power of two is exact, so each entry is off by the rounding of its own stored bits only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Array = NDArray[Any]

# A row's largest entry is brought into [2^14, 2^15): below float16's largest (65504) even after rounding up, and
# 28 binades above its smallest normal number.
_TOP_EXPONENT = 15
# The scale itself must stay a normal float32.
_LOWEST_EXPONENT = -126


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a shard: safetensors' name of its type, the numpy type its bytes are read as, and its shape."""

    tag: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Codec:
    """The bytes of one store dtype.

    ``tag``, ``dtype``: as in :class:`TensorSpec`. ``narrow``, ``widen``: float32 to that type and back, entry by entry.
    ``scaled``: whether a per-row power of two is stored beside the features.
    """

    tag: str
    dtype: str
    narrow: Callable[[Float32], Array]
    widen: Callable[[Array], Float32]
    scaled: bool

    def tensors(self, n: int, dim: int) -> dict[str, TensorSpec]:
        """The tensors that hold the features of ``n`` rows."""
        specs = {"features": TensorSpec(self.tag, self.dtype, (n, dim))}
        if self.scaled:
            specs["scale"] = TensorSpec("F32", "<f4", (n,))
        return specs

    def encode(self, rows: Float32) -> dict[str, Array]:
        """Finite float32 (n, K), below 2^127 in size, to the tensors of :meth:`tensors`."""
        if not self.scaled:
            return {"features": self.narrow(rows)}
        _, exponent = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
        exponent = np.maximum(exponent - _TOP_EXPONENT, _LOWEST_EXPONENT)
        features = self.narrow(rows * np.ldexp(np.float32(1.0), -exponent)[:, None])
        return {"features": features, "scale": np.ldexp(np.float32(1.0), exponent)}

    def decode(self, tensors: Mapping[str, Array], rows: slice | NDArray[np.int64], out: Float32) -> None:
        """Fill ``out`` (n, K) with the chosen rows of a shard's tensors."""
        out[:] = self.widen(tensors["features"][rows])
        if self.scaled:
            out *= tensors["scale"][rows][:, None]


def round_to_bfloat16(x: Float32) -> NDArray[np.uint16]:
    """The upper 16 bits of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def widen_bfloat16(bits: Array) -> Float32:
    """The float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_float16(x: Float32) -> Array:
    return x.astype(np.float16)


def _as_float32(x: Array) -> Float32:
    return x.astype(np.float32, copy=False)


CODECS: dict[str, Codec] = {
    "float32": Codec("F32", "<f4", _as_float32, _as_float32, scaled=False),
    "float16": Codec("F16", "<f2", _to_float16, _as_float32, scaled=True),
    "bfloat16": Codec("BF16", "<u2", round_to_bfloat16, widen_bfloat16, scaled=True),
}
