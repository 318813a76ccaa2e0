"""``extract``: the map from a dataset's shards to a feature store, resumable at any instant."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from less_fast.data import Encoded, Examples, collate, encode_all, load_examples, plan_batches
from less_fast.errors import LessFastError
from less_fast.features import MultiFeatureExtractor, Output
from less_fast.model.budget import auto_token_budget, is_out_of_memory
from less_fast.model.load import check_vocabulary, fingerprint, load_tokenizer
from less_fast.optim.adam import Precondition, precondition_facts
from less_fast.progress import progress_bar
from less_fast.projection import Projection
from less_fast.store import FeatureStore, Rows, Status, StoreWriter

logger = logging.getLogger("less_fast")


def extract(
    model: nn.Module,
    dataset: Examples | str | Path | Any,
    out: str | Path,
    *,
    projection: Projection | None = None,
    precondition: Precondition = "sgd",
    **settings: Any,
) -> FeatureStore:
    """Features of every example of a dataset, in a store on disk.

    Parameters
    ----------
    model : as for :class:`~less_fast.FeatureExtractor`.
    dataset : anything :func:`~less_fast.data.load_examples` takes.
    out : the store's folder. Where it holds a part of the same job, that part is kept and the rest is made; the result
        is the same bit for bit. Where it holds anything else, LessFastError says what differs.
    projection : default ``Projection("srht", 8192)``.
    precondition : ``"sgd"``, ``"sign"`` or an :class:`~less_fast.AdamState`.
    settings : the keyword arguments of :func:`extract_many`.
    """
    output = Output(projection or Projection(), precondition)
    return extract_many(model, dataset, {out: output}, **settings)[out]


def extract_many(
    model: nn.Module,
    dataset: Examples | str | Path | Any,
    outputs: Mapping[str | Path, Output],
    *,
    tokenizer: Any = None,
    template: str = "tulu",
    max_length: int = 2048,
    dtype: str = "float32",
    token_budget: int | str = "auto",
    shard_size: int = 1024,
    targets: str | None = None,
    backend: str = "auto",
    progress: bool = True,
) -> dict[str | Path, FeatureStore]:
    """Several kinds of features (dims, preconditioners) of a dataset in one pass, each in a store of its own.

    Parameters
    ----------
    outputs : store folder -> :class:`~less_fast.features.Output`.
    tokenizer : default: the one saved where the model was loaded from.
    template : ``tulu`` (LESS's chat format and label mask), ``chat`` (the tokenizer's own) or ``raw``.
    max_length : tokens an example is cut to.
    dtype : of the stored features: float32, float16 or bfloat16.
    token_budget : padded tokens a batch may have. ``auto`` derives it from the device; an out-of-memory halves it.
    shard_size : examples a shard holds; the unit of work, resume and checksums. Lengths are sorted within it.
    targets, backend : as for :class:`~less_fast.FeatureExtractor`.
    progress : show a progress bar with examples/s, tokens/s and the time left.
    """
    examples = dataset if isinstance(dataset, Examples) else load_examples(dataset)
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if tokenizer is None and not path:
        raise LessFastError("the model does not say where it was loaded from; pass tokenizer=")
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(path)
    check_vocabulary(model, tokenizer, path or type(model).__name__)
    if len({Path(out).resolve() for out in outputs}) < len(outputs):
        raise LessFastError("two outputs have the same folder; give each its own")
    encode_all([], tokenizer, template, max_length)  # a template or length that cannot serve: an error at once
    extractor = MultiFeatureExtractor(model, list(outputs.values()), targets=targets, backend=backend)
    if backend == "auto" and extractor.device.type == "cpu" and "reference" in extractor.backends():
        logger.warning(
            "the C++ module is not installed, so features are computed in torch alone: see 'less-fast doctor'"
        )
    budget = auto_token_budget(model, extractor.device, max_length) if token_budget == "auto" else token_budget
    if not isinstance(budget, int) or budget < 1:
        raise LessFastError(f"token_budget is {token_budget!r}; expected 'auto' or a positive number of tokens")
    facts = {
        **fingerprint(model),
        "layout_hash": extractor.layout.hash,
        "layout": extractor.layout.to_list(),
        "examples": examples.fingerprint,
        "tokenizer": tokenizer_facts(tokenizer),
        "template": template,
        "max_length": max_length,
        "numerics": {
            "model_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": extractor.device.type,
            "token_budget": budget,
        },
        "versions": {name: version(name) for name in ("less_fast", "torch", "transformers")},
    }
    rows = Rows(examples.ids, examples.datasets, examples.subtasks)
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                StoreWriter(
                    path,
                    {
                        **facts,
                        "projection": output.projection.to_dict(),
                        "precondition": precondition_facts(output.precondition),
                        "backend": used,
                        "reduced_from": source.to_dict() if source != output.projection else None,
                    },
                    rows,
                    dim=output.projection.dim,
                    dtype=dtype,
                    shard_size=shard_size,
                )
            )
            for (path, output), used, source in zip(outputs.items(), extractor.backends(), extractor.computed())
        ]
        job = _Job(extractor, examples, tokenizer, template, max_length, budget)
        job.run(writers, progress)
        stores = {path: writer.close() for path, writer in zip(outputs, writers)}
    _report(next(iter(stores.values())))
    return stores


class _Job:
    """The map over shards; holds the token budget, which only ever falls."""

    def __init__(
        self,
        extractor: MultiFeatureExtractor,
        examples: Examples,
        tokenizer: Any,
        template: str,
        max_length: int,
        budget: int,
    ) -> None:
        self.extractor = extractor
        self.examples = examples
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.budget = budget
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (tokenizer.eos_token_id or 0)

    def run(self, writers: Sequence[StoreWriter], progress: bool) -> None:
        pending = sorted({shard for writer in writers for shard in writer.pending()})
        first_budget = self.budget
        total = len(self.examples)
        todo = sum(stop - start for start, stop in map(writers[0].bounds, pending))
        with progress_bar(total, unit="ex", desc="features", show=progress, initial=total - todo) as bar:
            meter = _TokenMeter(bar)
            for shard in pending:
                # A shard's bits depend on its budget, which is the smallest that the shards before it needed, whether
                # this call made them or one that was interrupted.
                done = [facts for writer in writers for number, facts in writer.shard_facts().items() if number < shard]
                self.budget = min([first_budget, *(facts["token_budget"] for facts in done)])
                start, stop = writers[0].bounds(shard)
                window = [self.examples[i] for i in range(start, stop)]
                encoded = encode_all(window, self.tokenizer, self.template, self.max_length)
                arrays, status = self._features(encoded, meter)
                columns = (
                    status,
                    np.array([len(e.input_ids) for e in encoded], np.int32),
                    np.array([e.n_labels for e in encoded], np.int32),
                )
                shard_facts = {"token_budget": self.budget, "truncated": sum(e.truncated for e in encoded)}
                for writer, features in zip(writers, arrays):
                    if shard in writer.pending():
                        writer.write(shard, features, *columns, facts=shard_facts)

    def _features(self, encoded: Sequence[Encoded], meter: _TokenMeter) -> tuple[list[np.ndarray], np.ndarray]:
        """Features of every output and a status per row; a smaller budget and a new start where memory runs out."""
        while True:
            done_before = meter.examples
            try:
                return self._attempt(encoded, meter)
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

    def _attempt(self, encoded: Sequence[Encoded], meter: _TokenMeter) -> tuple[list[np.ndarray], np.ndarray]:
        features = [np.zeros((len(encoded), output.projection.dim), np.float32) for output in self.extractor.outputs]
        status = np.full(len(encoded), Status.OK, np.uint8)
        for batch in plan_batches([len(e.input_ids) for e in encoded], self.budget):
            result = self.extractor(collate([encoded[i] for i in batch], self.pad_id))
            finite = torch.isfinite(result.losses)
            for array, rows in zip(features, result.features):
                array[batch] = rows.cpu().numpy()
                finite &= torch.isfinite(rows).all(1)
            status[batch] = np.where(
                (result.n_labels == 0).cpu().numpy(),
                Status.NO_LABELS,
                np.where(finite.cpu().numpy(), Status.OK, Status.NON_FINITE),
            )
            meter.update(len(batch), sum(len(encoded[i].input_ids) for i in batch))
        for array in features:
            array[status != Status.OK] = 0.0
        return features, status


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


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What identifies a tokenizer: its size, special tokens and chat template, and how it cuts a probe text."""
    probe = "Hello, Wörld! 12345 + 67 = ?\n<|user|>\n\tdef f(x): return x"
    return {
        "size": len(tokenizer),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
        "probe": list(tokenizer(probe)["input_ids"]),
    }


def _report(store: FeatureStore) -> None:
    truncated = sum(_column(store, "truncated"))
    if truncated:
        logger.warning("%d of %d examples were cut to max_length", truncated, len(store))
    for status, meaning in ((Status.NO_LABELS, "have no label token"), (Status.NON_FINITE, "have non-finite features")):
        rows = np.flatnonzero(np.asarray(store.status) == status)
        if len(rows):
            first = ", ".join(store.rows.ids[i] for i in rows[:3])
            logger.warning(
                "%d of %d examples %s and can't be selected (first: %s)", len(rows), len(store), meaning, first
            )


def _column(store: FeatureStore, name: str) -> Iterable[int]:
    return (shard.get("facts", {}).get(name, 0) for shard in store.manifest["shards"])
