"""QLESS's packed files: ``all_quantized_{bits}bits_absmax.pt``, codes of 1, 2, 4 or 8 bits and what undoes them.

The file holds a pair: packed codes, uint8, and a dict with ``nbits``, ``shape``, ``scale_factor``, ``offset``,
``packing`` and ``absmeasure``. With more than one bit a value x has the code round(x · scale_factor) + offset, where
scale_factor is (2^(bits − 1) − 1) / absmax and offset the largest code in size; with one bit, 1 where x > 0, and
scale_factor is absmax. The row-major vector of all codes is cut into 8 / bits equal parts: byte i holds entry i of
every part, the first part's in the highest bits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from less_fast.compat.less.files import load_value, save_tensor
from less_fast.errors import LessFastError

BITS = (1, 2, 4, 8)
NAME = re.compile(r"all_quantized_([1248])bits_abs(max|mean)\.pt")
# Further keys of the description: JSON text, and a checksum of it, the codes and the numbers that undo them.
NOTE, DIGEST = "less_fast", "less_fast_sha256"


@dataclass(frozen=True)
class Quantiser:
    """How values become codes. ``absmax``: the value that gets the largest code (the size of every one, with 1 bit)."""

    bits: int
    absmax: float

    @property
    def top(self) -> int:
        """The largest code in size, before the offset."""
        return 2 ** (self.bits - 1) - 1

    @property
    def scale(self) -> float:
        """QLESS's ``scale_factor``."""
        if self.bits == 1:
            return self.absmax
        return self.top / self.absmax if self.absmax > 1e-9 else 1.0

    def codes(self, values: NDArray[np.float32]) -> NDArray[np.int16]:
        """Codes without the offset, of float32 values; ties round to even, as in torch."""
        if self.bits == 1:
            return (values > 0).astype(np.int16)
        # In float32, as torch multiplies a float32 tensor by a number.
        return np.clip(np.rint(values * np.float32(self.scale)), -self.top, self.top).astype(np.int16)


@dataclass(frozen=True)
class Packed:
    """An open file. ``codes``: packed, uint8, flat. ``meta``: as QLESS wrote it."""

    path: Path
    codes: NDArray[np.uint8]
    meta: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        n, dim = self.meta["shape"]
        return int(n), int(dim)

    @property
    def note(self) -> dict[str, Any] | None:
        """What less_fast wrote of the rows; None in QLESS's own files. LessFastError where the file is damaged."""
        if NOTE not in self.meta:
            return None
        if self.meta.get(DIGEST) != _digest(self.codes, self.meta):
            raise LessFastError(f"{self.path}: damaged (its SHA-256 differs); make the file again")
        note: dict[str, Any] = json.loads(self.meta[NOTE])
        return note

    @property
    def quantiser(self) -> Quantiser:
        bits, scale = int(self.meta["nbits"]), float(self.meta["scale_factor"])
        return Quantiser(bits, scale if bits == 1 else (2 ** (bits - 1) - 1) / scale)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """The values that the codes of rows [start, stop) stand for, float32 (stop - start, D)."""
        dim, bits = self.shape[1], int(self.meta["nbits"])
        offset, scale = np.float32(float(self.meta["offset"])), np.float32(float(self.meta["scale_factor"]))
        codes = unpack(self.codes, bits, start * dim, stop * dim).astype(np.float32)
        values = (2 * codes - 1) * scale if bits == 1 else (codes - offset) / scale
        return values.reshape(stop - start, dim)


def read_packed(path: Path) -> Packed:
    """Open a file of QLESS's; raises LessFastError where it is none."""
    value = load_value(path)
    try:
        codes, meta = value
        packed = Packed(path, codes.numpy().reshape(-1), dict(meta))
        n, dim = packed.shape
        good = packed.codes.dtype == np.uint8 and packed.quantiser.bits in BITS
        good = good and len(packed.codes) * 8 == n * dim * packed.quantiser.bits
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError):
        good = False
    if not good:
        raise LessFastError(f"{path}: not a file of QLESS's; expected packed codes, uint8, and their description")
    return packed


def write_packed(
    path: Path,
    blocks: Iterable[NDArray[np.float32]],
    shape: tuple[int, int],
    quantiser: Quantiser,
    largest: float,
    note: Mapping[str, Any],
) -> None:
    """Quantise rows, float32 blocks of ``shape`` (N, D) in all, to a file that appears whole or not at all.

    ``largest``: the largest value in size. ``note``: JSON values that tell what the rows are, kept beside QLESS's own
    description. The packed codes, N · D · bits / 8 bytes, are held in memory. Raises LessFastError where they do not
    fill bytes.
    """
    bits, size = quantiser.bits, shape[0] * shape[1]
    if size * bits % 8:
        raise LessFastError(
            f"{path}: {shape[0]} rows of {shape[1]} features do not fill bytes with {bits} bits each, and QLESS has no "
            "way to write the rest; choose 8 bits"
        )
    offset = 0 if bits == 1 else int(quantiser.codes(np.array([largest], np.float32))[0])
    packed = np.zeros(size * bits // 8, np.uint8)
    done = 0
    for block in blocks:
        codes = (quantiser.codes(block).reshape(-1) + offset).astype(np.uint8)
        for part, here, there in _spans(done, done + len(codes), len(packed)):
            packed[there] |= codes[here] << (8 - bits - part * bits)
        done += len(codes)
    meta: dict[str, Any] = {
        "nbits": bits,
        "shape": torch.Size(shape),
        "scale_factor": quantiser.scale,
        "offset": 0 if bits == 1 else torch.tensor(float(offset)),
        "packing": f"{bits}bit_u8",
        "absmeasure": "max",
        NOTE: json.dumps(note),
    }
    meta[DIGEST] = _digest(packed, meta)
    save_tensor((torch.from_numpy(packed), meta), path)


def unpack(packed: NDArray[np.uint8], bits: int, start: int, stop: int) -> NDArray[np.uint8]:
    """Entries [start, stop) of the vector of codes, with their offset."""
    out = np.empty(stop - start, np.uint8)
    for part, here, there in _spans(start, stop, len(packed)):
        out[here] = (packed[there] >> (8 - bits - part * bits)) & (2**bits - 1)
    return out


def _digest(packed: NDArray[np.uint8], meta: Mapping[str, Any]) -> str:
    numbers = [meta["nbits"], list(meta["shape"]), float(meta["scale_factor"]), float(meta["offset"])]
    digest = hashlib.sha256(json.dumps([numbers, meta[NOTE]]).encode())
    digest.update(packed.data)
    return digest.hexdigest()


def _spans(start: int, stop: int, length: int) -> Iterator[tuple[int, slice, slice]]:
    """Where entries [start, stop) lie: the part's number, their place among these entries, and their bytes."""
    for part in range(start // length, -(-stop // length)):
        first, last = max(start, part * length), min(stop, (part + 1) * length)
        yield part, slice(first - start, last - start), slice(first - part * length, last - part * length)
