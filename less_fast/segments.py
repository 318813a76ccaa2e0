"""``Segments``: where each example's tokens lie in a flat token axis; padded and packed batches are both just that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from less_fast.transfer import to_device


@dataclass(frozen=True)
class Segments:
    """Example n has the tokens ``starts[n]`` to ``starts[n] + lengths[n]`` of the flat axis.

    ``row_length``: T where the axis is the rows of a padded (N, T) batch one after the other, else None.
    ``table``: the same on the device, int32 (2, N): starts, then lengths.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    row_length: int | None
    table: Tensor = field(repr=False)

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        """Examples of the given lengths, one directly after the other."""
        starts, total = [], 0
        for length in lengths:
            starts.append(total)
            total += length
        return cls(tuple(starts), tuple(lengths), None, _table(starts, lengths, device))

    @classmethod
    def padded(cls, lengths: Sequence[int], row_length: int, device: torch.device) -> Segments:
        """Examples at the front of rows of ``row_length`` tokens."""
        starts = [row_length * n for n in range(len(lengths))]
        return cls(tuple(starts), tuple(lengths), row_length, _table(starts, lengths, device))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def end(self) -> int:
        """Tokens that the flat axis has at least; every matrix of a batch is checked against it."""
        return max((start + length for start, length in zip(self.starts, self.lengths)), default=0)


def _table(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([starts, lengths], dtype=torch.int32).reshape(2, len(lengths)), device)
