"""How processes that share stores divide the shards: each takes what nobody has taken yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from less_fast.store.writer import StoreWriter

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Claim:
    """A shard that this process is to make, for each of the ``writers``."""

    shard: int
    writers: list[StoreWriter]

    def pairs(self, writers: Sequence[StoreWriter], values: Sequence[_Value]) -> Iterator[tuple[StoreWriter, _Value]]:
        """Of all ``writers``, each with its value, those that the shard is to be made for."""
        return ((writer, value) for writer, value in zip(writers, values) if writer in self.writers)


def missing_shards(writers: Sequence[StoreWriter], shards: range | None = None) -> list[int]:
    """Numbers of the shards, of ``shards`` or of all, that one of the stores at least does not have now, ascending."""
    for writer in writers:
        writer.refresh()
    missing = sorted(set().union(*(writer.pending() for writer in writers)))
    return missing if shards is None else [shard for shard in missing if shard in shards]


def claim_shards(writers: Sequence[StoreWriter], shards: Iterable[int]) -> Iterator[Claim]:
    """Claim one shard after the other, each when it is asked for; those that others have or make are left out.

    A shard is claimed in all stores that it is missing from, or in none: it is then computed once for all of them.
    """
    for shard in shards:
        claimed: list[StoreWriter] = []
        for writer in writers:
            if not writer.misses(shard):
                continue
            if not writer.claim(shard):
                for other in claimed:
                    other.give_up(shard)
                break
            claimed.append(writer)
        else:
            if claimed:
                yield Claim(shard, claimed)
