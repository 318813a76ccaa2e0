"""How float32 features become the codes of a shard and float32 again, for each dtype a store can have.

float16 and bfloat16 rows are multiplied by a power of two of their own before rounding, kept in the float32 column
``scale``, so that neither a raw SGD gradient near 1e-7 goes subnormal nor an Adam step of 1e6 overflows. Multiplying
by a power of two is exact, so each entry is off by the rounding of its own stored bits only. int8 rows are counted in
127th parts of their largest entry. 1bit rows keep the signs of what the rotated unit row has that its shard's mean unit
row has not: most of a gradient feature is one direction that all rows share, and it would take most of the signs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from less_fast.store.rotation import rotate, rotate_back

Float32 = NDArray[np.float32]
Array = NDArray[Any]

# A row's largest entry is brought into [2^14, 2^15): below float16's largest (65504) even after rounding up, and
# 28 binades above its smallest normal number.
_TOP_EXPONENT = 15
# The scale itself must stay a normal float32.
_LOWEST_EXPONENT = -126
_LARGEST = np.finfo(np.float32).max
_LARGEST_INT8 = 127  # not -128: the codes of a row and of its negative are each other's


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a shard: safetensors' name of its type, the numpy type its bytes are read as, and its shape."""

    tag: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Codec:
    """The bytes of one store dtype.

    ``tag``, ``dtype``: as in :class:`TensorSpec`. ``to_codes``: finite float32 (n, K), below 2^127 in size, to codes
    and, where ``scaled``, a factor per row; ``to_float``: codes to float32 (n, K) before that factor is applied.
    ``per_element``: entries of a row that one stored element holds. ``rotated``: whether codes are of rotated rows, and
    those rows unit rows less the center of their shard. ``schema``: the first version of the store's format that has
    this dtype.

    A row's codes and factor depend on the row that is encoded alone, not on the rows that are encoded with it.
    """

    tag: str
    dtype: str
    to_codes: Callable[[Float32], tuple[Array, Float32 | None]]
    to_float: Callable[[Array, int], Float32]
    scaled: bool = True
    per_element: int = 1
    rotated: bool = False
    schema: int = 1

    def tensors(self, n: int, dim: int) -> dict[str, TensorSpec]:
        """The tensors that hold the features of ``n`` rows, an entry for each row."""
        specs = {"features": TensorSpec(self.tag, self.dtype, (n, -(-dim // self.per_element)))}
        if self.scaled:
            specs["scale"] = TensorSpec("F32", "<f4", (n,))
        return specs

    def encode(self, rows: Float32) -> dict[str, Array]:
        """Finite float32 (n, K), below 2^127 in size, to the tensors of :meth:`tensors`."""
        codes, scale = self.to_codes(rows)
        return {"features": codes} if scale is None else {"features": codes, "scale": scale}

    def decode(self, tensors: Mapping[str, Array], rows: slice | NDArray[np.int64], out: Float32) -> None:
        """Fill ``out`` (n, K) with the chosen rows of a shard's tensors."""
        values = self.to_float(tensors["features"][rows], out.shape[1])
        out[:] = rotate_back(values) if self.rotated else values
        if self.scaled:
            out *= tensors["scale"][rows][:, None]
        if self.rotated:
            out += tensors["center"]
            # An entry that is read from signs can be 2 sqrt(K) times as large as the row's norm.
            with np.errstate(over="ignore"):
                out *= tensors["norms"][rows][:, None]
            np.clip(out, -_LARGEST, _LARGEST, out=out)


def round_to_bfloat16(x: Float32) -> NDArray[np.uint16]:
    """The upper 16 bits of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def widen_bfloat16(bits: Array) -> Float32:
    """The float32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _scaled_by_power_of_two(narrow: Callable[[Float32], Array]) -> Callable[[Float32], tuple[Array, Float32]]:
    def to_codes(rows: Float32) -> tuple[Array, Float32]:
        _, above = np.frexp(np.abs(rows).max(axis=1, initial=0.0))
        exponent = np.maximum(above - _TOP_EXPONENT, _LOWEST_EXPONENT)
        codes = narrow(rows * np.ldexp(np.float32(1.0), -exponent)[:, None])
        return codes, np.ldexp(np.float32(1.0), exponent)

    return to_codes


def _to_int8(rows: Float32) -> tuple[Array, Float32]:
    scale = np.abs(rows).max(axis=1, initial=0.0) / np.float32(_LARGEST_INT8)
    scale = np.maximum(scale, np.float32(2.0**_LOWEST_EXPONENT))
    return np.rint(rows / scale[:, None]).astype(np.int8), scale


def encode_signs(rows: Float32) -> tuple[Array, Float32]:
    """Signs of y = R x for every row of float32 (n, K), about 1 in size: uint8 (n, ceil(K / 8)), and |y|^2 / sum|y|.

    A set bit is a negative entry, the lowest bit comes first. The factor, float32 (n,), of a row of zeros is 0.
    """
    turned = rotate(rows)
    wide = np.abs(turned.astype(np.float64))
    total = wide.sum(axis=1)
    # With this factor, the inner product with another row is right on average over rotations.
    scale = np.divide(np.einsum("ij,ij->i", wide, wide), total, out=np.zeros_like(total), where=total > 0)
    return np.packbits(turned < 0, axis=1, bitorder="little"), scale.astype(np.float32)


def _from_bits(codes: Array, dim: int) -> Float32:
    bits = np.unpackbits(codes, axis=1, count=dim, bitorder="little")
    return np.float32(1.0) - np.float32(2.0) * bits.astype(np.float32)


def _to_float16(x: Float32) -> Array:
    return x.astype(np.float16)


def _from_bfloat16(codes: Array, dim: int) -> Float32:
    return widen_bfloat16(codes)


def _as_float32(codes: Array, dim: int) -> Float32:
    return codes.astype(np.float32, copy=False)


def _plain(rows: Float32) -> tuple[Array, None]:
    return rows, None


CODECS: dict[str, Codec] = {
    "float32": Codec("F32", "<f4", _plain, _as_float32, scaled=False),
    "float16": Codec("F16", "<f2", _scaled_by_power_of_two(_to_float16), _as_float32),
    "bfloat16": Codec("BF16", "<u2", _scaled_by_power_of_two(round_to_bfloat16), _from_bfloat16),
    "int8": Codec("I8", "|i1", _to_int8, _as_float32, schema=2),
    "1bit": Codec("U8", "|u1", encode_signs, _from_bits, per_element=8, rotated=True, schema=2),
}
