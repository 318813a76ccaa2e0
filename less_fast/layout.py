"""The parameter layout: which gradient entry has which global index, and which run of the blocked SRHT it lies in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """One matrix of the layout.

    ``name``: its name in ``named_parameters()``. ``rows`` x ``cols``: its shape as the model stores it (row-major).
    ``offset``: global index j of its first entry. ``short_is_rows``: whether the short side S is the rows
    (``lora_A``) or the columns (``lora_B``).
    """

    name: str
    rows: int
    cols: int
    offset: int
    short_is_rows: bool

    @property
    def size(self) -> int:
        return self.rows * self.cols

    @property
    def short(self) -> int:
        """S: the side that is not mixed (the rank of a LoRA matrix)."""
        return self.rows if self.short_is_rows else self.cols

    @property
    def long(self) -> int:
        """L: the side that is cut into runs (the model's width)."""
        return self.cols if self.short_is_rows else self.rows

    @property
    def short_stride(self) -> int:
        """Step of the global index j along the short side."""
        return self.cols if self.short_is_rows else 1

    @property
    def long_stride(self) -> int:
        """Step of the global index j along the long side."""
        return 1 if self.short_is_rows else self.cols

    def slice(self, start: int, stop: int) -> Parameter:
        """Entries [start, stop) of a parameter with S = 1, as a parameter of its own with the same global indices."""
        assert self.rows == 1 and self.short_is_rows
        return Parameter(self.name, 1, stop - start, self.offset + start, True)

    def runs(self, block: int) -> int:
        """Number of runs of ``block`` entries that this matrix is cut into."""
        return self.short * -(-self.long // block)


def short_side_is_rows(name: str, rows: int, cols: int) -> bool:
    """Which side of a matrix is its short one: by role for LoRA matrices, by size (ties: rows) otherwise."""
    if ".lora_A." in name:
        return True
    if ".lora_B." in name:
        return False
    return rows <= cols


@dataclass(frozen=True)
class ParameterLayout:
    """The ordered table of the gradient's parameters, in ``named_parameters()`` order. P = ``size``."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def build(cls, shapes: Iterable[tuple[str, int, int]]) -> ParameterLayout:
        """From (name, rows, cols) triples in order."""
        parameters: list[Parameter] = []
        offset = 0
        for name, rows, cols in shapes:
            parameters.append(Parameter(name, rows, cols, offset, short_side_is_rows(name, rows, cols)))
            offset += rows * cols
        return cls(tuple(parameters))

    @classmethod
    def flat(cls, size: int) -> ParameterLayout:
        """The layout of a foreign front end's flat vector: S = 1, L = P."""
        return cls((Parameter("flat", 1, size, 0, True),))

    @property
    def size(self) -> int:
        """P: the number of gradient entries."""
        return sum(p.size for p in self.parameters)

    def run_bases(self, block: int) -> list[int]:
        """Number rho of the first run of every parameter."""
        bases, base = [], 0
        for parameter in self.parameters:
            bases.append(base)
            base += parameter.runs(block)
        return bases

    def to_list(self) -> list[dict[str, Any]]:
        """Plain JSON rows, the inverse of :meth:`from_list`."""
        return [
            {
                "name": p.name,
                "rows": p.rows,
                "cols": p.cols,
                "offset": p.offset,
                "short": "rows" if p.short_is_rows else "cols",
            }
            for p in self.parameters
        ]

    @classmethod
    def from_list(cls, rows: Sequence[Mapping[str, Any]]) -> ParameterLayout:
        return cls(tuple(Parameter(r["name"], r["rows"], r["cols"], r["offset"], r["short"] == "rows") for r in rows))

    @property
    def hash(self) -> str:
        """SHA-256 of the table: equal hashes mean that features are functions of the same gradient vector."""
        text = json.dumps(self.to_list(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
