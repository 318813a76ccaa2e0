"""``extract``: the map from a dataset's shards to a feature store, resumable at any instant."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from less_fast.data import Encoded, Examples, encode_all, load_examples
from less_fast.errors import LessFastError
from less_fast.features import MultiFeatureExtractor, Output
from less_fast.in_step import Ranks, ranks_of
from less_fast.model.budget import auto_token_budget
from less_fast.model.compiled import compiled
from less_fast.model.load import check_vocabulary, fingerprint, load_tokenizer
from less_fast.model.packed import Packing
from less_fast.optim.adam import Precondition, precondition_facts
from less_fast.paths import PathOrUrl, RemotePath, to_path
from less_fast.projection import Projection
from less_fast.shard_job import ShardJob
from less_fast.store import FeatureStore, Rows, Status, StoreWriter

logger = logging.getLogger("less_fast")

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Extraction:
    """What makes the shards of several stores of the same examples.

    ``writers``: for every store, its folder and the keyword arguments of its :class:`StoreWriter`. ``scope``: a context
    that the shards are made within.
    """

    job: ShardJob
    ranks: Ranks
    n_shards: int
    writers: list[tuple[PathOrUrl, dict[str, Any]]]
    scope: AbstractContextManager[Any]

    def open(self, stack: ExitStack, *, shared: bool) -> list[StoreWriter]:
        """The stores in order, to be written to until the stack is left; none on ranks that leave it to another."""
        own = self.writers if self.ranks.leads else []
        with self.ranks.failing_together():
            writers = [stack.enter_context(StoreWriter(path, **made, shared=shared)) for path, made in own]
        stack.enter_context(self.scope)
        return writers


def prepare(
    model: nn.Module,
    dataset: Examples | PathOrUrl | Any,
    outputs: Mapping[PathOrUrl, Output],
    *,
    tokenizer: Any = None,
    template: str = "tulu",
    max_length: int = 2048,
    dtype: str = "float32",
    token_budget: int | str = "auto",
    shard_size: int = 1024,
    targets: str | None = None,
    backend: str = "auto",
    packing: Packing = "auto",
    compile_model: bool = False,
    checkpoint_activations: bool = False,
) -> Extraction:
    """Check all that :func:`extract_many` is given, before any shard is made.

    Parameters
    ----------
    outputs : store folder -> :class:`~less_fast.features.Output`.
    tokenizer : default: the one saved where the model was loaded from.
    template : ``tulu`` (LESS's chat format and label mask), ``chat`` (the tokenizer's own) or ``raw``.
    max_length : tokens an example is cut to.
    dtype : of the stored features: float32, float16, bfloat16, int8 or 1bit.
    token_budget : tokens a batch may have, padding included. ``auto`` derives it from the device; an out-of-memory
        halves it.
    shard_size : examples a shard holds; the unit of work, resume and checksums. Lengths are sorted within it.
    targets, backend, packing, checkpoint_activations : as for :class:`~less_fast.FeatureExtractor`.
    compile_model : run ``torch.compile`` on the parts of the model without adapters (MLPs, norms) for this call.
    """
    ranks = ranks_of(model)
    with ranks.failing_together():
        examples = dataset if isinstance(dataset, Examples) else load_examples(dataset)
        path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
        if tokenizer is None and not path:
            raise LessFastError("the model does not say where it was loaded from; pass tokenizer=")
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(path)
        check_vocabulary(model, tokenizer, path or type(model).__name__)
        if len({to_path(out).resolve() for out in outputs}) < len(outputs):
            raise LessFastError("two outputs have the same folder; give each its own")
        encode_all([], tokenizer, template, max_length)  # a template or length that cannot serve: an error at once
    form = {"dtype": dtype, "shard_size": shard_size}
    # These decide how many passes of the model follow, all in step; features travel in the order of the outputs.
    ranks.check_same(
        {
            **form,
            "outputs": [[str(out), output.projection.to_dict()] for out, output in outputs.items()],
            "examples": examples.fingerprint,
            "template": template,
            "max_length": max_length,
            "token_budget": token_budget,
            "targets": targets,
            "backend": backend,
            "packing": packing,
            "compile_model": compile_model,
            "checkpoint_activations": checkpoint_activations,
        }
    )
    extractor = MultiFeatureExtractor(
        model,
        list(outputs.values()),
        targets=targets,
        backend=backend,
        packing=packing,
        checkpoint_activations=checkpoint_activations,
    )
    if ranks.main and backend == "auto" and extractor.device.type == "cpu" and "reference" in extractor.backends():
        logger.warning(
            "the C++ module is not installed, so features are computed in torch alone: see 'less-fast doctor'"
        )
    budget = token_budget
    if token_budget == "auto":
        budget = auto_token_budget(
            model, extractor.sites, extractor.device, max_length, checkpointed=checkpoint_activations
        )
        budget = min(ranks.all(budget))
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
            "device": device_kind(extractor.device),
            "token_budget": budget,
            "batches": extractor.batches.name,
            "compiled": compile_model,
        },
        "versions": versions(extractor.device),
    }
    kinds = [
        {
            "projection": output.projection.to_dict(),
            "precondition": precondition_facts(output.precondition),
            "backend": used,
            "reduced_from": source.to_dict() if source != output.projection else None,
        }
        for output, used, source in zip(outputs.values(), extractor.backends(), extractor.computed())
    ]
    ranks.check_same({**facts, "outputs": kinds})

    def encode(window: range) -> list[Encoded]:
        return encode_all([examples[i] for i in window], tokenizer, template, max_length)

    rows = Rows(examples.ids, examples.datasets, examples.subtasks)
    return Extraction(
        ShardJob(extractor, len(examples), encode, budget, ranks),
        ranks,
        -(-len(examples) // shard_size) if shard_size > 0 else 0,
        [
            (path, {"facts": {**facts, **kind}, "rows": rows, "dim": output.projection.dim, **form})
            for (path, output), kind in zip(outputs.items(), kinds)
        ],
        compiled(model, extractor.sites) if compile_model else nullcontext(),
    )


def _with_settings_of(inner: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Have ``help`` show the keyword arguments of ``inner`` where ``**settings`` stands for them."""
    added = [p for p in inspect.signature(inner).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def shown(outer: Any) -> Any:
        signature = inspect.signature(outer)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        parameters = [*own, *(p for p in added if p.name not in names)]
        outer.__signature__ = signature.replace(parameters=parameters)
        return outer

    return shown


@_with_settings_of(prepare)
def extract_many(
    model: nn.Module,
    dataset: Examples | PathOrUrl | Any,
    outputs: Mapping[PathOrUrl, Output],
    *,
    shared: bool | None = None,
    shard_range: tuple[int, int] | None = None,
    progress: bool = True,
    **settings: Any,
) -> dict[PathOrUrl, FeatureStore]:
    """Several kinds of features (dims, preconditioners) of a dataset in one pass, each in a store of its own.

    Parameters
    ----------
    outputs : store folder or URL -> :class:`~less_fast.features.Output`.
    shared : make the stores together with other processes that do the same call. Each takes shards that nobody has
        taken yet, and those of processes that end; all return when the stores are whole. Default: under ``torchrun``,
        and with ``shard_range``. The ranks that hold a sharded model together make every shard together: they count
        as one process, of which one rank writes.
    shard_range : make only shards [first, last); the stores that are returned may then miss others.
    progress : show a progress bar with examples/s, tokens/s and the time left; under ``torchrun``, rank 0 does.
    settings : tokenizer, template, max_length, dtype, token_budget, shard_size, targets, backend, packing,
        compile_model and checkpoint_activations; ``help(less_fast.extraction.prepare)`` says what each of them is.
    """
    extraction = prepare(model, dataset, outputs, **settings)
    ranks = extraction.ranks
    if shared is None:
        shared = ranks.worker.size > 1 or shard_range is not None
    ranks.check_same({"shared": shared, "shard_range": shard_range})
    shards = shard_window(shard_range, extraction.n_shards)
    with ExitStack() as stack:
        writers = extraction.open(stack, shared=shared)
        remote = any(isinstance(writer.path, RemotePath) for writer in writers)
        start = None if remote else ranks.worker.start
        extraction.job.run(writers, progress and ranks.main, shards=shards, start=start)
    ranks.close()
    stores = {path: FeatureStore(path, allow_partial=shards is not None) for path in outputs}
    if ranks.main:
        tell_of_rows(next(iter(stores.values())))
    return stores


@_with_settings_of(extract_many)
def extract(
    model: nn.Module,
    dataset: Examples | PathOrUrl | Any,
    out: PathOrUrl,
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
    out : the store's folder, or its URL (``s3://…``). Where it holds a part of the same job, that part is kept and the
        rest is made; the result is the same bit for bit. Where it holds anything else, LessFastError says what differs.
    projection : default ``Projection("srht", 8192)``.
    precondition : ``"sgd"``, ``"sign"`` or an :class:`~less_fast.AdamState`.
    settings : the other keyword arguments of :func:`extract_many`.
    """
    output = Output(projection or Projection(), precondition)
    return extract_many(model, dataset, {out: output}, **settings)[out]


def shard_window(shard_range: tuple[int, int] | None, n_shards: int) -> range | None:
    """The shards that ``shard_range`` means; raises LessFastError where there are none."""
    if shard_range is None or not n_shards:
        return None
    first, last = shard_range
    if not 0 <= first < min(last, n_shards):
        raise LessFastError(
            f"shard_range is {first}:{last}; expected ascending numbers, the first one below {n_shards}, the number of "
            "shards"
        )
    return range(first, min(last, n_shards))


def device_kind(device: torch.device) -> str:
    """``cpu``, or ``cuda sm_90``: equal bits are promised for equal kinds."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda sm_{major}{minor}"


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what computes on a device of that type, of those that are installed."""
    names = ["less_fast", "torch", "transformers"] + (["triton", "flash_attn"] if device.type == "cuda" else [])
    return {name: version(name) for name in names if name in names[:3] or importlib.util.find_spec(name) is not None}


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


def tell_of_rows(store: FeatureStore) -> None:
    """Log what is to be known of the rows: those that were cut, and those that can't be selected."""
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
