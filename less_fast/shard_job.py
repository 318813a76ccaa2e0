"""``ShardJob``: the map from windows of examples to features, overlapped with reading ahead, copying and writing."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from less_fast.model.budget import is_out_of_memory
from less_fast.progress import progress_bar
from less_fast.store import Status, StoreWriter
from less_fast.store.background import BackgroundWriter
from less_fast.transfer import Fetch

logger = logging.getLogger("less_fast")

# Batches whose features are on their way to the host while the next one is started.
_IN_FLIGHT = 2


class ShardJob:
    """Computes the pending shards of several stores; holds the token budget, which only ever falls.

    ``encode``: the tokens of consecutive examples; called in a thread of its own. Padding is token 0: it is neither
    attended to nor in the loss.
    """

    def __init__(
        self, extractor: MultiFeatureExtractor, n_examples: int, encode: Callable[[range], list[Encoded]], budget: int
    ) -> None:
        self.extractor = extractor
        self.n_examples = n_examples
        self.encode = encode
        self.budget = budget

    def run(self, writers: Sequence[StoreWriter], progress: bool) -> None:
        """Write what the stores, all of the same examples, still miss."""
        missing = [set(writer.pending()) for writer in writers]
        pending = sorted(set().union(*missing))
        total, bounds = self.n_examples, {shard: writers[0].bounds(shard) for shard in pending}
        todo = sum(stop - start for start, stop in bounds.values())
        # A shard's bits depend on its budget, which is the smallest that the shards before it needed, whether this
        # call made them or one that was interrupted.
        first_budget = self.budget
        budgets = [(n, facts["token_budget"]) for writer in writers for n, facts in writer.shard_facts().items()]
        with (
            progress_bar(total, unit="ex", desc="features", show=progress, initial=total - todo) as bar,
            BackgroundWriter() as background,
            ThreadPoolExecutor(1, "less_fast-tokenizer") as tokenizing,
            ThreadPoolExecutor(1, "less_fast-collator") as collating,
        ):
            meter = _TokenMeter(bar)
            windows = ((shard, range(*bounds[shard])) for shard in pending)
            for shard, encoded in ahead(tokenizing, self._encoded, windows):
                self.budget = min([first_budget, *(budget for number, budget in budgets if number < shard)])
                arrays, status = self._features(encoded, collating, meter)
                budgets.append((shard, self.budget))
                columns = (
                    status,
                    np.array([len(e.input_ids) for e in encoded], np.int32),
                    np.array([e.n_labels for e in encoded], np.int32),
                )
                facts = {"token_budget": self.budget, "truncated": sum(e.truncated for e in encoded)}
                writes = [
                    partial(writer.write, shard, features, *columns, facts=facts)
                    for writer, features, wanted in zip(writers, arrays, missing)
                    if shard in wanted
                ]
                background.submit(partial(_call_all, writes))

    def _encoded(self, window: tuple[int, range]) -> tuple[int, list[Encoded]]:
        shard, rows = window
        return shard, self.encode(rows)

    def _features(
        self, encoded: Sequence[Encoded], collating: ThreadPoolExecutor, meter: _TokenMeter
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Features of every output and a status per row; a smaller budget and a new start where memory runs out."""
        while True:
            done_before = meter.examples
            try:
                return self._attempt(encoded, collating, meter)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                longest = max(len(e.input_ids) for e in encoded)
                if self.budget <= max(longest // 2, 1):
                    raise LessFastError(
                        f"out of memory on {self.extractor.device} with a single example of {longest} tokens; use a "
                        "smaller max_length, a smaller dtype or a larger device (finished shards are kept)"
                    ) from error
                meter.rewind(done_before)
                self.budget //= 2
                logger.warning("out of memory: the token budget is now %d; this shard starts again", self.budget)
            if self.extractor.device.type == "cuda":
                torch.cuda.empty_cache()

    def _attempt(
        self, encoded: Sequence[Encoded], collating: ThreadPoolExecutor, meter: _TokenMeter
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

        batches = plan_batches(
            lengths,
            self.budget,
            self.extractor.max_examples,
            packed=self.extractor.batches.packed,
            batch_cost=self.extractor.batch_cost,
        )
        in_flight: deque[tuple[list[int], Tensor, Fetch]] = deque()
        for batch, tensors in ahead(collating, collated, batches):
            result = self.extractor(tensors)
            in_flight.append((batch, result.n_labels, Fetch([result.losses, *result.features])))
            if len(in_flight) > _IN_FLIGHT:
                store(*in_flight.popleft())
        while in_flight:
            store(*in_flight.popleft())
        for array in features:
            array[status != Status.OK] = 0.0
        return features, status


def _call_all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


class _TokenMeter:
    """Adds tokens/s to a progress bar."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar
        self.examples = self.tokens = 0
        self.started = time.monotonic()

    def update(self, examples: int, tokens: int) -> None:
        self.examples += examples
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.bar.update(examples)

    def rewind(self, examples: int) -> None:
        self.bar.update(examples - self.examples)
        self.examples = examples
