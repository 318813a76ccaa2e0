"""``Projection``: the value that fully determines a random matrix in R^(K x P)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from less_fast.errors import LessFastError

KINDS = ("identity", "rademacher", "gaussian", "sjlt", "srht")

# More would only cost memory: kernels hold the signs of a few runs, and the non-zeros of a few columns, at a time.
MAX_BLOCK = 1 << 16
MAX_NNZ = 1 << 10

# Fourth counter word of Philox: one value per use of randomness, fixed for ever (docs/projections.md).
TAG_RADEMACHER = 1
TAG_GAUSSIAN = 2
TAG_SJLT = 3
TAG_SRHT_IN = 4
TAG_SRHT_OUT = 5


def widest_block(dim: int) -> int:
    """The widest block up to the default's 64 that divides ``dim``, for an ``srht`` whose dim someone else chose.

    Raises LessFastError under 8: with so little mixing, large activations fall on a few features (docs/projections.md).
    """
    block = math.gcd(dim, 64)
    if block < 8:
        raise LessFastError(f"srht cannot mix dim = {dim} features well; expected a multiple of 8, better of 64")
    return block


@dataclass(frozen=True)
class Projection:
    """A random linear map R^P -> R^K, the same on every backend, device, batch and world size.

    Signs, buckets and random words are equal bit for bit; the normals of ``gaussian`` up to float32 rounding.

    Parameters
    ----------
    kind : ``identity``, ``rademacher``, ``gaussian``, ``sjlt`` or ``srht``; the formulas are in docs/projections.md.
    dim : K, the number of features. ``identity`` requires K = P and checks it when it meets a gradient.
    seed : the 64-bit Philox key.
    block : ``srht`` only: B, the length of the runs that are mixed; a power of two dividing ``dim``.
    nnz : ``sjlt`` only: s, non-zeros per column; 1 is CountSketch.

    Raises
    ------
    LessFastError
        if a field is out of its range; the message names the field.
    """

    kind: str = "srht"
    dim: int = 8192
    seed: int = 0
    block: int = 64
    nnz: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LessFastError(f"projection kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        for field in ("dim", "seed", "block", "nnz"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise LessFastError(f"projection {field} is {value!r}; expected an integer")
        if not 1 <= self.dim < 2**31:
            raise LessFastError(f"projection dim is {self.dim}; expected 1 to 2^31 - 1")
        if not 0 <= self.seed < 2**64:
            raise LessFastError(f"projection seed is {self.seed}; expected 0 to 2^64 - 1")
        if not 1 <= self.nnz <= MAX_NNZ:
            raise LessFastError(f"projection nnz is {self.nnz}; expected 1 to {MAX_NNZ}")
        if not 1 <= self.block <= MAX_BLOCK or self.block & (self.block - 1):
            raise LessFastError(f"projection block is {self.block}; expected a power of two up to {MAX_BLOCK}")
        if self.kind == "srht" and self.dim % self.block:
            raise LessFastError(
                f"projection dim is {self.dim}, not a multiple of block = {self.block}; "
                "choose a dim that is, or a smaller power of two for block"
            )

    @property
    def slots(self) -> int:
        """Number of B-wide slots of the feature vector that ``srht`` runs are folded into."""
        return self.dim // self.block

    @property
    def scale(self) -> float:
        """What the ±1s and normals of the dense kinds are multiplied by: 1/√K."""
        return 1 / math.sqrt(self.dim)

    def to_dict(self) -> dict[str, Any]:
        """The fields that matter for this kind, as plain JSON values; the inverse of :meth:`from_dict`."""
        fields = asdict(self)
        if self.kind != "srht":
            del fields["block"]
        if self.kind != "sjlt":
            del fields["nnz"]
        if self.kind == "identity":
            del fields["seed"]
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Projection:
        """Build from :meth:`to_dict`'s output; raises LessFastError for unknown fields."""
        unknown = set(fields) - set(cls.__dataclass_fields__)
        if unknown:
            raise LessFastError(f"projection has unknown fields {sorted(unknown)}")
        return cls(**fields)

    def same_matrix(self, other: Projection) -> bool:
        """Whether both values name the same matrix (fields that the kind ignores are not compared)."""
        return self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.to_dict().items())
