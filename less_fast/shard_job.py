"""``ShardJob``: the map from windows of examples to features, overlapped with reading ahead, copying and writing."""

from __future__ import annotations

import logging
import operator
import random
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from less_fast.ahead import ahead
from less_fast.data import Encoded, collate, plan_batches
from less_fast.errors import LessFastError
from less_fast.features import MultiFeatureExtractor
from less_fast.in_step import Alone, Ranks, Size
from less_fast.model.budget import is_out_of_memory
from less_fast.progress import progress_bar
from less_fast.store import Status, StoreWriter
from less_fast.store.background import BackgroundWriter
from less_fast.store.manifest import ShardEntry
from less_fast.store.sharing import Claim, claim_shards, missing_shards
from less_fast.transfer import Fetch

logger = logging.getLogger("less_fast")

# Batches whose features are on their way to the host while the next one is started.
_IN_FLIGHT = 2
# How often a process that has nothing left to do looks whether another has finished or died.
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class MadeShard:
    """What is written of a shard: for every output features float32 (n, K), and what its rows have in common.

    ``columns``: status uint8 (n,), tokens int32 (n,), labels int32 (n,).
    """

    features: list[np.ndarray]
    columns: tuple[np.ndarray, np.ndarray, np.ndarray]
    facts: dict[str, int]


class ShardJob:
    """Computes the missing shards of several stores, each as if it were the only one.

    ``encode``: the tokens of consecutive examples; called in a thread of its own. Padding is token 0: it is neither
    attended to nor in the loss. ``budget``: tokens a batch may have; halved for a shard that finds no memory.
    ``ranks``: those that make every shard in step, each with a job of its own; writers are the leader's alone.
    """

    def __init__(
        self,
        extractor: MultiFeatureExtractor,
        n_examples: int,
        encode: Callable[[range], list[Encoded]],
        budget: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.extractor = extractor
        self.n_examples = n_examples
        self.encode = encode
        self.budget = budget
        self.ranks = ranks or Alone()
        self._batch: Size = (0, 0, 0)
        self._too_large: set[Size] = set()

    def run(
        self, writers: Sequence[StoreWriter], progress: bool, *, shards: range | None = None, start: float | None = 0.0
    ) -> None:
        """Return when the stores, all of the same examples, have all of ``shards`` (default: of their shards).

        Where the writers are shared, other processes make what they can claim; ``start``, 0 to 1, is where in the
        shards this one begins, None a random order, for those who don't see each other's claims. What a process leaves
        behind that ends is made here.
        """

        def missing_now() -> list[int]:
            return self.ranks.from_leader(lambda: missing_shards(writers, shards))

        missing, rows = missing_now(), self._windows(writers)
        first, made = set(missing), set[int]()

        def elsewhere(missing: Iterable[int]) -> int:
            return sum(len(rows(shard)) for shard in first.difference(made, missing))

        total = self.n_examples if shards is None else sum(len(rows(shard)) for shard in shards)
        done = total - sum(len(rows(shard)) for shard in missing)

        def write(claim: Claim, shard: MadeShard) -> None:
            for writer, features in claim.pairs(writers, shard.features):
                writer.write(claim.shard, features, *shard.columns, facts=shard.facts)

        with progress_bar(total, unit="ex", desc="features", show=progress, initial=done) as bar:
            meter = _TokenMeter(bar)
            while missing:
                n_made = len(made)
                with closing(self._make(writers, _in_turn(missing, start), write, meter)) as claims:
                    for claim in claims:
                        made.add(claim.shard)
                        if progress:
                            meter.see_others(elsewhere(missing_shards(writers, shards)))
                missing = missing_now()
                meter.see_others(elsewhere(missing))
                if missing and len(made) == n_made:  # all that is missing is in the making elsewhere
                    time.sleep(_POLL_SECONDS)

    def put(self, writers: Sequence[StoreWriter], shards: Sequence[int]) -> list[dict[int, ShardEntry]]:
        """Make those of ``shards`` that are neither there nor claimed; for each writer their entries, to be enlisted.

        The manifests are neither read nor written.
        """
        entries: list[dict[int, ShardEntry]] = [{} for _ in writers]

        def put(claim: Claim, shard: MadeShard) -> None:
            for writer, features in claim.pairs(writers, shard.features):
                entry = writer.put(claim.shard, features, *shard.columns, facts=shard.facts)
                if entry is not None:
                    entries[writers.index(writer)][claim.shard] = entry

        try:
            with (
                progress_bar(0, unit="ex", desc="features", show=False) as bar,
                closing(self._make(writers, shards, put, _TokenMeter(bar))) as claims,
            ):
                deque(claims, maxlen=0)
        finally:  # the writers live on after an error, which leaves claimed shards behind
            for writer in writers:
                for shard in shards:
                    writer.give_up(shard)
        return entries

    def _windows(self, writers: Sequence[StoreWriter]) -> Callable[[int], range]:
        """The rows of a shard by its number, on ranks without writers too."""
        size = self.ranks.from_leader(lambda: writers[0].bounds(0)[1])
        return lambda shard: range(shard * size, min((shard + 1) * size, self.n_examples))

    def _make(
        self,
        writers: Sequence[StoreWriter],
        shards: Iterable[int],
        write: Callable[[Claim, MadeShard], None],
        meter: _TokenMeter,
    ) -> Generator[Claim, None, None]:
        """Claim and make one shard after the other, each yielded when it is begun; all are written at the end."""
        rows = self._windows(writers)

        def encoded_of(claim: Claim) -> tuple[Claim, list[Encoded]]:
            return claim, self.encode(rows(claim.shard))

        with (
            BackgroundWriter() as background,
            ThreadPoolExecutor(1, "less_fast-tokenizer") as tokenizing,
            ThreadPoolExecutor(1, "less_fast-collator") as collating,
        ):
            claims = self.ranks.claims(claim_shards(writers, shards))
            for claim, encoded in ahead(tokenizing, encoded_of, claims):
                yield claim
                background.submit(partial(write, claim, self._features(encoded, collating, meter)))

    def _features(self, encoded: Sequence[Encoded], collating: ThreadPoolExecutor, meter: _TokenMeter) -> MadeShard:
        """The shard of these examples; batches are halved till they fit.

        Every shard begins with the whole budget, so that its bits do not depend on which were made before it, or by
        whom. What is remembered of those only saves the attempts that would fail.
        """
        lengths = [len(e.input_ids) for e in encoded]
        longest, budget = max(lengths), self.budget
        while True:
            batches = plan_batches(
                lengths,
                budget,
                self.extractor.max_examples,
                packed=self.extractor.batches.packed,
                batch_cost=self.extractor.batch_cost,
            )
            smallest = budget <= max(longest // 2, 1)
            if smallest or not self._is_too_large(batches, lengths):
                done_before = meter.examples
                try:
                    features, status = self._attempt(encoded, batches, collating, meter)
                    n_tokens = np.array([len(e.input_ids) for e in encoded], np.int32)
                    n_labels = np.array([e.n_labels for e in encoded], np.int32)
                    facts = {"token_budget": budget, "truncated": sum(e.truncated for e in encoded)}
                    return MadeShard(features, (status, n_tokens, n_labels), facts)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if smallest:
                        raise LessFastError(
                            f"out of memory on {self.extractor.device} with a single example of {longest} tokens; use "
                            "a smaller max_length, a smaller dtype or a larger device (finished shards are kept)"
                        ) from error
                    self._too_large |= self.ranks.too_large(self._batch)
                meter.rewind(done_before)
                if self.ranks.leads:
                    logger.warning("out of memory: the token budget is now %d for this shard, done anew", budget // 2)
                if self.extractor.device.type == "cuda":
                    torch.cuda.empty_cache()
            budget //= 2

    def _is_too_large(self, batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> bool:
        """Whether one of the batches is, in every respect, at least as large as one that found no memory."""
        sizes = [_size(batch, lengths) for batch in batches]
        return any(all(map(operator.ge, size, failed)) for failed in self._too_large for size in sizes)

    def _attempt(
        self,
        encoded: Sequence[Encoded],
        batches: Sequence[list[int]],
        collating: ThreadPoolExecutor,
        meter: _TokenMeter,
    ) -> tuple[list[np.ndarray], np.ndarray]:
        features = [np.zeros((len(encoded), output.projection.dim), np.float32) for output in self.extractor.outputs]
        status = np.full(len(encoded), Status.OK, np.uint8)
        lengths = [len(e.input_ids) for e in encoded]

        def store(batch: list[int], n_labels: Tensor, fetch: Fetch) -> None:
            losses, *found = (tensor.numpy() for tensor in fetch.wait())
            finite = np.isfinite(losses)
            for array, rows in zip(features, found):
                array[batch] = rows
                finite &= np.isfinite(rows).all(1)
            status[batch] = np.where(
                n_labels.numpy() == 0, Status.NO_LABELS, np.where(finite, Status.OK, Status.NON_FINITE)
            )
            meter.update(len(batch), sum(lengths[i] for i in batch))

        def collated(batch: list[int]) -> tuple[list[int], dict[str, Tensor]]:
            return batch, collate([encoded[i] for i in batch], pad_id=0)

        in_flight: deque[tuple[list[int], Tensor, Fetch]] = deque()
        own = self.ranks.deal(batches)
        for batch, tensors in ahead(collating, collated, own):
            self._batch = _size(batch, lengths)
            result = self.ranks.compute(self.extractor, tensors, self._batch)
            if result is not None:
                in_flight.append((batch, result.n_labels, Fetch([result.losses, *result.features])))
            if len(in_flight) > _IN_FLIGHT:
                store(*in_flight.popleft())
        while in_flight:
            store(*in_flight.popleft())
        others = self.ranks.collect([status, *features], [i for batch in own for i in batch])
        meter.update(len(others), sum(lengths[i] for i in others))
        for array in features:
            array[status != Status.OK] = 0.0
        return features, status


def _in_turn(shards: list[int], start: float | None) -> list[int]:
    if start is None:
        return random.sample(shards, len(shards))
    turn = int(start * len(shards))
    return shards[turn:] + shards[:turn]


def _size(batch: Sequence[int], lengths: Sequence[int]) -> Size:
    """What a batch's memory grows with: its examples, their tokens, and the longest one's."""
    tokens = [lengths[i] for i in batch]
    return len(batch), sum(tokens), max(tokens, default=0)


class _TokenMeter:
    """Adds tokens/s to a progress bar, and what other processes have done."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar
        self.examples = self.tokens = self.others = 0
        self.started = time.monotonic()

    def update(self, examples: int, tokens: int) -> None:
        self.examples += examples
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(examples)

    def see_others(self, examples: int) -> None:
        self.bar.update(examples - self.others)
        self.others = examples

    def rewind(self, examples: int) -> None:
        self.bar.update(examples - self.examples)
        self.examples = examples
